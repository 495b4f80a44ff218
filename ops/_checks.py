"""Argument checks shared by the ops, with uniform messages: what was given and what was expected."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Sequence
from typing import Any

import torch

_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Passed:
    """The classes of calls that passed an op's checks: calls of the same class need no further ones.

    Args:
        most: classes that are kept, a bound for programs that see images of any size.
    """

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._classes: set[object] = set()

    def has(self, key: object) -> bool:
        """Whether a call with this key, as from ``shape_class``, passed; never for None."""
        return key is not None and key in self._classes

    def add(self, key: object) -> None:
        """Remember a call that passed."""
        if key is not None:
            if len(self._classes) >= self._most:
                self._classes.clear()
            self._classes.add(key)


def shape_class(*tensors: object, options: Hashable = None) -> object:
    """All that checks of tensors look at, to be compared: shapes, dtypes and devices.

    None where that cannot be told, because a value is no plain tensor (and maybe none at all) or calls are traced,
    whose sizes may be symbols that comparing would make numbers.

    Args:
        options: what else the checks depend on, itself checked before: 1 equals True and 1.0.
    """
    if torch.compiler.is_compiling():
        return None
    facts: list[Any] = [options]
    for tensor in tensors:
        if type(tensor) in _PLAIN:
            facts += tensor.shape, tensor.dtype, tensor.device  # type: ignore[attr-defined]
        elif tensor is None:
            facts.append(None)
        else:
            return None
    key = tuple(facts)
    try:
        hash(key)
    except TypeError:  # symbols under a transform of torch.func
        return None
    return key


def check_options(op: str, given: Collection[str], known: Collection[str]) -> None:
    """Raises TypeError for an option that is not among those that an op takes by name."""
    for name in given:
        if name not in known:
            raise TypeError(f"{op}: unknown option {name!r}, expected one of {tuple(known)}")


def check_tensor(op: str, name: str, value: object) -> torch.Tensor:
    """``value`` as a tensor.

    Raises:
        TypeError: if it is not a tensor.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    return value


def check_shape(op: str, name: str, tensor: torch.Tensor, axes: str, expected: Sequence[int]) -> None:
    """Compare a shape with the expected sizes; ``axes`` names them in the message, as in ``"(B, H, W, E)"``.

    Raises:
        ValueError: naming the given and the expected shape.
    """
    if tensor.dim() != len(expected) or any(have != want for have, want in zip(tensor.shape, expected, strict=True)):
        raise ValueError(f"{op}: {name} must have shape {axes} = {tuple(expected)}, got {tuple(tensor.shape)}")


def check_dtype(op: str, name: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raises TypeError if the tensor's dtype is not among ``allowed``."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{op}: {name} must be of dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def is_integer(value: object) -> bool:
    """Whether a value is an integer, symbolic ones included; a bool is an argument in the wrong place."""
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def check_factor(op: str, name: str, value: object) -> float:
    """``value`` as a finite number.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    if not -math.inf < value < math.inf:  # a form that compilers trace
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    return float(value)


def check_device(op: str, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Raises ValueError if the tensor is on another device than the op's first argument."""
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {device} like the first argument")

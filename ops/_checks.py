"""Argument checks shared by the ops, with uniform messages: what was given and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch


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


def check_device(op: str, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Raises ValueError if the tensor is on another device than the op's first argument."""
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {device} like the first argument")

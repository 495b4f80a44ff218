"""What the benchmark knows of an op: cases, inputs, our callable, peers, reference and floor.

A new op is one module with an ``OpEntry``, entered in ``subquad.tools.benchmarks.ops.OPS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.backbones.registry import hint

Tensors = Mapping[str, Tensor]


class Case(NamedTuple):
    """One thing to measure: sizes along the op's ``axes``, and which form of the op."""

    shape: tuple[int, ...]
    variant: str

    def __str__(self) -> str:
        return f"{self.variant} {'x'.join(map(str, self.shape))}"


class Inputs(NamedTuple):
    """Fresh random leaves of a case: those with the batch as their first axis, and parameters that the batch shares."""

    batched: dict[str, Tensor]
    parameters: dict[str, Tensor]

    def all(self) -> dict[str, Tensor]:
        return {**self.batched, **self.parameters}


class Cost(NamedTuple):
    """What no implementation can avoid, in a forward pass and in forward + backward.

    Attributes:
        forward_bytes, both_bytes: device memory traffic, every input and output once (and every gradient once).
        forward_exps, both_exps: operations of the special function units.
    """

    forward_bytes: float
    both_bytes: float
    forward_exps: float = 0.0
    both_exps: float = 0.0


class Recorded(NamedTuple):
    """Times of another run on the same kind of GPU: context, not a measurement of this run."""

    gpu: str
    system: str
    forward_ms: float
    both_ms: float | None
    peak_mib: float | None


def _keep_layout(case: Case, name: str, value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class System:
    """One way to compute an op: ours or a peer's.

    Attributes:
        name: shown in the tables and matched by the peer filter.
        call: computes the output from the named inputs, all in the system's own layout.
        why_not: why it cannot run on a device, or None if it can.
        to_native, from_native: between our layout and the system's own, for an input, its gradient, or the output
            ``y``; outside every timing.
        context: entered around all of its work.
    """

    name: str
    call: Callable[[Case, Tensors], Tensor]
    why_not: Callable[[torch.device], str | None] = lambda device: None
    to_native: Callable[[Case, str, Tensor], Tensor] = _keep_layout
    from_native: Callable[[Case, str, Tensor], Tensor] = _keep_layout
    context: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class OpEntry:
    """An op of the benchmark.

    Attributes:
        name: name of the op.
        axes: what the sizes of a case mean, as in ``"BxExHxW"``; the batch comes first.
        variants: the forms of the op that can be asked for.
        cases: what runs unless shapes are asked for.
        inputs: draws the inputs of a case; activations in the given dtype.
        ours: our op.
        peers: others that compute the same function.
        reference: the same function in float64, from a part of the batch.
        cost: from a case and the bytes of an activation.
        backend: name of the implementation of ours that serves the case.
        recorded: figures of a peer that were recorded elsewhere.
    """

    name: str
    axes: str
    variants: tuple[str, ...]
    cases: tuple[Case, ...]
    inputs: Callable[[Case, torch.dtype, torch.device], Inputs]
    ours: System
    peers: tuple[System, ...]
    reference: Callable[[Case, Tensors], Tensor]
    cost: Callable[[Case, int], Cost]
    backend: Callable[[Case, Tensors], str]
    recorded: Callable[[Case], Recorded | None] = lambda case: None


def select(what: str, patterns: tuple[str, ...], names: tuple[str, ...]) -> list[str]:
    """The names that match any of the patterns (``*`` and ``?`` allowed), in the order of ``names``.

    Raises:
        ValueError: for a pattern that matches none, naming what is close or exists.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"unknown {what} {pattern!r}, {hint(pattern, names)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def why_not_importable(module: str) -> str | None:
    """Why a module cannot be imported, or None if it can."""
    try:
        import_module(module)
    except (ImportError, OSError) as error:
        return f"{module} is not importable ({error})"
    return None

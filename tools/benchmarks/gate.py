"""Correctness before speed: a system that does not compute the op's function gets no time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.tools.benchmarks import measure
from subquad.tools.benchmarks.registry import Case, Inputs, OpEntry, System, Tensors

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Largest relative L2 error of the output and of every gradient, by activation dtype."""

_REFERENCE_ELEMENTS = 2**23
_REFERENCE_ITEMS = 3


class Reference(NamedTuple):
    """Float64 output and gradients of some images of a batch.

    Attributes:
        items: which images, (n,).
        grad: cotangent of their output, float64.
        values: ``y`` of those images, and ``d <input>`` for every input: of those images for a batched one, in total
            for a parameter.
    """

    items: Tensor
    grad: Tensor
    values: dict[str, Tensor]


class Verdict(NamedTuple):
    """How far a system is from the reference.

    Attributes:
        error: largest relative L2 error; NaN if anything in the full result is not finite.
        worst: what has that error.
        tolerance: the limit.
        first_s: wall time of the system's first forward + backward, compilation included.
    """

    error: float
    worst: str
    tolerance: float
    first_s: float

    @property
    def ok(self) -> bool:
        return self.error < self.tolerance  # False for NaN

    def __str__(self) -> str:
        return f"relative error {self.error:.2g} of {self.worst}, limit {self.tolerance:g}"


def reference(entry: OpEntry, case: Case, inputs: Inputs) -> Reference:
    """The reference for first, middle and last image (the middle one alone if they are large)."""
    leading = next(iter(inputs.batched.values()))
    batch = leading.shape[0]
    count = min(_REFERENCE_ITEMS, batch, max(1, _REFERENCE_ELEMENTS // leading[0].numel()))
    chosen = {1: [batch // 2], 2: [0, batch - 1]}.get(count, [0, batch // 2, batch - 1])
    items = torch.tensor(chosen, device=leading.device)
    exact = {name: value.detach().index_select(0, items).double() for name, value in inputs.batched.items()}
    exact |= {name: value.detach().double() for name, value in inputs.parameters.items()}
    leaves = {name: value.requires_grad_() for name, value in exact.items()}
    y = entry.reference(case, leaves)
    grad = torch.randn_like(y).to(leading.dtype).double()  # exact in the dtype that the systems get it in
    grads = torch.autograd.grad(y, list(leaves.values()), grad)
    values = {f"d {name}": value for name, value in zip(leaves, grads, strict=True)}
    return Reference(items, grad, {"y": y.detach(), **values})


def check(
    system: System,
    call: Callable[[Case, Tensors], Tensor],
    case: Case,
    inputs: Inputs,
    expected: Reference,
    tolerance: float,
) -> Verdict:
    """Run a system on the whole batch, as it will be timed, and compare the reference's images.

    The cotangent is zero outside those images, so that the gradients of parameters are theirs alone.

    Args:
        call: the system's callable, compiled or not.
    """
    native = native_leaves(system, case, inputs)
    result: dict[str, Tensor] = {}

    def forward_backward() -> None:
        y = call(case, native)
        full = system.from_native(case, "y", y)
        grad = torch.zeros_like(full).index_copy_(0, expected.items, expected.grad.to(full.dtype))
        grads = torch.autograd.grad(y, list(native.values()), system.to_native(case, "y", grad))
        result["y"] = full.detach()
        for name, value in zip(native, grads, strict=True):
            result[f"d {name}"] = system.from_native(case, name, value)

    first_s = measure.seconds(forward_backward, expected.items.device)
    errors = {}
    for name, want in expected.values.items():
        have = result[name]
        finite = bool(torch.isfinite(have).all())
        if name.removeprefix("d ") not in inputs.parameters:
            have = have.index_select(0, expected.items)
        errors[name] = relative_error(have, want) if finite else float("nan")
    worst = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    return Verdict(errors[worst], worst, tolerance, first_s)


def native_leaves(system: System, case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The inputs as leaves in the system's own layout."""
    return {name: system.to_native(case, name, value.detach()).requires_grad_() for name, value in inputs.all().items()}


def relative_error(have: Tensor, want: Tensor) -> float:
    """``||have - want|| / ||want||`` in float64; infinite for a wrong shape, or if only want is zero."""
    if have.shape != want.shape:
        return float("inf")
    difference, scale = (have.double() - want.double()).norm().item(), want.double().norm().item()
    if scale == 0:
        return 0.0 if difference == 0 else float("inf") if difference == difference else difference
    return difference / scale

"""Inputs for the selective scan, and one way to run it that returns every value and every named gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from subquad import ops
from subquad.ops.selective_scan import CROSS

Arguments = dict[str, Any]


def _make_inputs(
    batch: int = 2,
    height: int = 4,
    width: int = 5,
    dim: int = 6,
    *,
    state: int = 1,
    routes: Sequence[str] | Tensor = CROSS,
    groups: int | None = None,
    rank: int | None = 2,
    sequence: bool = False,
    skip: bool = True,
    bias: bool = True,
    gate: bool = False,
    initial: bool = False,
    softplus: bool = True,
) -> Arguments:
    """Arguments of ``selective_scan`` in float64, with steps and decays as in a trained model."""
    generator = torch.Generator().manual_seed(batch + 10 * height + 100 * width + 1000 * dim + state)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    k = len(routes)
    lead = (batch, height * width) if sequence else (batch, height, width)
    split = (k, state) if groups is None else (k, groups, state)
    arguments: Arguments = {
        "x": normal(*lead, dim),
        "dt": normal(*lead, k, dim if rank is None else rank),
        "A": -torch.rand((k, dim, state), generator=generator, dtype=torch.float64) * 4 - 0.1,
        "B": normal(*lead, *split),
        "C": normal(*lead, *split),
        "routes": routes,
        "dt_softplus": softplus,
    }
    if not softplus:
        arguments["dt"] = arguments["dt"].abs() * 0.1
    if rank is not None:
        weight = normal(k, dim, rank) * rank**-0.5
        arguments["dt_weight"] = weight if softplus else weight.abs()
    optional: Arguments = {
        "D": normal(k, dim) if skip else None,
        "dt_bias": (normal(k, dim) - 2 if softplus else normal(k, dim).abs() * 0.1) if bias else None,
        "z": normal(*lead, dim) if gate else None,
        "initial_state": normal(batch, k, dim, state) if initial else None,
    }
    return arguments | {name: value for name, value in optional.items() if value is not None}


def _convert(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The arguments in another precision; parameters stay in float32 with 16-bit activations."""
    activations = ("x", "dt", "B", "C", "z")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        name: value.to(dtype if name in activations else wide)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }


def _run(arguments: Arguments, backend: str = "torch", *, state_gradient: bool = True) -> dict[str, Tensor]:
    """Outputs ``y`` and ``last_state`` and, under its name, the gradient of every floating-point argument.

    The cotangents depend on nothing but the shapes, so that results of two runs can be compared.
    """
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    with ops.use_backend(backend):
        y, last_state = ops.selective_scan(**(arguments | leaves), return_last_state=True)
        generator = torch.Generator().manual_seed(7)
        cotangents = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in (y, last_state)]
        outputs = (y, last_state) if state_gradient else (y,)
        grads = torch.autograd.grad(outputs, tuple(leaves.values()), cotangents[: len(outputs)])
    return {"y": y.detach(), "last_state": last_state.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.fixture
def make_inputs() -> Callable[..., Arguments]:
    return _make_inputs


@pytest.fixture
def convert() -> Callable[[Arguments, torch.dtype], Arguments]:
    return _convert


@pytest.fixture
def run() -> Callable[..., dict[str, Tensor]]:
    return _run

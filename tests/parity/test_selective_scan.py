"""The selective scan against recorded upstream results, values and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from subquad import ops
from subquad.ops.selective_scan import CROSS
from subquad.ops.selective_scan.routes import ROUTES, route_order

SYSTEM = "selective_scan"

EXACT = 1e-9
"""Of the largest value: recorded results are float64, only the order of sums differs."""

RUNS = pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.float64), ("torch", torch.float64), ("torch", torch.float32)],
    ids=["reference-float64", "torch-float64", "torch-float32"],
)

HALF_ERROR = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Relative L2 error on y of a scan in 16 bits; twice that on gradients."""


def _is_sequence(case: Any) -> bool:
    return not case.sidecar["case"].startswith("cross4")


def _is_map(case: Any) -> bool:
    return not _is_sequence(case)


def _leaves(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name.removeprefix("in/"): value.to(dtype).requires_grad_()
        for name, value in tensors.items()
        if name.startswith("in/")
    }


def _scan_sequence(recorded: dict[str, Tensor], softplus: bool) -> tuple[Tensor, Tensor]:
    """One route: recorded (b, d, L), (b, g, n, L) to our layout with K = 1; returns y (b, d, L), state (b, d, n)."""
    optional = {name: recorded[name].unsqueeze(0) if name in recorded else None for name in ("D", "delta_bias")}
    y, state = ops.selective_scan(
        recorded["u"].mT,
        recorded["delta"].mT.unsqueeze(2),
        recorded["A"].unsqueeze(0),
        recorded["B"].permute(0, 3, 1, 2).unsqueeze(2),
        recorded["C"].permute(0, 3, 1, 2).unsqueeze(2),
        optional["D"],
        dt_bias=optional["delta_bias"],
        z=recorded["z"].mT if "z" in recorded else None,
        initial_state=recorded["h0"].unsqueeze(1) if "h0" in recorded else None,
        dt_softplus=softplus,
        return_last_state=True,
    )
    return y.mT, state.squeeze(1)


@RUNS
@pytest.mark.cases(where=_is_sequence)
def test_sequence(case: Any, backend: str, dtype: torch.dtype, assert_recorded: Callable[..., None]) -> None:
    tensors = case.tensors()
    leaves = _leaves(tensors, dtype)
    with ops.use_backend(backend):
        y, state = _scan_sequence(leaves, case.sidecar["constructor"]["delta_softplus"])
        loss = (y * tensors["cotangent"]).sum()
        if "cotangent_last_state" in tensors:
            loss = loss + (state * tensors["cotangent_last_state"]).sum()
        loss.backward()
    assert y.dtype == dtype
    assert_recorded(case, "out/y", y, tensors["out/y"], EXACT)
    assert_recorded(case, "out/last_state", state, tensors["out/last_state"], EXACT)
    for name, leaf in leaves.items():
        assert_recorded(case, f"grad/{name}", leaf.grad, tensors[f"grad/{name}"], EXACT)


@pytest.mark.parametrize("dtype", HALF_ERROR, ids=str)
@pytest.mark.cases(where=lambda case: case.sidecar["case"].endswith("_half"))
def test_sequence_in_16_bits(case: Any, dtype: torch.dtype) -> None:
    tensors = case.tensors()
    leaves = _leaves(tensors, dtype)
    with ops.use_backend("torch"):
        y, _ = _scan_sequence(leaves, True)
        (y * tensors["cotangent"].to(dtype)).sum().backward()
    assert y.dtype == dtype
    errors = {"out/y": (y, HALF_ERROR[dtype])}
    errors |= {f"grad/{name}": (leaf.grad, 2 * HALF_ERROR[dtype]) for name, leaf in leaves.items()}
    for name, (value, limit) in errors.items():
        reference = tensors[name]
        error = (value.detach().double() - reference).norm() / reference.norm()
        assert error <= limit, f"{name}: relative L2 error {error:.3g}"


def _cross_arguments(recorded: dict[str, Tensor], sizes: dict[str, int]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Arguments of the op for the four-route form, and its named ones; projections happen outside of it."""
    routes, dim, rank, state = (sizes[name] for name in ("k_group", "dim", "dt_rank", "d_state"))
    x = recorded["x"].permute(0, 2, 3, 1)
    projected = torch.einsum("bhwe,kce->bhwkc", x, recorded["x_proj_weight"])
    dt, B, C = projected.split([rank, state, state], dim=-1)
    A = -recorded["A_logs"].exp().view(routes, dim, state)
    return [x, dt, A, B, C, recorded["Ds"].view(routes, dim)], {
        "dt_weight": recorded["dt_projs_weight"],
        "dt_bias": recorded["dt_projs_bias"],
    }


@RUNS
@pytest.mark.cases(where=_is_map)
def test_cross_scan(case: Any, backend: str, dtype: torch.dtype, assert_recorded: Callable[..., None]) -> None:
    tensors = case.tensors()
    leaves = _leaves(tensors, dtype)
    positional, named = _cross_arguments(leaves, case.sidecar["constructor"])
    with ops.use_backend(backend):
        y = ops.selective_scan(*positional, **named, routes=CROSS)
        (y.permute(0, 3, 1, 2) * tensors["cotangent"]).sum().backward()
    assert_recorded(case, "out/y", y, tensors["nhwc/y"], EXACT)
    for name, leaf in leaves.items():
        assert_recorded(case, f"grad/{name}", leaf.grad, tensors[f"grad/{name}"], EXACT)


@pytest.mark.cases(where=_is_map)
def test_each_route_alone(case: Any, assert_recorded: Callable[..., None]) -> None:
    """Order of the pixels, and the scan of one route at a time."""
    tensors = case.tensors()
    recorded = {name: leaf.detach() for name, leaf in _leaves(tensors, torch.float64).items()}
    (x, dt, A, B, C, D), named = _cross_arguments(recorded, case.sidecar["constructor"])
    for k, route in enumerate(CROSS):
        order = route_order(ROUTES[route], *x.shape[1:3], None, x.device)
        walked = x.flatten(1, 2)[:, order].mT  # (b, d, L)
        assert_recorded(case, "out/xs", walked, tensors["out/xs"][:, k], EXACT)
        one = slice(k, k + 1)
        with ops.use_backend("torch"):
            y = ops.selective_scan(
                x,
                dt[..., one, :],
                A[one],
                B[..., one, :],
                C[..., one, :],
                D[one],
                dt_weight=named["dt_weight"][one],
                dt_bias=named["dt_bias"][one],
                routes=[route],
            )
        assert_recorded(case, "out/ys", y.flatten(1, 2)[:, order].mT, tensors["out/ys"][:, k], EXACT)

"""Gated linear attention against recorded upstream results, values and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from subquad import ops

SYSTEM = "gated_linear_attention"

EXACT = 1e-9
"""Of the largest value: recorded results are float64, only the order of sums differs."""

RUNS = pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.float64), ("torch", torch.float64), ("torch", torch.float32)],
    ids=["reference-float64", "torch-float64", "torch-float32"],
)
NAMES = ("q", "k", "v", "g_forward", "g_backward")


def _attend(tensors: dict[str, Tensor]) -> Tensor:
    """Recorded (B, H, T, d) to our (B, T, H, d) and back."""
    q, k, v, *gates = (tensors[name].transpose(1, 2) for name in NAMES)
    return ops.gated_linear_attention(q, k, v, torch.stack(gates, dim=2)).transpose(1, 2)


@RUNS
def test_values_and_gradients(
    case: Any, backend: str, dtype: torch.dtype, assert_recorded: Callable[..., None]
) -> None:
    recorded = case.tensors()
    assert case.sidecar["constructor"]["scale"] == recorded["q"].shape[-1] ** -0.5
    leaves = {name: recorded[name].to(dtype).requires_grad_() for name in NAMES}
    with ops.use_backend(backend):
        out = _attend(leaves)
        (out * recorded["cotangent"]).sum().backward()
    assert out.dtype == dtype
    assert_recorded(case, "out/o", out, recorded["out/o"], EXACT)
    for name, leaf in leaves.items():
        if recorded[f"grad/{name}"].any() or leaf.grad.any():  # a single token's gates have no effect
            assert_recorded(case, f"grad/{name}", leaf.grad, recorded[f"grad/{name}"], EXACT)


@RUNS
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_one_direction(
    case: Any, direction: str, backend: str, dtype: torch.dtype, assert_recorded: Callable[..., None]
) -> None:
    """With decays of 0 in the other direction, that one gives each token's own term alone."""
    recorded = case.tensors()
    inputs = {name: recorded[name].to(dtype) for name in NAMES}
    other = {"forward": "g_backward", "backward": "g_forward"}[direction]
    inputs[other] = torch.full_like(inputs[other], -1e4)
    with ops.use_backend(backend):
        out = _attend(inputs)
    own = case.sidecar["constructor"]["scale"] * (inputs["q"] * inputs["k"]).sum(-1, keepdim=True) * inputs["v"]
    assert_recorded(case, f"out/o_{direction}", 2 * out - own, recorded[f"out/o_{direction}"], EXACT)

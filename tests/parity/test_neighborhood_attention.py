"""Neighborhood attention against recorded results: output, lse and the gradient of every argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from subquad import ops

SYSTEM = "na_op"

EXACT = 2e-7
"""Of the largest value: recorded results are float64 rounded to float32."""

NAMES = {"q": "q", "k": "k", "v": "v", "rpb": "rpb", "add_k": "additional_keys", "add_v": "additional_values"}
"""Recorded names to ours."""


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.float64), ("torch", torch.float64), ("torch", torch.float32)],
    ids=["reference-float64", "torch-float64", "torch-float32"],
)
def test_case(case: Any, backend: str, dtype: torch.dtype, assert_recorded: Callable[..., None]) -> None:
    tensors, constructor = case.tensors(), case.sidecar["constructor"]
    leaves = {name: tensors[name].to(dtype).requires_grad_() for name in NAMES if name in tensors}
    attend = {1: ops.na1d, 2: ops.na2d, 3: ops.na3d}[tensors["q"].dim() - 3]
    scale = constructor["scale"]
    with ops.use_backend(backend):
        o, lse = attend(
            **{NAMES[name]: leaf for name, leaf in leaves.items()},
            **{name: constructor[name] for name in ("kernel_size", "dilation", "stride", "is_causal")},
            scale=None if scale == "head_dim**-0.5" else scale,
            return_lse=True,
        )
        loss = (o * tensors["cotangent"]).sum()
        if "cotangent_lse" in tensors:
            loss = loss + (lse * tensors["cotangent_lse"]).sum()
        loss.backward()
    assert o.dtype == lse.dtype == dtype
    assert_recorded(case, "out", o, tensors["out"], EXACT)
    assert_recorded(case, "lse", lse, tensors["lse"], EXACT)
    assert {f"grad/{name}" for name in leaves} == {name for name in tensors if name.startswith("grad/")}
    for name, leaf in leaves.items():
        assert_recorded(case, f"grad/{name}", leaf.grad, tensors[f"grad/{name}"], EXACT)

"""Region attention against recorded results: output and the gradient of every argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from subquad import ops

SYSTEM = "region_attention"

EXACT = 2e-7
"""Of the largest value: recorded results are float64 rounded to float32."""


@pytest.mark.cases(where=lambda case: not case.sidecar["case"].startswith("module_"))
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.float64), ("torch", torch.float64), ("torch", torch.float32)],
    ids=["reference-float64", "torch-float64", "torch-float32"],
)
def test_op(case: Any, backend: str, dtype: torch.dtype, assert_recorded: Callable[..., None]) -> None:
    tensors, constructor = case.tensors(), case.sidecar["constructor"]
    assert constructor["scale"] == "head_dim**-0.5"
    # recorded with the heads in front of the map
    leaves = {name: tensors[name].to(dtype).permute(0, 2, 3, 1, 4).requires_grad_() for name in "qkv"}
    for leaf in leaves.values():
        leaf.retain_grad()
    with ops.use_backend(backend):
        o = ops.region_attention(
            **leaves, regions=tensors["idx"], **{name: constructor[name] for name in ("region_size", "kv_region_size")}
        )
        (o * tensors["cotangent"].permute(0, 2, 3, 1, 4)).sum().backward()
    assert o.dtype == dtype
    assert_recorded(case, "out", o.permute(0, 3, 1, 2, 4), tensors["out"], EXACT)
    for name, leaf in leaves.items():
        assert_recorded(case, f"grad/{name}", leaf.grad.permute(0, 3, 1, 2, 4), tensors[f"grad/{name}"], EXACT)

"""Neighborhood attention against recorded results: output, lse and the gradient of every argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from subquad import ops

SYSTEM = "na_op"

EXACT = 2e-7
"""Of the largest value: recorded results are float64 rounded to float32."""

NAMES = {"q": "q", "k": "k", "v": "v", "rpb": "rpb", "add_k": "additional_keys", "add_v": "additional_values"}
"""Recorded names to ours."""


Arguments = dict[str, Any]


def _fused(axes: int, tensors: Arguments, window: Arguments, scale: float | None) -> tuple[Tensor, Tensor]:
    return getattr(ops, f"na{axes}d")(**tensors, **window, scale=scale, return_lse=True)


def _split(axes: int, tensors: Arguments, window: Arguments, scale: float | None) -> tuple[Tensor, Tensor]:
    """The same through the logits and a softmax."""
    of_keys = {name: tensors[name] for name in ("q", "k", "rpb", "additional_keys") if name in tensors}
    of_values = {name: tensors[name] for name in ("v", "additional_values") if name in tensors}
    logits = getattr(ops, f"na{axes}d_qk")(**of_keys, **window, scale=scale)
    return getattr(ops, f"na{axes}d_av")(logits.softmax(-1), **of_values, **window), logits.logsumexp(-1)


@pytest.mark.parametrize("attend", [_fused, _split])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.float64), ("torch", torch.float64), ("torch", torch.float32)],
    ids=["reference-float64", "torch-float64", "torch-float32"],
)
def test_case(
    case: Any,
    backend: str,
    dtype: torch.dtype,
    attend: Callable[..., tuple[Tensor, Tensor]],
    assert_recorded: Callable[..., None],
) -> None:
    tensors, constructor = case.tensors(), case.sidecar["constructor"]
    leaves = {name: tensors[name].to(dtype).requires_grad_() for name in NAMES if name in tensors}
    window = {name: constructor[name] for name in ("kernel_size", "dilation", "stride", "is_causal")}
    scale = constructor["scale"]
    with ops.use_backend(backend):
        o, lse = attend(
            tensors["q"].dim() - 3,
            {NAMES[name]: leaf for name, leaf in leaves.items()},
            window,
            None if scale == "head_dim**-0.5" else scale,
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

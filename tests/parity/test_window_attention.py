"""Window attention against recorded results: the op with every gradient, and timm's Swin block patched to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock

from subquad import ops
from subquad.ops.window_attention import patch

SYSTEM = "window_attention"

EXACT = 2e-7
"""Of the largest value: recorded results are float64 rounded to float32."""

NAMES = ("q", "k", "v", "table", "pad_k", "pad_v")


def _is_op(case: Any) -> bool:
    return case.sidecar["case"].startswith("op_")


@pytest.mark.cases(where=_is_op)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.float64), ("torch", torch.float64), ("torch", torch.float32)],
    ids=["reference-float64", "torch-float64", "torch-float32"],
)
def test_op(case: Any, backend: str, dtype: torch.dtype, assert_recorded: Callable[..., None]) -> None:
    tensors, constructor = case.tensors(), case.sidecar["constructor"]
    assert constructor["scale"] == "head_dim**-0.5"
    leaves = {name: tensors[name].to(dtype).requires_grad_() for name in NAMES if name in tensors}
    with ops.use_backend(backend):
        o = ops.window_attention(
            **leaves,
            window=constructor["window_size"],
            shift=constructor["shift_size"],
            order=constructor.get("order", "roll_pad"),
        )
        (o * tensors["cotangent"]).sum().backward()
    assert o.dtype == dtype
    assert_recorded(case, "out", o, tensors["out"], EXACT)
    assert {f"grad/{name}" for name in leaves} == {name for name in tensors if name.startswith("grad/")}
    for name, leaf in leaves.items():
        recorded = tensors[f"grad/{name}"]
        if recorded.any():
            assert_recorded(case, f"grad/{name}", leaf.grad, recorded, EXACT)
        else:  # of padding that is not there
            assert leaf.grad is not None and not leaf.grad.any()


@pytest.mark.cases(where=lambda case: not _is_op(case))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_patched_block(case: Any, dtype: torch.dtype, assert_recorded: Callable[..., None]) -> None:
    tensors = case.tensors()
    arguments = {name: value for name, value in case.sidecar["constructor"].items() if name != "class"}
    block = patch(SwinTransformerBlock(**arguments, dtype=dtype)).eval()
    assert [list(size) for size in (block.window_size, block.shift_size)] == list(case.sidecar["resolved"].values())
    state = {name.removeprefix("state/"): value for name, value in tensors.items() if name.startswith("state/")}
    block.load_state_dict(state)
    image = tensors["input"].to(dtype).requires_grad_()
    y = block(image)
    if dtype == torch.float64:  # no noise floor is stated for it
        assert_recorded(case, "out/attn", block._attn(block.norm1(image)), tensors["out/attn"], EXACT)
    assert_recorded(case, "out/block", y, tensors["out/block"], EXACT)
    if not case.has_gradients:
        return
    (y * tensors["cotangent"]).sum().backward()
    leaves = dict(block.named_parameters()) | {"input": image}
    assert {f"grad/{name}" for name in leaves} == {name for name in tensors if name.startswith("grad/")}
    for name, leaf in leaves.items():
        assert_recorded(case, f"grad/{name}", leaf.grad, tensors[f"grad/{name}"], EXACT)

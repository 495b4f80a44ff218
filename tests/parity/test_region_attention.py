"""Region attention against recorded results: output and the gradient of every argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from subquad import ops
from subquad.backbones.bilevel import BiLevelRoutingAttention

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


@pytest.mark.cases(where=lambda case: case.sidecar["case"].startswith("module_"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_module(case: Any, dtype: torch.dtype, assert_recorded: Callable[..., None]) -> None:
    """Routing, attention and the convolution of the values, with the gradient of every weight."""
    tensors, constructor = case.tensors(), case.sidecar["constructor"]
    channels_first = constructor["class"] == "nchwBRA"
    module = BiLevelRoutingAttention(
        constructor["dim"],
        constructor["num_heads"],
        constructor["n_win"],
        constructor["topk"],
        qk_dim=constructor.get("qk_dim"),
        lepe_size=constructor["side_dwconv"],
        ragged=channels_first,
        kv_pool=constructor.get("kv_downsample_mode", "identity"),
        kv_pool_size=constructor.get("kv_downsample_ratio", 1),
        **{name: constructor.get(name, False) for name in ("soft_routing", "diff_routing", "param_routing")},
        dtype=dtype,
    )
    names = {name: _name(name.removeprefix("state/")) for name in tensors if name.startswith("state/")}
    module.load_state_dict({ours: tensors[name].view_as(module.get_parameter(ours)) for name, ours in names.items()})
    image = tensors["input"].to(dtype).requires_grad_()
    y = module(image.permute(0, 2, 3, 1) if channels_first else image)
    y = y.permute(0, 3, 1, 2) if channels_first else y
    (y * tensors["cotangent"]).sum().backward()
    assert_recorded(case, "out", y, tensors["out"], EXACT)
    if dtype == torch.float64:  # no noise floor is stated for gradients
        assert_recorded(case, "grad/input", image.grad, tensors["grad/input"], EXACT)
        for name, ours in names.items():
            grad, recorded = module.get_parameter(ours).grad, tensors[name.replace("state/", "grad/")]
            assert_recorded(case, ours, grad.view_as(recorded), recorded, EXACT)


def _name(official: str) -> str:
    """As in a whole model, whose names ``checkpoint_filter_fn`` maps."""
    for theirs, ours in (("qkv.qkv", "qkv"), ("qkv_linear", "qkv"), ("wo", "proj"), ("output_linear", "proj")):
        official = official.replace(f"{theirs}.", f"{ours}.")
    return official.replace("router.emb", "router")

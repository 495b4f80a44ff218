"""Models of timm and torchvision patched to window attention: the same values, gradients and state, and back again."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.models.davit import DaVit
from timm.models.gcvit import GlobalContextVit, GlobalContextVitBlock
from timm.models.hieradet_sam2 import HieraDet
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.tiny_vit import TinyVit
from timm.models.twins import Twins
from torch import Tensor, nn
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    ShiftedWindowAttentionV2,
    SwinTransformerBlockV2,
)

import subquad
from subquad import ops
from subquad.ops.window_attention import patch, unpatch

EXACT = 1e-10
"""Of the largest value, in float64: only the order of operations differs, over a whole model."""

_SWIN: dict[str, Any] = {"embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5, "mlp_ratio": 1.0}


def _swin(**options: Any) -> nn.Module:
    return SwinTransformer(**(_SWIN | {"img_size": 56, "window_size": 4} | options))


def _swin_v2(**options: Any) -> nn.Module:
    return SwinTransformerV2(**(_SWIN | {"img_size": 56, "window_size": 4} | options))


def _maxvit(rel_pos: str, block: str = "M", **options: Any) -> nn.Module:
    transformer = MaxxVitTransformerCfg(
        dim_head=8, window_size=(4, 4), grid_size=(4, 4), rel_pos_type=rel_pos, **options
    )
    cfg = MaxxVitCfg(
        embed_dim=(16, 32), depths=(1, 1), block_type=(block, block), stem_width=16, transformer_cfg=transformer
    )
    return MaxxVit(cfg, img_size=64, num_classes=5)


def _tiny_vit() -> nn.Module:
    return TinyVit(num_classes=5, embed_dims=(8, 8, 16), depths=(1, 2, 1), num_heads=(2, 2, 2), window_sizes=(4, 4, 4))


def _torchvision(v2: bool = False) -> nn.Module:
    options = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if v2 else {}
    return torchvision.models.SwinTransformer(
        [4, 4], 8, [2, 2], [2, 4], [4, 4], num_classes=5, stochastic_depth_prob=0.0, **options
    )


# name: (model, image size, patched modules)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int], int]] = {
    "swin": (lambda: _swin(img_size=64), (64, 64), 4),
    "swin ragged": (_swin, (56, 56), 4),
    "swin one window": (lambda: _swin(img_size=(16, 32)), (16, 32), 4),
    "swin always": (lambda: _swin(img_size=24, always_partition=True), (24, 24), 4),
    "swin any size": (lambda: _swin(strict_img_size=False), (44, 72), 4),
    "swin without bias": (lambda: _swin(qkv_bias=False), (56, 56), 4),
    "swin_v2": (lambda: _swin_v2(img_size=64), (64, 64), 4),
    "swin_v2 any size": (lambda: _swin_v2(strict_img_size=False), (44, 72), 4),
    "swin_v2 without bias": (lambda: _swin_v2(qkv_bias=False, img_size=64), (64, 64), 4),
    "davit": (
        lambda: DaVit(depths=(1, 1), embed_dims=(8, 16), num_heads=(2, 2), window_size=4, num_classes=5),
        (40, 56),
        2,
    ),
    "twins": (
        lambda: Twins(
            56,
            4,
            embed_dims=(8, 16),
            num_heads=(2, 2),
            mlp_ratios=(1, 1),
            depths=(2, 2),
            sr_ratios=(2, 1),
            wss=(4, 4),
            num_classes=5,
        ),
        (56, 56),
        2,
    ),
    "maxvit table": (lambda: _maxvit("bias"), (64, 64), 4),
    "maxvit tensorflow": (lambda: _maxvit("bias_tf"), (64, 64), 4),
    "maxvit channels first": (lambda: _maxvit("bias_tf", use_nchw_attn=True), (64, 64), 4),
    "maxvit heads second": (lambda: _maxvit("bias", head_first=False), (64, 64), 4),
    "maxvit mlp": (lambda: _maxvit("mlp"), (64, 64), 4),
    "maxvit parallel": (lambda: _maxvit("bias", "PM"), (64, 64), 2),
    "tiny_vit ragged": (lambda: _tiny_vit(), (40, 56), 3),
    "tiny_vit one window": (lambda: _tiny_vit(), (32, 32), 3),
    # every other block has global queries
    "gcvit": (
        lambda: GlobalContextVit(
            img_size=64,
            num_classes=5,
            window_size=(4, 4, 4, 2),
            embed_dim=8,
            depths=(2, 2, 3, 2),
            num_heads=(1, 2, 2, 4),
            mlp_ratio=1.0,
        ),
        (64, 64),
        5,
    ),
    # the first block of the second stage pools its queries, the last one attends to the whole map
    "sam2_hiera": (
        lambda: HieraDet(
            num_classes=5,
            embed_dim=8,
            num_heads=1,
            stages=(1, 2, 2, 1),
            window_spec=(4, 4, 3, 2),
            global_att_blocks=(5,),
            global_pos_size=(4, 4),
            q_pool=1,
        ),
        (64, 80),
        4,
    ),
    "torchvision": (_torchvision, (44, 72), 4),
    "torchvision one window": (_torchvision, (16, 40), 4),
    "torchvision v2": (lambda: _torchvision(v2=True), (44, 72), 4),
}
models = pytest.mark.parametrize(("build", "size", "count"), MODELS.values(), ids=MODELS.keys())


def _randomise(model: nn.Module) -> nn.Module:
    """Weights large enough for every parameter to matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 if parameter.dim() > 1 else 1.0
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=scale)
    return model.double().eval()


def _results(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    image = image.detach().requires_grad_()
    y = model.eval()(image)  # TinyViT forgets the bias, with its graph, that it keeps in evaluation
    leaves = dict(model.named_parameters()) | {"image": image}
    grads = torch.autograd.grad(y, list(leaves.values()), torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def _patched(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if {"forward", "_attn", "_partition_attn", "_window_attn"} & vars(module).keys()
    ]


@models
def test_values_gradients_and_state_are_the_same(
    build: Callable[[], nn.Module], size: tuple[int, int], count: int
) -> None:
    torch.manual_seed(0)
    model = _randomise(build())
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    expected, names = _results(model, image), list(model.state_dict())
    assert patch(model) is model
    assert len(_patched(model)) == count
    assert list(model.state_dict()) == names
    mine = _results(model, image)
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        error = (mine[name] - value).abs().max()
        assert error <= EXACT * max(value.abs().max(), 1.0), f"{name}: off by {error:.3g}"
    assert unpatch(model) is model
    assert not _patched(model)
    assert all(torch.equal(value, expected[name]) for name, value in _results(model, image).items())


def test_patched_models_compute_with_the_op() -> None:
    model = patch(_swin())
    with ops.use_backend("triton"), pytest.raises(ValueError, match="window_attention: no implementation"):
        model(torch.randn(1, 3, 56, 56))
    assert ops.window_attention.patch is patch  # type: ignore[attr-defined]
    assert subquad.ops.window_attention.unpatch is unpatch  # type: ignore[attr-defined]


def test_released_model_of_timm() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224").eval()
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, mine = model(image), patch(model)(image)
    assert len(_patched(model)) == 12
    # float32 over 12 blocks: rounding alone is near 1e-6
    torch.testing.assert_close(mine, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_a_new_input_size_and_new_weights_are_seen() -> None:
    model = patch(_randomise(_swin()))
    twin = unpatch(copy.deepcopy(model))
    for each in (model, twin):
        each.set_input_size(img_size=(72, 48), window_size=(3, 4))
    image = torch.randn(1, 3, 72, 48, dtype=torch.float64)
    torch.testing.assert_close(model(image), twin(image), rtol=EXACT, atol=EXACT)


def test_patched_models_are_copied_pickled_and_compiled() -> None:
    model = patch(_randomise(_swin()))
    image = torch.randn(1, 3, 56, 56, dtype=torch.float64)
    expected = model(image)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert len(_patched(other)) == 4
        torch.testing.assert_close(other(image), expected, rtol=0, atol=0)
        with torch.no_grad():
            other.head.fc.bias.add_(1.0)
            other.layers[0].blocks[0].attn.proj.weight.zero_()
        assert not torch.equal(other(image), expected)
        torch.testing.assert_close(model(image), expected, rtol=0, atol=0)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image), expected, rtol=EXACT, atol=EXACT)


def test_patching_twice_changes_nothing_more() -> None:
    model = patch(patch(_swin()))
    assert len(_patched(model)) == 4
    assert not _patched(unpatch(unpatch(model)))


def test_autocast_gives_what_timm_gives() -> None:
    model = _randomise(_swin()).float()
    image = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        exact = model(image)
        with torch.autocast("cpu", torch.bfloat16):
            theirs = model(image)
            mine = patch(model)(image)
    assert mine.dtype == theirs.dtype
    # twice their own error: both round to bfloat16, at other places
    assert (mine - exact).norm() <= 2 * (theirs - exact).norm()


def test_bad_models() -> None:
    with pytest.raises(TypeError, match="patch: expected a model, got 'swin'"):
        patch("swin")  # type: ignore[type-var]
    with pytest.raises(ValueError, match="patch: found no windowed attention in ResNet"):
        patch(timm.create_model("resnet10t"))
    block = patch(GlobalContextVitBlock(8, feat_size=(8, 8), num_heads=2, window_size=(4, 2), use_global=False))
    with pytest.raises(ValueError, match="windows of 4 x 2 must divide the map, got 8 x 7"):
        block(torch.randn(1, 8, 7, 8))
    model = _swin(attn_drop_rate=0.25)
    with pytest.raises(ValueError, match=r"SwinTransformerBlock drops attention weights with probability 0\.25"):
        patch(model)
    assert not _patched(model)

    class Own(ShiftedWindowAttentionV2):
        """A subclass may compute something else."""

    with pytest.raises(ValueError, match="found no windowed attention in Own"):
        patch(Own(8, [4, 4], [2, 2], 2))

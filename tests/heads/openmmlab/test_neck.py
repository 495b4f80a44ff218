"""``SimpleFeaturePyramid`` behind isotropic backbones, of ours and of timm."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("mmengine", reason='needs mmengine: pip install "subquad[mm]"')

from mmengine.registry import MODELS

from subquad.heads.openmmlab import SimpleFeaturePyramid


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_isotropic", {"out_indices": (2,)}),
        ("test_vit", {"out_indices": (5,), "model_args": {"dynamic_img_size": True}}),
    ],
    ids=["ours", "timm"],
)
def test_five_maps_of_one(name: str, options: dict[str, Any]) -> None:
    backbone = MODELS.build({"type": "SubquadBackbone", "model_name": name, **options})
    neck = MODELS.build({"type": "SimpleFeaturePyramid", "in_channels": list(backbone.channels), "out_channels": 8})
    outs = neck(backbone(torch.randn(1, 3, 64, 96)))
    stride = backbone.strides[0]
    side = (64 // stride, 96 // stride)
    halves = (side[0] // 2, side[1] // 2)
    fifth = tuple((size + 1) // 2 for size in halves)
    sizes = [tuple(4 * s for s in side), tuple(2 * s for s in side), side, halves, fifth]
    assert [tuple(y.shape) for y in outs] == [(1, 8, *size) for size in sizes]
    assert all(y.is_contiguous() for y in outs)
    sum(y.square().mean() for y in outs).backward()
    assert [n for n, p in (*backbone.named_parameters(), *neck.named_parameters()) if p.grad is None] == []


def test_takes_the_last_map() -> None:
    neck = SimpleFeaturePyramid(6, 4, num_outs=4)
    maps = [torch.randn(1, 6, 5, 7) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(neck(maps), neck(maps[1:]), strict=True))
    assert len(neck(maps)) == 4


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="num_outs must be 4 or 5, got 6"):
        SimpleFeaturePyramid(8, num_outs=6)
    with pytest.raises(ValueError, match=r"one map, got in_channels=\[8, 8\]"):
        SimpleFeaturePyramid([8, 8])

"""RAVLT, MAViT and NaLaFormer: what the recorded cases of tests/parity do not say."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from subquad.backbones import weights
from subquad.backbones.base import Pyramid
from subquad.backbones.nalaformer import norm_aware_features

FAMILIES = ["ravlt", "mavit", "nalaformer"]
families = pytest.mark.parametrize("family", FAMILIES)


def _class(family: str) -> type[Pyramid]:
    return type(timm.create_model(f"test_{family}", device="meta"))  # type: ignore[return-value]


@families
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": (1, 2, 2)}, "one entry a stage.*num_heads"),
        ({"num_heads": 2}, "one entry a stage.*num_heads=2"),
        ({"depths": (0, 1, 1, 1)}, r"depths must be positive, got \(0, 1, 1, 1\)"),
        ({"num_heads": (3, 2, 2, 2)}, "3 heads for 8 channels"),
        ({"num_heads": (4, 2, 2, 2)}, "heads of a multiple of 4 channels, got 8 over 4"),
        ({"linear": (True, False)}, "linear must have one entry for each of 4 stages"),
        ({"linear": (True, [True, False], True, True)}, "linear must have one entry for each of 1 blocks"),
        ({"mlp_ratio": (2, 2)}, "mlp_ratio must have one entry for each of 4 stages"),
        ({"layer_scale": (1.0,)}, "layer_scale must have one entry"),
    ],
)
def test_options_that_cannot_be_built(family: str, options: dict[str, object], message: str) -> None:
    good = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 2)}
    with pytest.raises(ValueError, match=message):
        _class(family)(**(good | options))  # type: ignore[arg-type]


@families
def test_one_instance_from_224_to_detection_size(family: str) -> None:
    """The rotary tables are made for the map at hand, the projection head pools any map."""
    model = timm.create_model(f"test_{family}", features_only=True).eval()
    with torch.no_grad():
        for size in ((224, 224), (384, 512), (160, 96), (800, 1333)):
            maps = model(torch.randn(1, 3, *size))
            assert [tuple(x.shape[2:]) for x in maps] == [
                tuple(-(-side // reduction) for side in size) for reduction in (4, 8, 16, 32)
            ]


@families
def test_convolutions_start_as_linear_layers_do(family: str) -> None:
    model = timm.create_model(f"test_{family}")
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert all((module.bias == 0).all() for module in convolutions)
    spread = torch.cat([module.weight.flatten() for module in convolutions]).std()
    assert 0.019 < spread < 0.021


@families
def test_pruned_head_hands_the_map_on(family: str) -> None:
    model = timm.create_model(f"test_{family}")
    model.prune_intermediate_layers([1])
    assert model.head_hidden_size == model.num_features == 16
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 8, 8, 16)


@families
def test_averaged_weights_are_there_on_request(family: str) -> None:
    model = timm.create_model(f"test_{family}")
    checkpoint = {"model_ema": {"x": torch.zeros(1)}, "model": {"x": torch.ones(1)}}
    assert weights.wrapper_for(model, checkpoint) == "model"
    assert weights.wrapper_for(model, checkpoint, "model_ema") == "model_ema"
    assert weights.wrapper_for(model, {"model_ema": checkpoint["model_ema"]}) == "model_ema"


def test_queries_without_a_direction() -> None:
    """The official code divides 0 by 0 there, in its forward pass."""
    q, k = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2, 8)
    q[:, 1] = 0
    q[:, 2] *= 1e-15  # whose square float32 holds barely
    queries, keys = norm_aware_features(q.requires_grad_(), k.requires_grad_())
    (queries.sum() + keys.sum()).backward()
    assert not queries[:, 1].any()
    exact, _ = norm_aware_features(q.detach().double(), k.detach().double())
    torch.testing.assert_close(queries.double(), exact, rtol=1e-5, atol=1e-7)
    assert q.grad is not None and q.grad.isfinite().all()


def test_keys_beyond_the_range_of_float16() -> None:
    """41 to the third power is."""
    _, keys = norm_aware_features(torch.ones(1, 1, 1, 4).half(), torch.full((1, 1, 1, 4), -100.0).half())
    assert keys.dtype == torch.float32 and torch.equal(keys[..., 4:], torch.full((1, 1, 1, 4), 1e6))

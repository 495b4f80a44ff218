"""Isotropic NAT: what the recorded cases of tests/parity do not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.backbones import weights
from subquad.backbones.nat_isotropic import FullAttention, IsotropicNAT

SMALL: dict[str, Any] = {"dim": 16, "depth": 2, "num_heads": 2, "img_size": 64, "num_classes": 5}


def _official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the official names, with the index that is kept beside a table of full attention."""
    official = weights.rename(state, [(r"^stem\.", "patch_embed."), (r"^blocks\.", "layers.")])
    return official | {"layers.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64)}


@pytest.mark.parametrize("kernel_size", [3, None], ids=["neighborhood", "full"])
def test_official_checkpoints(kernel_size: int | None, tmp_path: Path) -> None:
    models = [IsotropicNAT(**SMALL, kernel_size=kernel_size) for _ in range(2)]
    torch.save(_official(models[0].state_dict()), tmp_path / "official.pth")
    weights.load_checkpoint(models[1], tmp_path / "official.pth")
    assert all(torch.equal(value, models[0].state_dict()[name]) for name, value in models[1].state_dict().items())


def test_full_attention_of_any_map() -> None:
    """One pair of tokens at a time; the table of a map of 3 x 3 pixels, resampled for 2 x 4."""
    torch.manual_seed(0)
    attention = FullAttention(8, 2, 3, dtype=torch.float64)
    torch.nn.init.normal_(attention.rpb)
    x = torch.randn(1, 2, 4, 8, dtype=torch.float64)
    table = F.interpolate(attention.rpb[None], size=(3, 7), mode="bicubic")[0]
    q, k, v = attention.qkv(x).view(8, 3, 2, 4).unbind(1)  # (tokens, heads, d)
    o = torch.zeros(8, 2, 4, dtype=torch.float64)
    for i in range(8):
        bias = [table[:, j // 4 - i // 4 + 1, j % 4 - i % 4 + 3] for j in range(8)]
        logits = torch.stack([(q[i] * k[j]).sum(-1) / 2 + bias[j] for j in range(8)])
        o[i] = (logits.softmax(0)[..., None] * v).sum(0)
    expected = attention.proj(o.flatten(1)).view(1, 2, 4, 8)
    torch.testing.assert_close(attention(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [3, None], ids=["neighborhood", "full"])
@pytest.mark.parametrize("size", [(64, 64), (33, 80), (20, 130)], ids=str)
def test_any_size(kernel_size: int | None, size: tuple[int, int]) -> None:
    model = IsotropicNAT(**SMALL, kernel_size=kernel_size, dilation=2).eval()
    image = torch.randn(2, 3, *size)
    rows, columns = -(-size[0] // 16), -(-size[1] // 16)
    assert model.forward_intermediates(image, intermediates_only=True)[-1].shape == (2, 16, rows, columns)
    assert model(image).isfinite().all()


def test_every_other_block_is_dilated() -> None:
    model = timm.create_model("dinat_isotropic_small", device="meta")
    assert [block.attn.dilation for block in model.blocks] == [[1, 1], [2, 2]] * 6


def test_no_weight_decay_of_the_bias_tables() -> None:
    for kernel_size in (3, None):
        names = IsotropicNAT(**SMALL, kernel_size=kernel_size).no_weight_decay()
        assert names == {"blocks.0.attn.rpb", "blocks.1.attn.rpb"}


def test_small_maps_without_padding_are_an_error() -> None:
    model = IsotropicNAT(**SMALL, kernel_size=5, pad_small_maps=False)
    with pytest.raises(ValueError, match=r"at most the map's 4, got 5 \* 1 = 5"):
        model(torch.randn(1, 3, 64, 80))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "5 heads for 384 channels"),
        ({"kernel_size": 0}, "kernel_size must be a positive integer, got 0"),
        ({"dilation": 0}, "dilation and patch_size must be positive.*got dilation=0"),
        ({"img_size": 8}, "img_size at least a patch.*img_size=8"),
        ({"depth": 0}, r"depths must be positive, got \(0,\)"),
    ],
)
def test_options_that_cannot_be_built(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IsotropicNAT(**options)

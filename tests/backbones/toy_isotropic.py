"""A tiny isotropic model, registered only under test: it stands for the families that will build on ``Isotropic``."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath, Mlp
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from subquad.backbones import weights
from subquad.backbones.base import Isotropic
from subquad.backbones.registry import register_variants


class PatchStem(nn.Module):
    """Images to patches, (B, H / 8, W / 8, dim)."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 8, stride=8, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).permute(0, 2, 3, 1)


class ToyBlock(nn.Module):
    """Mixes the map with a depthwise convolution, so that it needs height and width, and each token with the prefix."""

    def __init__(self, dim: int, prefix: int, drop_path: float, **dd: Any) -> None:
        super().__init__()
        self.prefix = prefix
        self.norm = nn.LayerNorm(dim, **dd)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.mlp = Mlp(dim, 2 * dim, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        y = self.norm(x)
        prefix, patches = y[:, : self.prefix], y[:, self.prefix :]
        patches = self.conv(patches.transpose(1, 2).unflatten(2, (height, width))).flatten(2).transpose(1, 2)
        y = torch.cat([prefix + patches.mean(1, keepdim=True), patches], dim=1)
        return x + self.drop_path(self.mlp(y))


class ToyIsotropic(Isotropic):
    """Two patches-and-tokens layouts: with a class token and a position embedding, or with neither."""

    def __init__(self, prefix: int = 1, pos: bool = True, dim: int = 16, depth: int = 3, **isotropic: Any) -> None:
        dd = {name: isotropic.get(name) for name in ("device", "dtype")}

        def block(dim: int, drop_path: float, **dd: Any) -> nn.Module:
            return ToyBlock(dim, prefix, drop_path, **dd)

        super().__init__(
            PatchStem(isotropic.get("in_chans", 3), dim, **dd),
            block,
            dim=dim,
            depth=depth,
            reduction=8,
            norm=nn.LayerNorm,
            pos_grid=(8, 8) if pos else None,
            num_prefix_tokens=prefix,
            **{"global_pool": "token" if prefix else "avg"} | isotropic,
        )


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    return weights.unwrap(state_dict)


_CFG = {"input_size": (3, 64, 64), "first_conv": "stem.conv", "classifier": "head"}
default_cfgs = generate_default_cfgs({"test_isotropic.untrained": _CFG, "test_isotropic_plain.untrained": _CFG})

register_variants(
    __name__,
    ToyIsotropic,
    {"test_isotropic": {"prefix": 1, "pos": True}, "test_isotropic_plain": {"prefix": 0, "pos": False}},
    checkpoint_filter_fn,
    out_indices=(0, 1, 2),
)

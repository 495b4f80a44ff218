"""NAT (arXiv 2204.07143): attention of every token to the window around it; DiNAT (2209.15001) dilates every other one.

DiNAT_s is DiNAT in the frame of Swin.

Official code and weights: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer.
"""

# Annotations are not postponed: torch.fx copies those of forward() into code that TorchScript has to understand.

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from timm.models import generate_default_cfgs
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from subquad.backbones.base import Factory, Pyramid, StageSpec
from subquad.backbones.layers import MapConv2d, PatchEmbed, check_heads, in_turn
from subquad.backbones.neighborhood import (
    Block,
    bias_tables,
    cfg,
    check_kernel,
    checkpoint_filter_fn,
    dilated_cfg,
    neighborhood,
)
from subquad.backbones.norms import LayerNorm, StreamNorm
from subquad.backbones.registry import register_variants

__all__ = ["NAT", "NATBlock"]


class NATBlock(Block):
    """The block of NAT, on maps."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        kernel_size: int,
        dilation: int = 1,
        pad_small_maps: bool = True,
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        **dd: Any,
    ) -> None:
        attn = neighborhood(dim, num_heads, kernel_size, dilation, pad_small_maps, **dd)
        super().__init__(dim, attn, mlp_ratio, layer_scale, drop_path, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.norm2(x, self.drop_path(self.ls1(self.attn(self.norm1(x)))))
        return x + self.drop_path(self.ls2(self.mlp(y)))


class Stem(nn.Module):
    """Images (B, C, H, W) to (B, ceil(H / 4), ceil(W / 4), dim) by two convolutions with nothing between them."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm = StreamNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv2(self.conv1(x)).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """Convolution of stride 2, norm: (B, H, W, in_dim) to (B, ceil(H / 2), ceil(W / 2), dim)."""

    def __init__(self, in_dim: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.reduction = MapConv2d(in_dim, dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm = StreamNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x))


FRAMES: dict[str, tuple[Factory, Factory]] = {
    "conv": (Stem, Downsample),
    "patch": (partial(PatchEmbed, patch_size=4, norm=StreamNorm), partial(PatchMerging, norm_layer=LayerNorm)),
}
"""Stem, and what is between stages."""


class NAT(Pyramid):
    """NAT and, with dilations, DiNAT and DiNAT_s; the channels double from stage to stage.

    Args:
        depths: blocks of each stage.
        embed_dim: channels of the first stage, even.
        num_heads: heads of each stage.
        kernel_size: side of the windows.
        dilations: for each stage the dilation of each block; None for 1 everywhere. Weights fit any: the released
            detectors and segmentors have others than the classifiers that they start from.
        frame: ``"conv"`` for overlapping convolutions as stem and between stages, ``"patch"`` for patches, as in Swin.
        pad_small_maps: see ``neighborhood``.
        mlp_ratio: hidden size of the MLP over the channels.
        layer_scale: initial scale of every residual branch; None for no scales.
        in_chans, device, dtype, pyramid: arguments of ``Pyramid``.

    Raises:
        ValueError: for a size that cannot be built, naming it.
        TypeError: for an unknown argument.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 5),
        embed_dim: int = 64,
        num_heads: Sequence[int] = (2, 4, 8, 16),
        *,
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        frame: Literal["conv", "patch"] = "conv",
        pad_small_maps: bool = True,
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        in_chans: int = 3,
        device: Any = None,
        dtype: Any = None,
        **pyramid: Any,
    ) -> None:
        dims = [embed_dim * 2**i for i in range(len(depths))]
        check_heads(depths, dims, num_heads)
        if embed_dim % 2:
            raise ValueError(f"embed_dim must be even, got {embed_dim}")
        if frame not in FRAMES:
            raise ValueError(f"unknown frame {frame!r}, expected one of {list(FRAMES)}")
        check_kernel(kernel_size)
        if dilations is None:
            dilations = [[1] * depth for depth in depths]
        _check_dilations(dilations, depths)
        dd = {"device": device, "dtype": dtype}
        stem, downsample = FRAMES[frame]
        block = partial(
            NATBlock,
            kernel_size=kernel_size,
            pad_small_maps=pad_small_maps,
            mlp_ratio=mlp_ratio,
            layer_scale=layer_scale,
        )
        super().__init__(
            stem=stem(in_chans, embed_dim, **dd),
            stages=[
                StageSpec(
                    dims[i],
                    depths[i],
                    reduction=4 * 2**i,
                    block=in_turn([partial(block, num_heads=num_heads[i], dilation=dilation) for dilation in stage]),
                    downsample=downsample if i else None,
                )
                for i, stage in enumerate(dilations)
            ],
            norm=StreamNorm,
            in_chans=in_chans,
            **dd,
            **pyramid,
        )

    def no_weight_decay(self) -> set[str]:
        """The bias tables, as in the official training."""
        return bias_tables(self)


def _check_dilations(dilations: Any, depths: Sequence[int]) -> None:
    """Raises ValueError unless every block of every stage has a dilation."""
    nested = isinstance(dilations, Sequence) and all(isinstance(stage, Sequence) for stage in dilations)
    if (
        not nested
        or [len(stage) for stage in dilations] != list(depths)
        or not all(isinstance(entry, int) and entry >= 1 for stage in dilations for entry in stage)
    ):
        raise ValueError(f"dilations must be positive, one a block of depths={tuple(depths)}, got {dilations!r}")


# Variants --------------------------------------------------------------------------------------------------------


_patch_cfg = partial(dilated_cfg, first_conv="stem.proj")
_384: dict[str, Any] = {"size": 384, "crop_pct": 1.0}

default_cfgs = generate_default_cfgs(
    {
        "nat_mini.in1k": cfg("nat_mini.pth"),
        "nat_tiny.in1k": cfg("nat_tiny.pth"),
        "nat_small.in1k": cfg("nat_small.pth"),
        "nat_base.in1k": cfg("nat_base.pth"),
        "dinat_mini.in1k": dilated_cfg("dinat_mini_in1k_224.pth"),
        "dinat_tiny.in1k": dilated_cfg("dinat_tiny_in1k_224.pth"),
        "dinat_small.in1k": dilated_cfg("dinat_small_in1k_224.pth"),
        "dinat_base.in1k": dilated_cfg("dinat_base_in1k_224.pth"),
        "dinat_large.in22k_ft_in1k": dilated_cfg("dinat_large_in22k_in1k_224.pth"),
        "dinat_large_384.in22k_ft_in1k": dilated_cfg("dinat_large_in22k_in1k_384.pth", **_384),
        "dinat_large_384_11x11.in22k_ft_in1k": dilated_cfg("dinat_large_in22k_in1k_384_11x11.pth", **_384),
        "dinat_s_tiny.in1k": _patch_cfg("dinat_s_tiny_in1k_224.pth"),
        "dinat_s_small.in1k": _patch_cfg("dinat_s_small_in1k_224.pth"),
        "dinat_s_base.in1k": _patch_cfg("dinat_s_base_in1k_224.pth"),
        "dinat_s_large.in22k_ft_in1k": _patch_cfg("dinat_s_large_in1k_224.pth"),
        "dinat_s_large_384.in22k_ft_in1k": _patch_cfg("dinat_s_large_in1k_384.pth", **_384),
        "test_nat.untrained": cfg(size=96),
    }
)

_SHALLOW, _DEEP = {"depths": (3, 4, 6, 5)}, {"depths": (3, 4, 18, 5)}
_NARROW: dict[str, Any] = {"embed_dim": 64, "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0, "drop_path_rate": 0.2}
_96: dict[str, Any] = {"embed_dim": 96, "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0, "drop_path_rate": 0.3}
_128: dict[str, Any] = {"embed_dim": 128, "num_heads": (4, 8, 16, 32), "mlp_ratio": 2.0, "drop_path_rate": 0.5}
_192: dict[str, Any] = {"embed_dim": 192, "num_heads": (6, 12, 24, 48), "mlp_ratio": 2.0, "drop_path_rate": 0.35}

# The widest that a window of 7 allows on the maps of a 224 px image, and of a 384 px image.
_DILATED: dict[str, Any] = _DEEP | {"dilations": ((1, 8, 1), (1, 4, 1, 4), (1, 2) * 9, (1,) * 5)}
_DILATED_384: dict[str, Any] = _DEEP | {"dilations": ((1, 13, 1), (1, 6, 1, 6), (1, 3) * 9, (1,) * 5)}

_PATCH: dict[str, Any] = {"frame": "patch", "mlp_ratio": 4.0, "depths": (2, 2, 18, 2)}
_PATCH |= {"dilations": ((1, 8), (1, 4), (1, 2) * 9, (1, 1))}

VARIANTS: dict[str, dict[str, Any]] = {
    "nat_mini": _NARROW | _SHALLOW,
    "nat_tiny": _NARROW | _DEEP,
    "nat_small": _96 | _DEEP | {"layer_scale": 1e-5},
    "nat_base": _128 | _DEEP | {"layer_scale": 1e-5},
    "dinat_mini": _NARROW | _SHALLOW | {"dilations": ((1, 8, 1), (1, 4, 1, 4), (1, 2) * 3, (1,) * 5)},
    "dinat_tiny": _NARROW | _DILATED,
    "dinat_small": _96 | _DILATED,
    "dinat_base": _128 | _DILATED | {"layer_scale": 1e-5},
    "dinat_large": _192 | _DILATED,
    "dinat_large_384": _192 | _DILATED_384,
    "dinat_large_384_11x11": _192 | _DILATED | {"kernel_size": 11},
    "dinat_s_tiny": _96
    | _PATCH
    | {"depths": (2, 2, 6, 2), "dilations": ((1, 8), (1, 4), (1, 2) * 3, (1, 1)), "drop_path_rate": 0.2},
    "dinat_s_small": _96 | _PATCH,
    "dinat_s_base": _128 | _PATCH,
    "dinat_s_large": _192 | _PATCH,
    "dinat_s_large_384": _192 | _PATCH | {"dilations": ((1, 13), (1, 6), (1, 3) * 9, (1, 1))},
    "test_nat": {
        "depths": (1, 2, 1, 1),
        "embed_dim": 8,
        "num_heads": (1, 2, 2, 4),
        "kernel_size": 3,
        "dilations": ((1,), (1, 2), (1,), (1,)),
        "mlp_ratio": 2.0,
        "layer_scale": 0.5,
    },
}

register_variants(__name__, NAT, VARIANTS, checkpoint_filter_fn)

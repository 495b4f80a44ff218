"""NAT (arXiv 2204.07143): attention of every token to the window around it; DiNAT (2209.15001) dilates every other one.

Official code and weights: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer.
"""

# Annotations are not postponed: torch.fx copies those of forward() into code that TorchScript has to understand.

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp, trunc_normal_
from timm.models import generate_default_cfgs, register_notrace_function
from torch import Tensor, nn

from subquad.backbones import weights
from subquad.backbones.base import Pyramid, StageSpec
from subquad.backbones.layers import MapConv2d, check_heads, crop_to, in_turn
from subquad.backbones.registry import register_variants
from subquad.ops import na2d

__all__ = ["NAT", "NATBlock", "NeighborhoodAttention"]


@register_notrace_function
def pad_to(x: Tensor, size: int) -> Tensor:
    """A map (B, H, W, C) with zeros below and to the right, at least ``size`` high and wide."""
    # An exported program would keep a branch on sizes as it was for the example.
    exporting = False
    if not torch.jit.is_scripting():
        exporting = torch.compiler.is_exporting()
    if exporting:
        if not torch.jit.is_scripting():
            bottom: Any = torch.sym_max(x.shape[1], size) - x.shape[1]
            right: Any = torch.sym_max(x.shape[2], size) - x.shape[2]
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
    elif x.shape[1] < size or x.shape[2] < size:
        x = F.pad(x, (0, 0, 0, max(size - x.shape[2], 0), 0, max(size - x.shape[1], 0)))
    return x


@register_notrace_function
def attend_nearby(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """``subquad.ops.na2d`` for modules: in eager mode, in TorchScript and as a leaf of torch.fx."""
    if torch.jit.is_scripting():
        # The operator itself, because TorchScript cannot compile the checks of the public function.
        kernel, dilations = [kernel_size, kernel_size], [dilation, dilation]
        found = torch.ops.subquad.neighborhood_attention(
            q, k, v, rpb, None, None, kernel, dilations, [1, 1], [False, False], q.shape[-1] ** -0.5
        )
        o = found[0]
    else:
        o = na2d(q, k, v, kernel_size, dilation, rpb=rpb)
    return o


class NeighborhoodAttention(nn.Module):
    """Attention of a map (B, H, W, dim) to the kernel_size^2 tokens around each, with a relative positional bias.

    A map smaller than kernel_size * dilation is padded with zeros before the projection: the padding's keys and values
    are the projection's bias, and are attended.
    """

    def __init__(
        self, dim: int, num_heads: int, kernel_size: int, dilation: int = 1, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the bias table."""
        trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        qkv = self.qkv(pad_to(x, self.kernel_size * self.dilation)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv[:, :, :, 0], qkv[:, :, :, 1], qkv[:, :, :, 2]  # (B, H, W, heads, d)
        o = attend_nearby(q, k, v, self.rpb, self.kernel_size, self.dilation)
        return self.proj(crop_to(o, height, width).flatten(3))


class NATBlock(nn.Module):
    """Neighborhood attention and an MLP, each behind a norm and, with ``layer_scale``, before a scale a channel."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        kernel_size: int,
        dilation: int = 1,
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.attn = NeighborhoodAttention(dim, num_heads, kernel_size, dilation, **dd)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class Stem(nn.Module):
    """Images (B, C, H, W) to (B, ceil(H / 4), ceil(W / 4), dim) by two convolutions with nothing between them."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv2(self.conv1(x)).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """Convolution of stride 2, norm: (B, H, W, in_dim) to (B, ceil(H / 2), ceil(W / 2), dim)."""

    def __init__(self, in_dim: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.reduction = MapConv2d(in_dim, dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x))


class NAT(Pyramid):
    """NAT and, with dilations, DiNAT; the channels double from stage to stage.

    Args:
        depths: blocks of each stage.
        embed_dim: channels of the first stage, even.
        num_heads: heads of each stage.
        kernel_size: side of the windows.
        dilations: for each stage the dilation of each block; None for 1 everywhere.
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
        if kernel_size < 1:
            raise ValueError(f"kernel_size must be positive, got {kernel_size}")
        if dilations is None:
            dilations = [[1] * depth for depth in depths]
        if [len(stage) for stage in dilations] != list(depths) or min(min(stage) for stage in dilations) < 1:
            raise ValueError(f"dilations must be positive, one a block of depths={tuple(depths)}, got {dilations}")
        dd = {"device": device, "dtype": dtype}
        block = partial(NATBlock, kernel_size=kernel_size, mlp_ratio=mlp_ratio, layer_scale=layer_scale)
        super().__init__(
            stem=Stem(in_chans, embed_dim, **dd),
            stages=[
                StageSpec(
                    dims[i],
                    depths[i],
                    reduction=4 * 2**i,
                    block=in_turn([partial(block, num_heads=num_heads[i], dilation=dilation) for dilation in stage]),
                    downsample=Downsample if i else None,
                )
                for i, stage in enumerate(dilations)
            ],
            norm=partial(nn.LayerNorm, eps=1e-5),
            in_chans=in_chans,
            **dd,
            **pyramid,
        )

    def no_weight_decay(self) -> set[str]:
        """The bias tables, as in the official training."""
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}


# Weights ---------------------------------------------------------------------------------------------------------

# Official names to ours, in order.
_NAMES: list[tuple[str, str | None]] = [
    (r"^norm\d+\.", None),  # of the detection backbone
    (r"^patch_embed\.proj\.0\.", "stem.conv1."),
    (r"^patch_embed\.proj\.1\.", "stem.conv2."),
    (r"^patch_embed\.norm\.", "stem.norm."),
    # upstream downsamples at the end of a stage
    *((rf"^levels\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(8)),
    (r"^levels\.", "stages."),
    (r"\.gamma([12])$", r".ls\1.gamma"),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """An official checkpoint under our names; ours pass unchanged.

    Raises:
        ValueError: if there are no tensors in it (see ``weights.unwrap``).
    """
    return weights.rename(weights.unwrap(state_dict), _NAMES)


_RELEASES = "https://shi-labs.com/projects/"


def _cfg(file: str = "", **kwargs: Any) -> dict[str, Any]:
    return (
        dict(
            **({"url": f"{_RELEASES}nat/checkpoints/CLS/{file}", "custom_load": True} if file else {}),
            num_classes=1000,
            input_size=(3, 224, 224),
            pool_size=(7, 7),
            crop_pct=0.875,
            interpolation="bicubic",
            first_conv="stem.conv1",
            classifier="head.fc",
            license="mit",
            origin_url="https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
            paper_name="Neighborhood Attention Transformer",
            paper_ids="arXiv:2204.07143",
        )
        | kwargs
    )


def _dilated_cfg(file: str, **kwargs: Any) -> dict[str, Any]:
    return _cfg(
        url=f"{_RELEASES}dinat/checkpoints/imagenet1k/{file}",
        custom_load=True,
        paper_name="Dilated Neighborhood Attention Transformer",
        paper_ids="arXiv:2209.15001",
        **kwargs,
    )


_384: dict[str, Any] = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}

default_cfgs = generate_default_cfgs(
    {
        "nat_mini.in1k": _cfg("nat_mini.pth"),
        "nat_tiny.in1k": _cfg("nat_tiny.pth"),
        "nat_small.in1k": _cfg("nat_small.pth"),
        "nat_base.in1k": _cfg("nat_base.pth"),
        "dinat_mini.in1k": _dilated_cfg("dinat_mini_in1k_224.pth"),
        "dinat_tiny.in1k": _dilated_cfg("dinat_tiny_in1k_224.pth"),
        "dinat_small.in1k": _dilated_cfg("dinat_small_in1k_224.pth"),
        "dinat_base.in1k": _dilated_cfg("dinat_base_in1k_224.pth"),
        "dinat_large.in22k_ft_in1k": _dilated_cfg("dinat_large_in22k_in1k_224.pth"),
        "dinat_large_384.in22k_ft_in1k": _dilated_cfg("dinat_large_in22k_in1k_384.pth", **_384),
        "dinat_large_384_11x11.in22k_ft_in1k": _dilated_cfg("dinat_large_in22k_in1k_384_11x11.pth", **_384),
        "test_nat.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)

_NARROW: dict[str, Any] = {"embed_dim": 64, "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0, "drop_path_rate": 0.2}
_96: dict[str, Any] = {"embed_dim": 96, "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0, "drop_path_rate": 0.3}
_128: dict[str, Any] = {"embed_dim": 128, "num_heads": (4, 8, 16, 32), "mlp_ratio": 2.0, "drop_path_rate": 0.5}
_192: dict[str, Any] = {"embed_dim": 192, "num_heads": (6, 12, 24, 48), "mlp_ratio": 2.0, "drop_path_rate": 0.35}
_SHALLOW, _DEEP = {"depths": (3, 4, 6, 5)}, {"depths": (3, 4, 18, 5)}

# The widest that a window of 7 allows on the maps of a 224 px image, and of a 384 px image.
_DILATED: dict[str, Any] = _DEEP | {"dilations": ((1, 8, 1), (1, 4, 1, 4), (1, 2) * 9, (1,) * 5)}
_DILATED_384: dict[str, Any] = _DEEP | {"dilations": ((1, 13, 1), (1, 6, 1, 6), (1, 3) * 9, (1,) * 5)}

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

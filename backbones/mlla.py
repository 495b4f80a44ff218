"""MLLA, later renamed MILA (arXiv 2405.16605): linear attention in the block design of Mamba.

Official code and weights: https://github.com/LeapLabTHU/MLLA. This is the form of the authors' detection code, which
takes maps of any size; at multiples of 32 px it is their classification model.
"""

# Annotations are not postponed: torch.fx copies those of forward() into code that TorchScript has to understand.

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from subquad.backbones import weights
from subquad.backbones.base import Pyramid, StageSpec
from subquad.backbones.layers import DepthwiseConv, MapConv2d, attend, check_heads, pad_to, rotary_by_width
from subquad.backbones.norms import LayerNorm, StreamNorm
from subquad.backbones.registry import default_cfg, register_variants

__all__ = ["MLLA", "MLLABlock", "RotaryLinearAttention"]


class RotaryLinearAttention(nn.Module):
    """Linear attention of a map (B, H, W, dim) whose values are the input itself, plus a local branch of the values.

    The rotary embedding spans all channels before they are cut into heads: a head sees a part of the frequencies.
    """

    def __init__(self, dim: int, num_heads: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qk = nn.Linear(dim, 2 * dim, **dd)
        self.lepe = DepthwiseConv(dim, 3, **dd)

    def forward(self, x: Tensor) -> Tensor:
        qk = self.qk(x).flatten(1, 2).unflatten(-1, (2, self.num_heads, -1))  # (B, N, 2, heads, d)
        q, k = qk.unbind(2)  # whose gradients are stacked; those of two slices are added
        v = x.flatten(1, 2).unflatten(-1, (self.num_heads, -1))
        cos, sin = rotary_by_width(q, x.shape[1], x.shape[2])
        o = attend(q, k, v, cos, sin, feature_map="elu1")
        return o.flatten(2).unflatten(1, x.shape[1:3]) + self.lepe(x)


class MLLABlock(nn.Module):
    """Block of Mamba with attention in place of the scan, and an MLP, on (B, H, W, dim); a convolution before each."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.cpe1 = DepthwiseConv(dim, 3, residual=True, **dd)
        self.norm1 = LayerNorm(dim, **dd)
        self.gate_proj = nn.Linear(dim, dim, **dd)
        self.in_proj = nn.Linear(dim, dim, **dd)
        self.conv = DepthwiseConv(dim, 3, activation="silu", **dd)
        self.attn = RotaryLinearAttention(dim, num_heads, **dd)
        self.out_proj = nn.Linear(dim, dim, **dd)
        self.cpe2 = DepthwiseConv(dim, 3, residual=True, **dd)
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x)
        y = self.norm1(x)
        gate = F.silu(self.gate_proj(y))
        y = self.conv(self.in_proj(y))
        x = x + self.drop_path(self.out_proj(self.attn(y) * gate))
        x = self.cpe2(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConvLayer(nn.Module):
    """Convolution, batch norm if asked for, ReLU unless not; on maps (B, H, W, C)."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int,
        stride: int = 1,
        *,
        groups: int = 1,
        bias: bool = False,
        norm: bool = True,
        act: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = MapConv2d(
            in_dim, dim, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=bias, **dd
        )
        self.norm = nn.BatchNorm2d(dim, **dd) if norm else nn.Identity()
        self.act = nn.ReLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x).permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class Stem(nn.Module):
    """Images (B, C, H, W), padded with zeros to multiples of 4, to (B, ceil(H / 4), ceil(W / 4), dim)."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv1 = ConvLayer(in_chans, dim // 2, 3, 2, **dd)
        self.conv2 = nn.Sequential(
            ConvLayer(dim // 2, dim // 2, 3, **dd), ConvLayer(dim // 2, dim // 2, 3, act=False, **dd)
        )
        self.conv3 = nn.Sequential(
            ConvLayer(dim // 2, 4 * dim, 3, 2, **dd), ConvLayer(4 * dim, dim, 1, act=False, **dd)
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width = (x.shape[2] + 3) // 4 * 4, (x.shape[3] + 3) // 4 * 4
        x = self.conv1(pad_to(x.permute(0, 2, 3, 1), height, width))
        x = x + self.conv2(x)
        return self.conv3(x)


class Downsample(nn.Module):
    """Inverted bottleneck of stride 2: (B, H, W, in_dim) to (B, ceil(H / 2), ceil(W / 2), dim)."""

    def __init__(self, in_dim: int, dim: int, **dd: Any) -> None:
        super().__init__()
        hidden = 4 * dim
        self.expand = ConvLayer(in_dim, hidden, 1, bias=True, norm=False, **dd)
        self.conv = ConvLayer(hidden, hidden, 3, 2, groups=hidden, bias=True, norm=False, **dd)
        self.reduce = ConvLayer(hidden, dim, 1, bias=True, act=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        # An odd map is padded before the expansion, so that its last row or column becomes the ReLU of a bias.
        height, width = (x.shape[1] + 1) // 2 * 2, (x.shape[2] + 1) // 2 * 2
        return self.reduce(self.conv(self.expand(pad_to(x, height, width))))


class MLLA(Pyramid):
    """MLLA; the channels double from stage to stage.

    Args:
        depths: blocks of each stage.
        embed_dim: channels of the first stage, even.
        num_heads: heads of each stage.
        mlp_ratio: hidden size of the MLP over the channels.
        in_chans, device, dtype, pyramid: arguments of ``Pyramid``.

    Raises:
        ValueError: for a size that cannot be built, naming it.
        TypeError: for an unknown argument.
    """

    checkpoint_key = "model"
    """What the official evaluation loads; averaged weights lie in the same file under ``state_dict_ema``."""

    def __init__(
        self,
        depths: Sequence[int] = (2, 4, 8, 4),
        embed_dim: int = 64,
        num_heads: Sequence[int] = (2, 4, 8, 16),
        *,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        device: Any = None,
        dtype: Any = None,
        **pyramid: Any,
    ) -> None:
        dims = [embed_dim * 2**i for i in range(len(depths))]
        check_heads(depths, dims, num_heads)
        if embed_dim < 4 or embed_dim % 4:
            raise ValueError(f"embed_dim must be a multiple of 4 for the rotary embedding, got {embed_dim}")
        dd = {"device": device, "dtype": dtype}
        super().__init__(
            stem=Stem(in_chans, embed_dim, **dd),
            stages=[
                StageSpec(
                    dim,
                    depth,
                    reduction=4 * 2**i,
                    block=partial(MLLABlock, num_heads=heads, mlp_ratio=mlp_ratio),
                    downsample=Downsample if i else None,
                )
                for i, (dim, depth, heads) in enumerate(zip(dims, depths, num_heads, strict=True))
            ],
            norm=StreamNorm,
            in_chans=in_chans,
            **dd,
            **pyramid,
        )


# Weights ---------------------------------------------------------------------------------------------------------

# Official names to ours, in order.
_NAMES: list[tuple[str, str | None]] = [
    (r"\.attn\.rope\.rotations$", None),  # a table for one size
    (r"^norm\d+\.", None),  # of the detection backbone
    (r"^patch_embed\.", "stem."),
    # upstream downsamples at the end of a stage
    *((rf"^layers\.{i}\.downsample\.conv\.", f"stages.{i + 1}.downsample.") for i in range(8)),
    (r"\.downsample\.0\.", ".downsample.expand."),
    (r"\.downsample\.1\.", ".downsample.conv."),
    (r"\.downsample\.2\.", ".downsample.reduce."),
    (r"^layers\.", "stages."),
    (r"\.act_proj\.", ".gate_proj."),
    (r"\.dwc\.", ".conv."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """An official checkpoint under our names; ours pass unchanged.

    Raises:
        ValueError: if there are no tensors in it (see ``weights.unwrap``).
    """
    return weights.rename(weights.unwrap(state_dict), _NAMES)


_cfg = partial(
    default_cfg,
    first_conv="stem.conv1.conv",
    license="mit",
    notes=("MIT is the licence of the official code; none is stated for the weights.",),
    origin_url="https://github.com/LeapLabTHU/MLLA",
    paper_name="Demystify Mamba in Vision: A Linear Attention Perspective",
    paper_ids="arXiv:2405.16605",
)

default_cfgs = generate_default_cfgs(
    {
        "mlla_tiny.in1k": _cfg("mlla_tiny.pth", share="7a19712877cb4242889c"),
        "mlla_small.in1k": _cfg("mlla_small.pth", share="0e5d0b1409d540aaa80c"),
        "mlla_base.in1k": _cfg("mlla_base.pth", share="91c85c5a1061496d8796"),
        "test_mlla.untrained": _cfg(size=96),
    }
)

VARIANTS: dict[str, dict[str, Any]] = {
    "mlla_tiny": {"depths": (2, 4, 8, 4), "embed_dim": 64, "num_heads": (2, 4, 8, 16), "drop_path_rate": 0.2},
    "mlla_small": {"depths": (3, 6, 21, 6), "embed_dim": 64, "num_heads": (2, 4, 8, 16), "drop_path_rate": 0.3},
    "mlla_base": {"depths": (3, 6, 21, 6), "embed_dim": 96, "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.5},
    "test_mlla": {"depths": (1, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 2, 2, 4), "mlp_ratio": 2.0},
}

register_variants(__name__, MLLA, VARIANTS, checkpoint_filter_fn)

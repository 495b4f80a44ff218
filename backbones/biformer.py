"""BiFormer (arXiv 2303.08810): every region of the map chooses the regions that its tokens attend to.

Official code: https://github.com/rayleizhu/BiFormer. Its links to weights have been reported broken; files of it load.
"""

# Annotations are not postponed: torch.fx copies those of forward() into code that TorchScript has to understand.

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers import DropPath, LayerScale
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from subquad.backbones import weights
from subquad.backbones.base import Pyramid, StageSpec
from subquad.backbones.bilevel import BiLevelRoutingAttention
from subquad.backbones.layers import DepthwiseConv, MapConv2d, stage_dims
from subquad.backbones.norms import LayerNorm
from subquad.backbones.registry import register_variants

__all__ = ["BiFormer", "BiFormerBlock"]

_PLAIN_HEADS = 8
"""Heads of full attention, whatever ``head_dim`` is."""


class FullAttention(nn.Module):
    """Attention of all tokens of a map (B, H, W, dim) to all, as in the last stage.

    ``lepe`` says what a depthwise convolution of is added: the "input", the "values", or nothing ("none").
    """

    def __init__(self, dim: int, lepe: str, lepe_size: int = 5, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % _PLAIN_HEADS:
            raise ValueError(f"full attention has {_PLAIN_HEADS} heads, which must divide its channels, got {dim}")
        self.num_heads = _PLAIN_HEADS
        self.of_values = lepe == "values"
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.lepe = nn.Identity() if lepe == "none" else DepthwiseConv(dim, lepe_size, **dd)
        self.adds = lepe != "none"
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).unflatten(1, (x.shape[1], x.shape[2]))
        if self.adds:
            o = o + self.lepe(v.transpose(1, 2).reshape(x.shape) if self.of_values else x)
        return self.proj(o)


class ConvMixer(nn.Module):
    """What stands in for attention with ``topk`` 0: a depthwise convolution between two pointwise ones."""

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = MapConv2d(dim, dim, 1, **dd)
        self.dwconv = DepthwiseConv(dim, 5, **dd)
        self.conv2 = MapConv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.dwconv(self.conv1(x)))


class Mlp(nn.Module):
    """Two linear layers with GELU between, behind a depthwise convolution if ``dwconv``."""

    def __init__(self, dim: int, hidden_dim: int, dwconv: bool, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.dwconv = DepthwiseConv(hidden_dim, 3, **dd) if dwconv else nn.Identity()
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.dwconv(self.fc1(x))))


class BiFormerBlock(nn.Module):
    """Position by a depthwise convolution, a mixer and an MLP, each added to the map."""

    def __init__(
        self,
        dim: int,
        *,
        mixer: Any,
        mlp_ratio: float = 3.0,
        mlp_dwconv: bool = False,
        pos_size: int = 3,
        pre_norm: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.pre_norm = pre_norm
        result = "projection" if pre_norm else "stream"
        self.pos_embed = DepthwiseConv(dim, pos_size, residual=True, **dd) if pos_size > 0 else nn.Identity()
        self.norm1 = LayerNorm(dim, eps=1e-6, result=result, **dd)
        self.attn = mixer(dim, **dd)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.norm2 = LayerNorm(dim, eps=1e-6, result=result, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), mlp_dwconv, **dd)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_embed(x)
        if self.pre_norm:
            x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
            x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        else:
            x = self.norm1(x + self.drop_path(self.ls1(self.attn(x))))
            x = self.norm2(x + self.drop_path(self.ls2(self.mlp(x))))
        return x


class MapBatchNorm(nn.Module):
    """Batch norm of a channels-last map (B, H, W, dim)."""

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        # Of rows: torch.compile expects another memory format of the gradient of a permuted map than it gets.
        return self.bn(x.flatten(0, 2)).view(x.shape)


class ConvStem(nn.Module):
    """Images (B, C, H, W) to (B, ceil(H / 4), ceil(W / 4), dim) by two convolutions with batch norms."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(dim // 2, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(x)).permute(0, 2, 3, 1)


class PatchStem(nn.Module):
    """Images (B, C, H, W) to (B, floor(H / 4), floor(W / 4), dim) by one convolution with a batch norm."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim, 4, stride=4, **dd)
        self.norm1 = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm1(self.conv1(x)).permute(0, 2, 3, 1)


class ConvDownsample(nn.Module):
    """Convolution of 3 x 3 and stride 2, batch norm: (B, H, W, in_dim) to (B, ceil(H / 2), ceil(W / 2), dim)."""

    def __init__(self, in_dim: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv = MapConv2d(in_dim, dim, 3, stride=2, padding=1, **dd)
        self.norm = MapBatchNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class PatchDownsample(nn.Module):
    """Batch norm, convolution of 2 x 2 and stride 2: (B, H, W, in_dim) to (B, floor(H / 2), floor(W / 2), dim)."""

    def __init__(self, in_dim: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.norm = MapBatchNorm(in_dim, **dd)
        self.conv = MapConv2d(in_dim, dim, 2, stride=2, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))


class BiFormer(Pyramid):
    """BiFormer.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage, or of the first if they double.
        topks: for each stage how many regions a region attends to; 0 for convolutions in place of attention, -1 for
            full attention, -2 for full attention with a convolution of its input added, -3 of its values.
        n_win: regions along each side of the map, for all stages or each; more for detection (16) and segmentation (8).
        head_dim: channels of queries and keys of a head of routed attention.
        qk_dims: channels of queries and keys of each stage; as many as the stage has by default.
        mlp_ratio: hidden size of the MLP over the channels.
        stem: "conv" or, as in the models with Swin's layout, "patch"; decides the downsampling too.
        pos_size: kernel of the depthwise convolution in front of each block, 0 for none.
        lepe_size, ragged, soft_routing, diff_routing, param_routing: see ``BiLevelRoutingAttention``.
        kv_pool: likewise; ``kv_pool_sizes`` has its size for each stage.
        pre_norm: norms in front of mixer and MLP, or behind their sums.
        mlp_dwconv: a depthwise convolution in the MLP.
        layer_scale: initial scale of every residual branch; None for no scales.
        in_chans, device, dtype, pyramid: arguments of ``Pyramid``.

    Raises:
        ValueError: for a size that cannot be built, naming it.
        TypeError: for an unknown argument.
    """

    out_norm_eps = 1e-6
    """Of the norms that the authors' detectors have behind the stages."""

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: int | Sequence[int] = 64,
        topks: Sequence[int] = (1, 4, 16, -2),
        *,
        n_win: int | Sequence[int] = 7,
        head_dim: int = 32,
        qk_dims: Sequence[int] | None = None,
        mlp_ratio: float = 3.0,
        stem: str = "conv",
        pos_size: int = 3,
        lepe_size: int = 5,
        ragged: bool = False,
        kv_pool: str = "identity",
        kv_pool_sizes: Sequence[int] | None = None,
        soft_routing: bool = False,
        diff_routing: bool = False,
        param_routing: bool = False,
        pre_norm: bool = True,
        mlp_dwconv: bool = False,
        layer_scale: float | None = None,
        in_chans: int = 3,
        device: Any = None,
        dtype: Any = None,
        **pyramid: Any,
    ) -> None:
        widths = stage_dims(depths, dims)
        given = {
            "n_win": [n_win] * len(widths) if isinstance(n_win, int) else n_win,
            "qk_dim": widths if qk_dims is None else qk_dims,
            "kv_pool_size": [1] * len(widths) if kv_pool_sizes is None else kv_pool_sizes,
        }
        options = _by_stage(len(widths), topks, given)
        if stem not in _STEMS:
            raise ValueError(f"unknown stem {stem!r}, expected one of {list(_STEMS)}")
        dd = {"device": device, "dtype": dtype}
        routing = {"soft_routing": soft_routing, "diff_routing": diff_routing, "param_routing": param_routing}
        routed = partial(BiLevelRoutingAttention, lepe_size=lepe_size, ragged=ragged, kv_pool=kv_pool, **routing)
        residual: dict[str, Any] = {"pre_norm": pre_norm, "layer_scale": layer_scale}
        block = partial(BiFormerBlock, mlp_ratio=mlp_ratio, mlp_dwconv=mlp_dwconv, pos_size=pos_size, **residual)
        mixers = [
            _mixer(routed, topk, head_dim, lepe_size, **stage) for topk, stage in zip(topks, options, strict=True)
        ]
        make_stem, downsample = _STEMS[stem]
        super().__init__(
            stem=make_stem(in_chans, widths[0], **dd),
            stages=[
                StageSpec(dim, depth, 4 * 2**i, partial(block, mixer=mixer), downsample if i else None)
                for i, (dim, depth, mixer) in enumerate(zip(widths, depths, mixers, strict=True))
            ],
            norm=MapBatchNorm,
            in_chans=in_chans,
            **dd,
            **pyramid,
        )


_STEMS: dict[str, tuple[Any, Any]] = {"conv": (ConvStem, ConvDownsample), "patch": (PatchStem, PatchDownsample)}
_FULL = {-1: "none", -2: "input", -3: "values"}


def _by_stage(stages: int, topks: Sequence[int], given: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    """The options of each stage's routed attention."""
    for name, values in {"topks": topks, **given}.items():
        if len(values) != stages:
            raise ValueError(f"{name} must have one entry for each of {stages} stages, got {tuple(values)}")
    return [{name: values[i] for name, values in given.items()} for i in range(stages)]


def _mixer(routed: Any, topk: int, head_dim: int, lepe_size: int, *, qk_dim: int, **options: int) -> Any:
    """The factory of a stage's mixers, for an entry of ``topks``."""
    if topk > 0:
        if qk_dim % head_dim:
            raise ValueError(f"head_dim must divide the channels of queries and keys, got {head_dim} and {qk_dim}")
        return partial(routed, num_heads=qk_dim // head_dim, topk=topk, qk_dim=qk_dim, **options)
    if topk == 0:
        return ConvMixer
    if topk not in _FULL:
        raise ValueError(f"topks must be positive, 0 or one of {list(_FULL)}, got {topk}")
    return partial(FullAttention, lepe=_FULL[topk], lepe_size=lepe_size)


# Weights ---------------------------------------------------------------------------------------------------------

# Official names to ours, in order.
_NAMES: list[tuple[str, str | None]] = [
    (r"^extra_norms\.\d+\.", None),  # of the detection backbone
    (r"^downsample_layers\.0\.0\.", "stem.conv1."),
    (r"^downsample_layers\.0\.1\.", "stem.norm1."),
    (r"^downsample_layers\.0\.3\.", "stem.conv2."),
    (r"^downsample_layers\.0\.4\.", "stem.norm2."),
    (r"^(stages\.\d+)\.(\d+\.)", r"\1.blocks.\2"),  # not in the models with Swin's layout
    (r"\.attn\.qkv\.qkv\.", ".attn.qkv."),
    (r"\.attn\.qkv_linear\.", ".attn.qkv."),
    (r"\.attn\.(wo|output_linear)\.", ".attn.proj."),
    (r"\.attn\.router\.emb\.", ".attn.router."),
    (r"\.attn\.1\.", ".attn.conv1."),
    (r"\.attn\.2\.", ".attn.dwconv."),
    (r"\.attn\.3\.", ".attn.conv2."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.1\.dwconv\.", ".mlp.dwconv."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
    (r"\.gamma([12])$", r".ls\1.gamma"),
    (r"^norm\.(?!bn\.)", "norm.bn."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """An official checkpoint under our names; ours pass unchanged.

    Raises:
        ValueError: if there are no tensors in it (see ``weights.unwrap``).
    """
    expected = model.state_dict()
    ours = {}
    for name, value in weights.rename(weights.unwrap(state_dict), _NAMES).items():
        if name.startswith("downsample_layers."):
            name = _name_downsample(name, value, expected)
        if value.dim() == 4 and name in expected and expected[name].dim() == 2:
            value = value.flatten(1)  # trained channels first
        ours[name] = value
    return ours


def _name_downsample(name: str, value: Tensor, expected: dict[str, Tensor]) -> str:
    """Convolution and norm come in the order in which the layer has them, and their names are their places."""
    _, stage, place, rest = name.split(".", 3)
    norm_first = expected.get(f"stages.{stage}.downsample.conv.weight", value).shape[-1] == 2
    part = "conv" if (place == "0") != norm_first else "norm.bn"
    return f"stages.{stage}.downsample.{part}.{rest}"


def _cfg(side: int = 224) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, side, side),
        "pool_size": (side // 32, side // 32),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "license": "mit",
        "origin_url": "https://github.com/rayleizhu/BiFormer",
        "paper_name": "BiFormer: Vision Transformer with Bi-Level Routing Attention",
        "paper_ids": "arXiv:2303.08810",
    }


default_cfgs = generate_default_cfgs(
    {
        "biformer_tiny.in1k": _cfg(),
        "biformer_small.in1k": _cfg(),
        "biformer_base.in1k": _cfg(),
        "biformer_stl.in1k": _cfg(),
        "biformer_stl_nchw.in1k": _cfg(),
        "test_biformer.untrained": _cfg(96),
    }
)

_SWIN_LAYOUT: dict[str, Any] = {
    "depths": (2, 2, 6, 2),
    "dims": 96,
    "mlp_ratio": 4.0,
    "stem": "patch",
    "pos_size": 0,
    "drop_path_rate": 0.1,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "biformer_tiny": {"depths": (2, 2, 8, 2), "dims": 64, "drop_path_rate": 0.1},
    "biformer_small": {"depths": (4, 4, 18, 4), "dims": 64, "drop_path_rate": 0.15},
    "biformer_base": {"depths": (4, 4, 18, 4), "dims": 96},
    "biformer_stl": _SWIN_LAYOUT,
    "biformer_stl_nchw": _SWIN_LAYOUT | {"topks": (1, 4, 16, -3), "ragged": True},
    "test_biformer": {
        "depths": (1, 1, 2, 1),
        "dims": (8, 8, 16, 16),
        "topks": (1, 2, 3, -2),
        "n_win": 2,
        "head_dim": 4,
        "mlp_ratio": 2.0,
    },
}

register_variants(__name__, BiFormer, VARIANTS, checkpoint_filter_fn)

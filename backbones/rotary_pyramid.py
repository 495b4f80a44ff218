"""The skeleton that RAVLT, MAViT and NaLaFormer share: stem, block, convolutional MLP, downsampling, head, names.

A family supplies its token mixer. In the released models the mixer is linear attention in the first two stages and
softmax attention, of the same parameters, in the last two.
"""

# Annotations are not postponed: torch.fx copies those of forward() into code that TorchScript has to understand.

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, create_classifier, trunc_normal_
from torch import Tensor, nn

from subquad.backbones import weights
from subquad.backbones.base import Factory, Pyramid, StageSpec
from subquad.backbones.layers import (
    DepthwiseConv,
    attend,
    check_heads,
    check_per_stage,
    in_turn,
    rotary_by_head,
    rotate,
)
from subquad.backbones.norms import LayerNorm


def softmax_attend(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Softmax attention with rotary embedding and the usual scale; all (B, N, H, D)."""
    q, k = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v.transpose(1, 2)).transpose(1, 2)


class GatedRotaryAttention(nn.Module):
    """Token mixer of RAVLT and MAViT on a map (B, H, W, dim): attention and a local branch of the values, times a gate.

    Args:
        dim, num_heads: heads of dim / num_heads channels, a multiple of 4.
        normalizer: of the linear attention, whose features are ELU + 1.
        linear: whether attention is linear or softmax.
    """

    def __init__(
        self, dim: int, num_heads: int, *, normalizer: str, linear: bool, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.normalizer = normalizer
        self.linear = linear
        self.scale = (dim // num_heads) ** -0.5
        self.qkvo = nn.Linear(dim, 4 * dim, **dd)
        self.lepe = DepthwiseConv(dim, 5, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, gate = self.qkvo(x).chunk(4, dim=-1)
        local = self.lepe(v)
        q, k, v = (t.flatten(1, 2).unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))  # (B, N, heads, d)
        cos, sin = rotary_by_head(q, x.shape[1], x.shape[2])
        if self.linear:
            o = attend(q, k, v, cos, sin, normalizer=self.normalizer, feature_map="elu1", scale=self.scale)
        else:
            o = softmax_attend(q, k, v, cos, sin)
        o = o.flatten(2).unflatten(1, x.shape[1:3])
        return self.proj((o + local) * gate)


class ConvMlp(nn.Module):
    """MLP on (B, H, W, dim) with a residual depthwise convolution behind its activation."""

    def __init__(self, dim: int, hidden: int, **dd: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.act = nn.GELU()
        self.conv = DepthwiseConv(hidden, 3, residual=True, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.conv(self.act(self.fc1(x))))


class LayerScale(nn.Module):
    """A factor for each channel. timm's weight decay leaves it alone, upstream's, where it has four axes, does not."""

    def __init__(self, dim: int, init: float, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class RotaryBlock(nn.Module):
    """Pre-norm residual block on (B, H, W, dim), each part after a depthwise convolution as position embedding.

    Args:
        dim: channels.
        mixer: called as ``mixer(dim, device=, dtype=)``.
        mlp_ratio: hidden size of the MLP over the channels.
        layer_scale: initial factor of both branches, None for no factor.
        second_cpe: a position embedding before the MLP too.
    """

    def __init__(
        self,
        dim: int,
        *,
        mixer: Factory,
        mlp_ratio: float,
        layer_scale: float | None,
        second_cpe: bool,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.cpe1 = DepthwiseConv(dim, 3, residual=True, **dd)
        self.norm1 = LayerNorm(dim, eps=1e-6, **dd)
        self.attn = mixer(dim, **dd)
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.cpe2 = DepthwiseConv(dim, 3, residual=True, **dd) if second_cpe else None
        self.norm2 = LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = ConvMlp(dim, int(mlp_ratio * dim), **dd)
        self.scale2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x)
        x = x + self.drop_path(self.scale1(self.attn(self.norm1(x))))
        if self.cpe2 is not None:
            x = self.cpe2(x)
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class ConvStem(nn.Module):
    """Images (B, C, H, W) to (B, ceil(H / 4), ceil(W / 4), dim) by four convolutions."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        half = dim // 2
        layers: list[nn.Module] = []
        for in_dim, out_dim, stride in ((in_chans, half, 2), (half, half, 1), (half, half, 1), (half, dim, 2)):
            layers += [nn.Conv2d(in_dim, out_dim, 3, stride, padding=1, **dd), nn.BatchNorm2d(out_dim, **dd), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).permute(0, 2, 3, 1)


class ConvDownsample(nn.Module):
    """Convolution of stride 2, batch norm: (B, H, W, in_dim) to (B, ceil(H / 2), ceil(W / 2), dim)."""

    def __init__(self, in_dim: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class ProjectionHead(nn.Module):
    """Projection, batch norm and SiLU of every pixel (B, H, W, in_features), then pooling and classifier.

    Called as timm's ``ClassifierHead``, with the width of the projection in addition.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        input_fmt: str = "NHWC",
        *,
        hidden_size: int,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_features = in_features
        self.hidden_size = hidden_size
        self.input_fmt = input_fmt
        self.proj = nn.Linear(in_features, hidden_size, **dd)
        self.norm = nn.BatchNorm2d(hidden_size, **dd)
        self.act = nn.SiLU()
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type, **dd)

    def reset(self, num_classes: int, pool_type: str, device: Any = None, dtype: Any = None) -> None:
        """Replace pooling and classifier; a model that lost its last stages has no use for the projection either."""
        if isinstance(self.proj, nn.Linear) and self.in_features != self.proj.in_features:
            self.remove_projection()
        pool, classifier = create_classifier(
            self.hidden_size, num_classes, pool_type, input_fmt=self.input_fmt, device=device, dtype=dtype
        )
        self.global_pool, self.fc = pool.train(self.training), classifier.train(self.training)

    def remove_projection(self) -> None:
        """Hand the map itself to the pooling."""
        self.proj, self.norm, self.act = nn.Identity(), nn.Identity(), nn.Identity()  # type: ignore[assignment]
        self.hidden_size = self.in_features

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.norm(self.proj(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = self.drop(self.global_pool(self.act(x)))
        return x if pre_logits else self.fc(x)


class RotaryPyramid(Pyramid):
    """The model of the three families.

    Args:
        depths, dims, num_heads: blocks, channels and heads of each stage.
        mixer: called as ``mixer(dim, num_heads, linear=, device=, dtype=)``.
        linear: for each stage whether its attention is linear, or that for each of its blocks.
        mlp_ratio: hidden size of the MLP over the channels, for all stages or each.
        layer_scale: initial factor of the branches of each stage, None for a stage without.
        projection: width of the projection in front of the classifier.
        second_cpe: see ``RotaryBlock``.
        in_chans, device, dtype, pyramid: arguments of ``Pyramid``.

    Raises:
        ValueError: for a size that cannot be built, naming it.
        TypeError: for an unknown argument.
    """

    checkpoint_key = "model"
    """Averaged weights lie beside it under ``model_ema``; the authors do not say which of the two they report."""

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        num_heads: Sequence[int],
        *,
        mixer: Factory,
        linear: Sequence[bool | Sequence[bool]] = (True, True, False, False),
        mlp_ratio: float | Sequence[float] = 3.5,
        layer_scale: Sequence[float | None] = (1.0, 1.0, 1.0, 1.0),
        projection: int = 1024,
        second_cpe: bool = False,
        in_chans: int = 3,
        device: Any = None,
        dtype: Any = None,
        **pyramid: Any,
    ) -> None:
        check_heads(depths, dims, num_heads)
        mlp_ratios = [mlp_ratio] * len(depths) if isinstance(mlp_ratio, int | float) else list(mlp_ratio)
        _check_stages(depths, dims, num_heads, linear, mlp_ratios, layer_scale)
        stages = []
        for i, (dim, depth, heads) in enumerate(zip(dims, depths, num_heads, strict=True)):
            kinds = linear[i]
            block = partial(RotaryBlock, mlp_ratio=mlp_ratios[i], layer_scale=layer_scale[i], second_cpe=second_cpe)
            blocks = [
                partial(block, mixer=partial(mixer, num_heads=heads, linear=kind))
                for kind in ([kinds] * depth if isinstance(kinds, bool) else kinds)
            ]
            stages.append(
                StageSpec(dim, depth, 4 * 2**i, block=in_turn(blocks), downsample=ConvDownsample if i else None)
            )
        super().__init__(
            stem=ConvStem(in_chans, dims[0], device=device, dtype=dtype),
            stages=stages,
            norm=lambda dim, **dd: nn.Identity(),
            head=partial(ProjectionHead, hidden_size=projection),
            in_chans=in_chans,
            device=device,
            dtype=dtype,
            **pyramid,
        )

    def init_weights(self, needs_reset: bool = True) -> None:
        """Convolutions like linear layers: truncated normal (0.02) with zero bias."""
        super().init_weights(needs_reset)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As in ``Pyramid``; the projection goes with the head."""
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.head.remove_projection()
            self.head_hidden_size = self._pooled_width()
        return taken


def _check_stages(
    depths: Sequence[int],
    dims: Sequence[int],
    num_heads: Sequence[int],
    linear: Sequence[bool | Sequence[bool]],
    mlp_ratios: Sequence[float],
    layer_scale: Sequence[float | None],
) -> None:
    check_per_stage(depths, linear=linear, mlp_ratio=mlp_ratios, layer_scale=layer_scale)
    for depth, kinds in zip(depths, linear, strict=True):
        if not isinstance(kinds, bool) and len(kinds) != depth:
            raise ValueError(f"linear must have one entry for each of {depth} blocks, got {tuple(kinds)}")
    for dim, heads in zip(dims, num_heads, strict=True):
        if dim // heads % 4:
            raise ValueError(f"the rotary embedding needs heads of a multiple of 4 channels, got {dim} over {heads}")


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "depths": (2, 2, 6, 2),
        "dims": (64, 128, 256, 512),
        "num_heads": (1, 2, 4, 8),
        "drop_path_rate": 0.1,
    },
    "small": {
        "depths": (3, 5, 9, 3),
        "dims": (64, 128, 320, 512),
        "num_heads": (1, 2, 5, 8),
        "drop_path_rate": 0.15,
    },
    "base": {
        "depths": (4, 6, 12, 6),
        "dims": (96, 192, 384, 512),
        "num_heads": (1, 2, 6, 8),
        "layer_scale": (1.0, 1.0, 1e-6, 1e-6),
        "drop_path_rate": 0.4,
    },
    "large": {
        "depths": (4, 7, 19, 8),
        "dims": (96, 192, 448, 640),
        "num_heads": (1, 2, 7, 10),
        "layer_scale": (1e-6, 1e-6, 1e-6, 1e-6),
        "drop_path_rate": 0.55,
    },
}
"""What the families' variants of a size have in common."""

TEST_SIZE: dict[str, Any] = {
    "depths": (1, 1, 1, 1),
    "dims": (8, 16, 16, 24),
    "num_heads": (1, 2, 2, 2),
    "mlp_ratio": 2.0,
    "projection": 32,
}

# Official names to ours, in order.
_NAMES: list[tuple[str, str | None]] = [
    (r"\.RoPE\.angle$", None),  # computed
    (r"^extra_norms\.", None),  # of the detection backbone
    (r"^patch_embed\.proj\.", "stem.layers."),
    # upstream downsamples at the end of a stage
    *((rf"^layers\.{i}\.downsample\.reduction\.", f"stages.{i + 1}.downsample.conv.") for i in range(8)),
    *((rf"^layers\.{i}\.downsample\.norm\.", f"stages.{i + 1}.downsample.norm.") for i in range(8)),
    (r"^layers\.", "stages."),
    (r"(\.norm\d)\.norm\.", r"\1."),
    (r"\.pos\.", ".cpe1."),
    (r"\.gamma_(\d)$", r".scale\1.gamma"),
    (r"\.ffn\.dwconv\.", ".mlp.conv."),
    (r"\.ffn\.", ".mlp."),
    (r"^(proj|norm)\.", r"head.\1."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def read_official(
    state_dict: Mapping[str, Any], model: nn.Module, names: Sequence[tuple[str, str | None]] = ()
) -> dict[str, Tensor]:
    """An official checkpoint under our names, 1x1 convolutions as linear layers; ours pass unchanged.

    Args:
        names: renames of the family's own, before those that the families share.

    Raises:
        ValueError: if there are no tensors in it (see ``weights.unwrap``).
    """
    expected = model.state_dict()
    ours = weights.rename(weights.unwrap(state_dict), [*names, *_NAMES])
    return {
        # (C, D, 1, 1) to (C, D), and (1, C, 1, 1) to (C)
        name: value.reshape(expected[name].shape)
        if name in expected and value.dim() == 4 and value.numel() == expected[name].numel()
        else value
        for name, value in ours.items()
    }

"""ViG, vision gated linear attention (arXiv 2405.18425): depthwise convolution, then bidirectional gated attention.

Official code and weights: https://github.com/hustvl/ViG. Not the graph network of the same name. The directions share
queries, keys and values and differ in their gates; the convolved input stays beside the attention as a local branch.
``vig_*`` are isotropic, ``vig_h_*`` have VMamba's frame.
"""

# Annotations are not postponed here: TorchScript reads those of the functions.

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, GluMlp
from timm.models import generate_default_cfgs, register_notrace_function
from torch import Tensor, nn

from subquad.backbones import weights
from subquad.backbones.base import Isotropic, Pyramid
from subquad.backbones.frame import FRAME_NAMES, frame
from subquad.backbones.images import check_image_size
from subquad.backbones.layers import (
    DepthwiseConv,
    MapConv2d,
    check_per_stage,
    position_map,
    stage_dims,
)
from subquad.backbones.norms import AddLayerNorm, LayerNorm, StreamNorm
from subquad.backbones.registry import default_cfg, register_variants
from subquad.ops import gated_linear_attention

__all__ = ["GatedAttention", "HierarchicalViG", "HierarchicalViGBlock", "ViG", "ViGBlock"]

GATE_NORMALIZER = 16.0
GATE_RANK = 16


@register_notrace_function
def attend(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, normalizer: float, scale: float) -> Tensor:
    """Gated linear attention with gates as logits; in float32 out of float16, which sums over tokens overflow."""
    out_dtype = torch.float32 if q.dtype == torch.float16 else q.dtype
    if torch.jit.is_scripting():
        # The operator itself, because TorchScript cannot compile the checks of the public function.
        out = torch.ops.subquad.gated_linear_attention(q, k, v, gates, normalizer, scale, out_dtype)
    else:
        out = gated_linear_attention(q, k, v, gates, gate_normalizer=normalizer, scale=scale, out_dtype=out_dtype)
    return out


class _WideRMSNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its input, which may differ from that of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class GatedAttention(nn.Module):
    """Token mixer on (B, H, W, dim): convolution; attention and convolution normed, blended by a gate; projection.

    Args:
        dim: channels of the map, and of the values.
        num_heads: heads; keys have dim / 2 channels in all.
        conv_act, out_act: SiLU behind the convolution and in front of the last projection.
        halved_in_eval: halve the attention's output in eval mode. The official isotropic models do; the norm behind it
            leaves a trace in the last digits alone.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        conv_act: bool = False,
        out_act: bool = False,
        halved_in_eval: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        keys = dim // 2
        if num_heads < 1 or dim % num_heads or keys % num_heads:
            raise ValueError(f"num_heads must divide dim and dim / 2, got num_heads={num_heads}, dim={dim}")
        self.num_heads = num_heads
        self.sizes = [keys, keys, dim]
        self.scale, self.normalizer = (keys // num_heads) ** -0.5, GATE_NORMALIZER
        self.halved_in_eval = halved_in_eval
        self.conv = DepthwiseConv(dim, 3, bias=False, activation="silu" if conv_act else "none", **dd)
        self.qkv = nn.Linear(dim, sum(self.sizes), bias=False, **dd)
        self.gate_down = nn.Linear(dim, GATE_RANK, bias=False, **dd)
        self.gate_up = nn.Linear(GATE_RANK, 2 * keys, **dd)
        self.out_norm = _WideRMSNorm(dim // num_heads, eps=1e-6, **dd)
        self.local_norm = _WideRMSNorm(dim // num_heads, eps=1e-6, **dd)
        self.blend = nn.Linear(dim, dim, **dd)
        self.out_act = nn.SiLU() if out_act else nn.Identity()
        self.out_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start of the convolution; the linear layers start with the network."""
        nn.init.xavier_uniform_(self.conv.weight, gain=2**-2.5)

    def reset_projections(self) -> None:
        """Start of the linear layers in an isotropic network."""
        for layer in (self.qkv, self.gate_down, self.gate_up, self.blend, self.out_proj):
            nn.init.xavier_uniform_(layer.weight, gain=2**-2.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        tokens = x.flatten(1, 2)
        q, k, v = self.qkv(tokens).split(self.sizes, dim=-1)
        gates = self.gate_up(self.gate_down(tokens)).unflatten(-1, (2, self.num_heads, -1))
        heads = (self.num_heads, -1)
        scale = 0.5 * self.scale if self.halved_in_eval and not self.training else self.scale
        q, k, v = q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)
        y = attend(q, k, v, gates, self.normalizer, scale)
        y = self.out_norm(y).flatten(2).type_as(tokens)
        local = self.local_norm(tokens.unflatten(-1, heads)).flatten(2)
        share = torch.sigmoid(self.blend(tokens))
        y = self.out_proj(self.out_act(y * share + local * (1 - share)))
        return y.unflatten(1, (x.shape[1], x.shape[2]))


def _mlp(dim: int, multiple: int, **dd: Any) -> nn.Module:
    """SwiGLU of 8 / 3 the width, rounded up to a multiple."""
    hidden = -(-int(8 * dim / 3) // multiple) * multiple
    return GluMlp(dim, 2 * hidden, act_layer=nn.SiLU, bias=False, gate_last=False, **dd)


# Isotropic -------------------------------------------------------------------------------------------------------


class ViGBlock(nn.Module):
    """Pre-norm residual block on tokens (B, H W, dim); ``mixer`` goes to ``GatedAttention``."""

    def __init__(
        self, dim: int, *, drop_path: float = 0.0, device: Any = None, dtype: Any = None, **mixer: Any
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.RMSNorm(dim, eps=1e-6, **dd)
        self.mixer = GatedAttention(dim, **mixer, **dd)
        self.norm2 = nn.RMSNorm(dim, eps=1e-6, **dd)
        self.mlp = _mlp(dim, 256, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        y = self.mixer(self.norm1(x).unflatten(1, (height, width))).flatten(1, 2)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchStem(nn.Module):
    """Images (B, C, H, W) to (B, H', W', dim) by two convolutions with norms, strides patch_size / 2 and 2."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, **dd: Any) -> None:
        super().__init__()
        half = patch_size // 2
        self.smallest = max(1, half - 1)
        self.conv1 = nn.Conv2d(in_chans, dim // 2, half + 1, stride=half, padding=1, **dd)
        self.norm1 = StreamNorm(dim // 2, **dd)
        self.act = nn.SiLU()
        self.conv2 = MapConv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm2 = StreamNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        check_image_size(x, self.smallest)
        x = self.act(self.norm1(self.conv1(x).permute(0, 2, 3, 1)))
        return self.norm2(self.conv2(x))


class ViG(Isotropic):
    """Isotropic ViG; the defaults of the options are those of the released small model.

    Args:
        dim, depth: width and number of blocks.
        num_heads, conv_act, out_act, halved_in_eval: see ``GatedAttention``.
        img_size: size, or height and width, that the position embedding is made for; others resample it.
        patch_size: even; input pixels per token along one axis.
        in_chans, device, dtype, isotropic: arguments of ``Isotropic``.

    Raises:
        ValueError: for a size or option that cannot be built; for images too small for the stem.
        TypeError: for an unknown argument.
    """

    checkpoint_key = "model"  # what the official loader reads, though the training script also keeps averaged weights

    def __init__(
        self,
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        *,
        conv_act: bool = False,
        out_act: bool = False,
        halved_in_eval: bool = True,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        device: Any = None,
        dtype: Any = None,
        **isotropic: Any,
    ) -> None:
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if patch_size < 4 or patch_size % 2:
            raise ValueError(f"patch_size must be even and at least 4, got {patch_size}")
        if min(height, width) < patch_size:
            raise ValueError(f"img_size must be at least patch_size = {patch_size}, got {img_size}")
        if dim < 2 or depth < 1 or in_chans < 1:
            raise ValueError(
                f"dim must be at least 2, depth and in_chans 1, got dim={dim}, depth={depth}, in_chans={in_chans}"
            )
        super().__init__(
            PatchStem(in_chans, dim, patch_size, device=device, dtype=dtype),
            partial(ViGBlock, num_heads=num_heads, conv_act=conv_act, out_act=out_act, halved_in_eval=halved_in_eval),
            dim=dim,
            depth=depth,
            reduction=patch_size,
            norm=partial(nn.RMSNorm, eps=1e-6),
            pos_grid=(height // patch_size, width // patch_size),
            in_chans=in_chans,
            device=device,
            dtype=dtype,
            **isotropic,
        )

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise every parameter, as after ``to_empty``; ``needs_reset=False`` if the layers are freshly made."""
        super().init_weights(needs_reset)
        for module in self.modules():
            if isinstance(module, GatedAttention):
                module.reset_projections()

    def no_weight_decay(self) -> set[str]:
        """None: the official training decayed the position embedding too."""
        return set()


# Hierarchical ----------------------------------------------------------------------------------------------------


class HierarchicalViGBlock(nn.Module):
    """Pre-norm residual block on (B, H, W, dim); ``mixer`` goes to ``GatedAttention``."""

    def __init__(
        self, dim: int, *, drop_path: float = 0.0, device: Any = None, dtype: Any = None, **mixer: Any
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, **dd)
        self.mixer = GatedAttention(dim, **mixer, **dd)
        self.norm2 = AddLayerNorm(dim, **dd)
        self.mlp = _mlp(dim, 32, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.norm2(x, self.drop_path(self.mixer(self.norm1(x))))
        return x + self.drop_path(self.mlp(y))


class HierarchicalViG(Pyramid):
    """Hierarchical ViG; the defaults of the options are those of the released tiny model.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage, or of the first one (doubling from stage to stage).
        num_heads: heads of each stage.
        conv_act, out_act: see ``GatedAttention``.
        in_chans, device, dtype, pyramid: arguments of ``Pyramid``.

    Raises:
        ValueError: for a size or option that cannot be built, naming it.
        TypeError: for an unknown argument.
    """

    checkpoint_key = "model"  # what the official loader reads, though the training script also keeps averaged weights

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 5, 2),
        dims: int | Sequence[int] = 96,
        num_heads: Sequence[int] = (3, 6, 12, 24),
        *,
        conv_act: bool = False,
        out_act: bool = False,
        in_chans: int = 3,
        device: Any = None,
        dtype: Any = None,
        **pyramid: Any,
    ) -> None:
        dims = stage_dims(depths, dims)
        check_per_stage(depths, num_heads=num_heads)
        blocks = [
            partial(HierarchicalViGBlock, num_heads=heads, conv_act=conv_act, out_act=out_act) for heads in num_heads
        ]
        super().__init__(**frame(depths, dims, blocks, "conv", "conv", True, in_chans, device, dtype), **pyramid)


# Weights ---------------------------------------------------------------------------------------------------------

# Official names to ours, in order.
_MIXER_NAMES: list[tuple[str, str | None]] = [
    (r"\.mixer\.in_proj\.0\.", ".mixer.conv."),
    (r"\.mixer\.qkv_proj\.", ".mixer.qkv."),
    (r"\.mixer\.gk_proj\.0\.", ".mixer.gate_down."),
    (r"\.mixer\.gk_proj\.1\.", ".mixer.gate_up."),
    (r"\.mixer\.g_norm\.", ".mixer.out_norm."),
    (r"\.mixer\.l_norm\.", ".mixer.local_norm."),
    (r"\.mixer\.g_proj\.", ".mixer.blend."),
    (r"\.mixer\.o_proj\.", ".mixer.out_proj."),
]
_HIERARCHICAL_NAMES = [*FRAME_NAMES, *_MIXER_NAMES]
_ISOTROPIC_NAMES: list[tuple[str, str | None]] = [
    (r"^patch_embed\.proj\.0\.", "stem.conv1."),
    (r"^patch_embed\.proj\.1\.", "stem.norm1."),
    (r"^patch_embed\.proj\.3\.", "stem.conv2."),
    (r"^patch_embed\.proj\.4\.", "stem.norm2."),
    (r"\.attn_norm\.", ".norm1."),
    (r"\.mlp_norm\.", ".norm2."),
    (r"\.attn\.", ".mixer."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    *_MIXER_NAMES,
]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
    """An official checkpoint under our names, or ours; a position embedding is resampled for the model's grid.

    Raises:
        ValueError: if there are no tensors in it (see ``weights.unwrap``).
    """
    official = weights.unwrap(state_dict, weights.wrapper_for(model, state_dict))
    if isinstance(model, Pyramid):
        return weights.rename(official, _HIERARCHICAL_NAMES)
    ours = weights.rename(official, _ISOTROPIC_NAMES)
    if "pos_embed" in ours:
        ours["pos_embed"] = position_map(ours["pos_embed"], *model.pos_embed.shape[1:3])
    return ours


_cfg = partial(
    default_cfg,
    stride=None,
    first_conv="stem.conv1",
    classifier="head",
    license="mit",
    notes=(
        "The authors' files are in https://huggingface.co/hustvl/ViG; `subquad convert` reads them.",
        "MIT is the licence of the official code.",
    ),
    origin_url="https://github.com/hustvl/ViG",
    paper_name="ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention",
    paper_ids="arXiv:2405.18425",
)
_H: dict[str, Any] = {"stride": 32, "classifier": "head.fc"}
_TEST: dict[str, Any] = {"size": 96, "notes": ()}

default_cfgs = generate_default_cfgs(
    {
        "vig_tiny.in1k": _cfg(),
        "vig_small.in1k": _cfg(),
        "vig_base.in1k": _cfg(),
        "vig_h_tiny.in1k": _cfg(**_H),
        "vig_h_small.in1k": _cfg(**_H),
        "vig_h_base.in1k": _cfg(**_H),
        "test_vig.untrained": _cfg(**_TEST),
        "test_vig_h.untrained": _cfg(**_H, **_TEST),
    }
)

ISOTROPIC: dict[str, dict[str, Any]] = {
    "vig_tiny": {"dim": 192, "num_heads": 3, "conv_act": True, "out_act": True},
    "vig_small": {"dim": 384, "num_heads": 6, "drop_path_rate": 0.2},
    "vig_base": {"dim": 768, "num_heads": 12, "drop_path_rate": 0.5},
}
HIERARCHICAL: dict[str, dict[str, Any]] = {
    "vig_h_tiny": {"depths": (2, 2, 5, 2), "dims": 96, "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.2},
    "vig_h_small": {"depths": (2, 2, 17, 2), "dims": 96, "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.3},
    "vig_h_base": {"depths": (2, 2, 17, 2), "dims": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.6},
    "test_vig_h": {"depths": (1, 1, 1, 1), "dims": (16, 20, 28, 32), "num_heads": (2, 1, 2, 4), "conv_act": True},
}
TEST: dict[str, dict[str, Any]] = {"test_vig": {"dim": 32, "depth": 4, "num_heads": 2, "img_size": 96}}

register_variants(__name__, ViG, ISOTROPIC, checkpoint_filter_fn, out_indices=(2, 5, 8, 11))
register_variants(__name__, ViG, TEST, checkpoint_filter_fn)
register_variants(__name__, HierarchicalViG, HIERARCHICAL, checkpoint_filter_fn)

"""Swin (arXiv 2103.14030) whose first blocks mix the whole map with a mixer of linear cost.

The other blocks are timm's own: softmax attention in shifted windows.
"""

# Annotations are not postponed: torch.fx copies those of forward() into code that TorchScript has to understand.

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import resize_rel_pos_bias_table
from timm.models import generate_default_cfgs, register_notrace_function
from timm.models.swin_transformer import PatchMerging, WindowAttention
from torch import Tensor, nn

from subquad.backbones import mixers
from subquad.backbones.base import Pyramid, StageSpec
from subquad.backbones.hosts.blocks import MixerBlock, check_mixer_blocks, check_positive, map_size
from subquad.backbones.hosts.origins import host_cfg, read_host, slab_cfg
from subquad.backbones.layers import PatchEmbed, check_heads, in_turn
from subquad.backbones.mixers import find_mixer
from subquad.backbones.prepbn import find_norm
from subquad.backbones.registry import register_variants
from subquad.ops import window_attention_packed
from subquad.ops.maps import exporting

__all__ = ["MixerSwin"]


class MixerSwin(Pyramid):
    """Swin with a mixer.

    Args:
        mixer: one of ``MIXERS``.
        mixer_options: further arguments of the mixer, for each stage.
        mixer_blocks: for each stage how many of its first blocks have the mixer.
        depths, num_heads: blocks and heads of each stage.
        embed_dim: channels of the first stage; they double from stage to stage.
        img_size: size (or height and width) that position tables and windows are made for; others run too.
        window_size: side of the windows of softmax attention.
        patch_size: of the stem.
        mlp_ratio: hidden size of the MLP over the channels.
        norm, norm_steps: of every norm, see ``prepbn.find_norm``.
        in_chans, device, dtype, pyramid: arguments of ``Pyramid``.

    Raises:
        ValueError: for a size or option that cannot be built, naming it.
        TypeError: for an unknown argument.
    """

    checkpoint_key = "model"
    """What the official evaluation loads."""

    def __init__(
        self,
        mixer: str,
        mixer_blocks: Sequence[int],
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        embed_dim: int = 96,
        *,
        img_size: int | tuple[int, int] = 224,
        window_size: int = 7,
        patch_size: int = 4,
        mlp_ratio: float = 4.0,
        mixer_options: Sequence[Mapping[str, Any]] = ({}, {}, {}, {}),
        norm: str = "layer",
        norm_steps: int = 60000,
        in_chans: int = 3,
        device: Any = None,
        dtype: Any = None,
        **pyramid: Any,
    ) -> None:
        dims = [embed_dim * 2**i for i in range(len(depths))]
        check_heads(depths, dims, num_heads)
        check_mixer_blocks(depths, mixer_blocks, mixer_options)
        check_positive(window_size=window_size, patch_size=patch_size)
        make_mixer, make_norm = find_mixer(mixer), find_norm(norm, 1e-5, norm_steps)
        stages = []
        for i, (dim, depth, heads) in enumerate(zip(dims, depths, num_heads, strict=True)):
            height, width = map_size(img_size, patch_size * 2**i)
            side = min(height, width)
            # Upstream sees a map that is not square in square windows of its shorter side.
            linear = partial(
                MixerBlock,
                mixer=partial(make_mixer, **mixer_options[i], num_heads=heads, resolution=(side, side)),
                mlp_ratio=mlp_ratio,
                norm=make_norm,
                window=0 if height == width else side,
            )
            window = min(window_size, side)
            # The parity of a block's index counts all blocks of the stage.
            shifts = [window // 2 if j % 2 else 0 for j in range(depth)]
            softmax = partial(MixerBlock, mlp_ratio=mlp_ratio, norm=make_norm)
            blocks: list[Callable[..., nn.Module]] = [
                linear
                if j < mixer_blocks[i]
                else partial(softmax, mixer=partial(WindowMixer, num_heads=heads, window=window, shift=shift))
                for j, shift in enumerate(shifts)
            ]
            # timm's annotation allows classes alone; any factory serves.
            downsample = partial(PatchMerging, norm_layer=make_norm) if i else None  # type: ignore[arg-type]
            stages.append(StageSpec(dim, depth, patch_size * 2**i, block=in_turn(blocks), downsample=downsample))
        dd = {"device": device, "dtype": dtype}
        stem = PatchEmbed(in_chans, embed_dim, patch_size, make_norm, **dd)
        super().__init__(stem, stages, norm=make_norm, in_chans=in_chans, **dd, **pyramid)

    def no_weight_decay(self) -> set[str]:
        """The tables of relative positions."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}


class WindowMixer(nn.Module):
    """Swin's own mixer: attention in windows of the map, which is padded, then shifted by ``shift`` pixels.

    A map that one window covers along an axis is not shifted. The parameters are those of timm's module.
    """

    def __init__(
        self, dim: int, num_heads: int, window: int, shift: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.window = window
        self.shift = shift
        self.attn = WindowAttention(dim, num_heads, window_size=(window, window), device=device, dtype=dtype)

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        qkv = self.attn.qkv(x).unflatten(1, (feat_size[0], feat_size[1])).unflatten(-1, (3, self.attn.num_heads, -1))
        table, bias = self.attn.relative_position_bias_table, self.attn.qkv.bias
        o = attend_windows(qkv, table, bias, self.window, self.shift, self.attn.scale)
        return self.attn.proj(o.flatten(3).flatten(1, 2))


@register_notrace_function
def attend_windows(qkv: Tensor, table: Tensor, bias: Tensor, window: int, shift: int, scale: float) -> Tensor:
    """``subquad.ops.window_attention_packed`` for modules: in eager mode, in TorchScript and as a leaf of torch.fx.

    ``bias`` of the projection is what that makes of padding, which is zero before it.
    """
    pad_k: Tensor | None = None
    pad_v: Tensor | None = None
    if exporting() or qkv.shape[1] % window > 0 or qkv.shape[2] % window > 0:
        parts = bias.to(qkv.dtype).view(qkv.shape[3:]).unbind(0)
        pad_k, pad_v = parts[1], parts[2]
    if torch.jit.is_scripting():
        # The operator itself, because TorchScript cannot compile the checks of the public function.
        sides, shifts = [window, window], [shift, shift]
        found = torch.ops.subquad.window_attention(
            qkv, None, None, table, pad_k, pad_v, sides, shifts, scale, True, False, -100.0, False, False, "map"
        )
        o = found[0]
    else:
        o = window_attention_packed(
            qkv,
            window,
            shift,
            table=table,
            scale=scale,
            order="pad_roll",
            pad_k=pad_k,
            pad_v=pad_v,
            drop_shift="map",
        )
    return o


# Weights ---------------------------------------------------------------------------------------------------------

_NAMES: list[tuple[str, str | None]] = [
    *mixers.NAMES,
    (r"^patch_embed\.", "stem."),
    # upstream downsamples at the end of a stage
    *((rf"^layers\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(8)),
    (r"^layers\.", "stages."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """An official checkpoint under our names, tables resampled for the model's ``img_size``; ours pass unchanged.

    Raises:
        ValueError: if there are no tensors in it (see ``weights.unwrap``).
    """
    expected = model.state_dict()
    state = read_host(state_dict, expected, _NAMES)
    state = {_of_window(name, expected): value for name, value in state.items()}
    for name, value in state.items():
        if name.endswith("relative_position_bias_table") and name in expected and value.shape != expected[name].shape:
            side = (int(expected[name].shape[0] ** 0.5) + 1) // 2
            state[name] = resize_rel_pos_bias_table(value, (side, side), expected[name].shape)
    return state


def _of_window(name: str, expected: Mapping[str, Tensor]) -> str:
    """The name of a parameter of window attention, which lies a level deeper in our blocks."""
    deeper = name.replace(".attn.", ".attn.attn.")
    return deeper if name not in expected and deeper in expected else name


def _cfg(mixer: str, share: str = "", name: str = "", **kwargs: Any) -> dict[str, Any]:
    return host_cfg(mixer, share, f"{mixer}_swin_{name}.pth", first_conv="stem.proj", **kwargs)


def _slab(file: str) -> dict[str, Any]:
    return slab_cfg(file, first_conv="stem.proj")


_384: dict[str, Any] = {"size": 384, "crop_pct": 1.0}
_288: dict[str, Any] = {"size": 288, "crop_pct": 1.0}

default_cfgs = generate_default_cfgs(
    {
        "agent_swin_tiny.in1k": _cfg("agent", "a2ddc1190c224f768a41", "tiny"),
        "agent_swin_small.in1k": _cfg("agent", "f607172c9fea4d6e99bb", "small"),
        "agent_swin_small_288.in1k": _cfg("agent", "09760394e93b4046a25e", "small_288", **_288),
        "agent_swin_base.in1k": _cfg("agent", "4fcd2d0114bb490483c3", "base"),
        "agent_swin_base_384.in1k": _cfg("agent", "bb84ee9058954706a557", "base_384", **_384),
        "flatten_swin_tiny.in1k": _cfg("flatten", "e1518e76703e4e57a7f2", "tiny"),
        "flatten_swin_small.in1k": _cfg("flatten", "94188e52af354bf4a88b", "small"),
        "flatten_swin_base.in1k": _cfg("flatten", "7a9e5186bad04e7fb3a9", "base"),
        "flatten_swin_base_384.in1k": _cfg("flatten", "0d0330cf2e5249f1abb6", "base_384", **_384),
        "inline_swin_tiny.in1k": _cfg("inline", "32810869fcc34410966b", "tiny"),
        "inline_swin_small.in1k": _cfg("inline", "e9657fd247c04c7cb1a1", "small"),
        "inline_swin_base.in1k": _cfg("inline", "bf23564bb64c420aafe1", "base"),
        "inline_swin_base_384.untrained": _cfg("inline", **_384),
        "polaformer_swin_tiny.in1k": _cfg("polaformer"),
        "polaformer_swin_small.in1k": _cfg("polaformer"),
        "polaformer_swin_base.in1k": _cfg("polaformer"),
        "polaformer_swin_base_384.untrained": _cfg("polaformer", **_384),
        "prepbn_swin_tiny.in1k": _slab("swin_tiny_prepbn"),
        "slab_swin_tiny.in1k": _slab("slab_swin_tiny"),
        "slab_swin_small.in1k": _slab("slab_swin_small"),
        "slab_swin_base.untrained": _cfg("slab"),
        "test_flatten_swin.untrained": _cfg("flatten", size=96),
    }
)

_TINY = {"depths": (2, 2, 6, 2), "drop_path_rate": 0.2}
_SMALL = {"depths": (2, 2, 18, 2), "drop_path_rate": 0.3}
_BASE = {"depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "embed_dim": 128, "drop_path_rate": 0.5}
_BASE_384 = {**_BASE, "img_size": 384, "window_size": 12}
_HALF = (2, 2, 0, 0)
"""Stages 1 and 2."""

_AGENT = {"mixer": "agent", "mixer_options": [{"agents": n} for n in (9, 16, 49, 49)]}

VARIANTS: dict[str, dict[str, Any]] = {
    "agent_swin_tiny": {**_AGENT, "mixer_blocks": (2, 2, 6, 0), **_TINY},
    "agent_swin_small": {**_AGENT, "mixer_blocks": _HALF, **_SMALL},
    "agent_swin_small_288": {**_AGENT, "mixer_blocks": _HALF, **_SMALL, "img_size": 288, "window_size": 9},
    "agent_swin_base": {**_AGENT, "mixer_blocks": (2, 2, 2, 0), **_BASE},
    "agent_swin_base_384": {**_AGENT, "mixer_blocks": (2, 2, 2, 0), **_BASE_384},
    **{
        f"{mixer}_swin_{size}": {"mixer": mixer, "mixer_blocks": _HALF, **options}
        for mixer in ("flatten", "polaformer")
        for size, options in {"tiny": _TINY, "small": _SMALL, "base": _BASE, "base_384": _BASE_384}.items()
    },
    "inline_swin_tiny": {"mixer": "inline", "mixer_blocks": (2, 2, 6, 0), **_TINY},
    "inline_swin_small": {"mixer": "inline", "mixer_blocks": _HALF, **_SMALL},
    "inline_swin_base": {"mixer": "inline", "mixer_blocks": (2, 2, 2, 0), **_BASE},
    "inline_swin_base_384": {"mixer": "inline", "mixer_blocks": (2, 2, 2, 0), **_BASE_384},
    "prepbn_swin_tiny": {
        "mixer": "slab",
        "mixer_blocks": (0, 0, 0, 0),
        "norm": "repbn",
        **_TINY,
        "drop_path_rate": 0.1,
    },
    **{
        f"slab_swin_{size}": {"mixer": "slab", "mixer_blocks": _HALF, "norm": "prepbn", **options}
        for size, options in {"tiny": _TINY, "small": _SMALL, "base": _BASE}.items()
    },
    "test_flatten_swin": {
        "mixer": "flatten",
        "mixer_blocks": (1, 1, 1, 1),
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 2, 2, 4),
        "embed_dim": 8,
        "img_size": 96,
        "window_size": 3,
        "mlp_ratio": 2.0,
    },
}

register_variants(__name__, MixerSwin, VARIANTS, checkpoint_filter_fn)

"""CSWin (arXiv 2107.00652) whose first blocks mix the whole map with a mixer of linear cost.

In the other blocks half of the channels see vertical stripes of the map, the other half horizontal ones, by softmax
attention; where stripes would be as wide as the map, and in the last stage, all channels see the whole map. The depths
are those of the mixers' authors; original weights of CSWin do not fit.
"""

# Annotations are not postponed: torch.fx copies those of forward() into code that TorchScript has to understand.

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from subquad.backbones import mixers
from subquad.backbones.base import Pyramid, StageSpec
from subquad.backbones.hosts.blocks import check_mixer_blocks, map_size
from subquad.backbones.hosts.origins import host_cfg, read_host, slab_cfg
from subquad.backbones.hosts.stripes import CrossShapedAttention, CrossShapedBlock, softmax_attention
from subquad.backbones.layers import ConvDownsample, PatchEmbed, check_heads, in_turn
from subquad.backbones.mixers import BARE_MIXERS
from subquad.backbones.prepbn import find_norm
from subquad.backbones.registry import register_variants

__all__ = ["MixerCSWin"]


class MixerCSWin(Pyramid):
    """CSWin with a mixer.

    Args:
        mixer: one of ``BARE_MIXERS``.
        mixer_options: further arguments of the mixer, for each stage.
        mixer_blocks: for each stage how many of its first blocks have the mixer.
        mixer_stripes: width of the stripes that the mixer sees, for each stage; 0 for the whole map.
        depths, num_heads: blocks and heads of each stage.
        embed_dim: channels of the first stage; they double from stage to stage.
        stripes: width of the stripes of softmax attention, for each stage but the last.
        img_size: size (or height and width) that tables are made for, and that says where stripes cover the map.
        mlp_ratio: hidden size of the MLP over the channels.
        norm, norm_steps: of every norm, see ``prepbn.find_norm``.
        in_chans, device, dtype, pyramid: arguments of ``Pyramid``.

    Raises:
        ValueError: for a size or option that cannot be built, naming it.
        TypeError: for an unknown argument.
    """

    checkpoint_key = "model"
    """What the official evaluation loads; averaged weights lie in the same file under ``state_dict_ema``."""

    def __init__(
        self,
        mixer: str,
        mixer_blocks: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int] = (2, 4, 8, 16),
        embed_dim: int = 64,
        *,
        stripes: Sequence[int] = (1, 2, 7),
        mixer_stripes: Sequence[int] | None = None,
        mixer_options: Sequence[Mapping[str, Any]] | None = None,
        img_size: int | tuple[int, int] = 224,
        mlp_ratio: float = 4.0,
        norm: str = "layer",
        norm_steps: int = 120000,
        in_chans: int = 3,
        device: Any = None,
        dtype: Any = None,
        **pyramid: Any,
    ) -> None:
        dims = [embed_dim * 2**i for i in range(len(depths))]
        mixer_stripes = [0] * len(depths) if mixer_stripes is None else mixer_stripes
        mixer_options = [{}] * len(depths) if mixer_options is None else mixer_options
        check_heads(depths, dims, num_heads)
        _check_stages(mixer, depths, mixer_blocks, mixer_stripes, stripes, mixer_options)
        make_norm, mlp = find_norm(norm, 1e-5, norm_steps), mlp_ratio
        stages = []
        for i, (dim, depth, heads) in enumerate(zip(dims, depths, num_heads, strict=True)):
            height, width = map_size(img_size, 4 * 2**i)
            attention = partial(CrossShapedAttention, num_heads=heads, resolution=(height, width))
            linear = partial(
                attention,
                mixer=partial(BARE_MIXERS[mixer], **mixer_options[i], bare=True),
                stripe=_effective(mixer_stripes[i], height, width),
            )
            stripe = _effective(stripes[i], height, width) if i < len(depths) - 1 else 0
            softmax = partial(attention, mixer=softmax_attention, stripe=stripe)
            kinds = [linear] * mixer_blocks[i] + [softmax] * (depth - mixer_blocks[i])
            blocks = [partial(CrossShapedBlock, mixer=kind, mlp_ratio=mlp, norm=make_norm) for kind in kinds]
            downsample = partial(ConvDownsample, norm=make_norm) if i else None
            stages.append(StageSpec(dim, depth, 4 * 2**i, block=in_turn(blocks), downsample=downsample))
        dd = {"device": device, "dtype": dtype}
        stem = PatchEmbed(in_chans, embed_dim, 4, make_norm, kernel_size=7, padding=2, **dd)
        super().__init__(stem, stages, norm=make_norm, in_chans=in_chans, **dd, **pyramid)


def _effective(stripe: int, height: int, width: int) -> int:
    """The width of stripes, 0 where one would cover the map."""
    return stripe if stripe < min(height, width) else 0


def _check_stages(
    mixer: str,
    depths: Sequence[int],
    mixer_blocks: Sequence[int],
    mixer_stripes: Sequence[int],
    stripes: Sequence[int],
    mixer_options: Sequence[Mapping[str, Any]],
) -> None:
    if mixer not in BARE_MIXERS:
        raise ValueError(f"unknown mixer {mixer!r} for CSWin, expected one of {list(BARE_MIXERS)}")
    if len(stripes) < len(depths) - 1 or any(width < 1 for width in stripes):
        raise ValueError(f"stripes must have a width for each of {len(depths)} stages but the last, got {stripes}")
    if len(mixer_stripes) != len(depths) or any(width < 0 for width in mixer_stripes):
        raise ValueError(f"mixer_stripes must have a width for each of {len(depths)} stages, got {mixer_stripes}")
    check_mixer_blocks(depths, mixer_blocks, mixer_options)
    if mixer == "inline" and any(mixer_stripes):
        raise ValueError(f"inline predicts one kernel for the whole map, got mixer_stripes={tuple(mixer_stripes)}")


# Weights ---------------------------------------------------------------------------------------------------------

_NAMES: list[tuple[str, str | None]] = [
    (r"\.attns\.(\d+)\.get_v\.", r".attn.branches.\1.lepe."),
    (r"\.attns\.(\d+)\.", r".attn.branches.\1.attn."),
    *mixers.NAMES,
    (r"^stage1_conv_embed\.0\.", "stem.proj."),
    (r"^stage1_conv_embed\.2\.", "stem.norm."),
    *((rf"^merge{i}\.", f"stages.{i}.downsample.") for i in range(1, 8)),
    *((rf"^stage{i + 1}\.(\d+)\.(qkv|proj)\.", rf"stages.{i}.blocks.\1.attn.\2.") for i in range(8)),
    *((rf"^stage{i + 1}\.", f"stages.{i}.blocks.") for i in range(8)),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """An official checkpoint under our names, tables resampled for the model's ``img_size``; ours pass unchanged.

    Raises:
        ValueError: if there are no tensors in it (see ``weights.unwrap``).
    """
    expected = model.state_dict()
    state = read_host(state_dict, expected, _NAMES)
    # SLAB's checkpoints have scales in this host, which nothing uses.
    return {name: value for name, value in state.items() if name in expected or not name.endswith(".attn.scale")}


def _cfg(mixer: str, share: str = "", name: str = "", **kwargs: Any) -> dict[str, Any]:
    return host_cfg(mixer, share, f"{mixer}_cswin_{name}.pth", first_conv="stem.proj", **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "agent_cswin_tiny.in1k": _cfg("agent", "8c562a74441e46d5902b", "tiny"),
        "agent_cswin_small.in1k": _cfg("agent", "30eb8af675bc4b7a8747", "small"),
        "agent_cswin_base.in1k": _cfg("agent", "c8035b0839b2410c8c9f", "base"),
        "agent_cswin_base_384.in1k": _cfg("agent", "1239be0df44b47719432", "base_384", size=384),
        "flatten_cswin_tiny.in1k": _cfg("flatten", "48ba765ba8b0451d9d5a", "tiny"),
        "flatten_cswin_small.untrained": _cfg("flatten"),
        "flatten_cswin_base.untrained": _cfg("flatten"),
        "flatten_cswin_base_384.untrained": _cfg("flatten", size=384),
        "inline_cswin_tiny.in1k": _cfg("inline", "49fa2ecc543647c4b970", "tiny"),
        "inline_cswin_small.in1k": _cfg("inline", "59f4e65f776f4052b93c", "small"),
        "inline_cswin_base.in1k": _cfg("inline", "91e17121df284ae38521", "base"),
        "inline_cswin_base_384.untrained": _cfg("inline", size=384),
        "slab_cswin_tiny.in1k": slab_cfg("slab_cswin_tiny", first_conv="stem.proj"),
        "slab_cswin_small.untrained": _cfg("slab"),
        "test_slab_cswin.untrained": _cfg("slab", size=96),
    }
)

_TINY: dict[str, Any] = {"depths": (2, 4, 18, 1), "drop_path_rate": 0.2}
_SMALL: dict[str, Any] = {"depths": (3, 6, 29, 2), "drop_path_rate": 0.4}
_BASE: dict[str, Any] = {
    "depths": (3, 6, 29, 2),
    "num_heads": (4, 8, 16, 32),
    "embed_dim": 96,
    "drop_path_rate": 0.5,
}
_BASE_384: dict[str, Any] = {**_BASE, "img_size": 384, "stripes": (1, 2, 12), "drop_path_rate": 0.7}
_SMALL_24: dict[str, Any] = {"depths": (2, 4, 32, 2), "drop_path_rate": 0.4}
_SIZES = {"tiny": _TINY, "small": _SMALL, "base": _BASE, "base_384": _BASE_384}
_MIXERS: dict[str, dict[str, Any]] = {
    "agent": {"mixer": "agent", "mixer_options": [{"agents": n} for n in (9, 16, 49, 49)]},
    "flatten": {"mixer": "flatten"},
    "inline": {"mixer": "inline"},
    "slab": {"mixer": "slab", "norm": "prepbn"},
}


def _variant(mixer: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The mixer in all blocks of the first two stages."""
    return {**_MIXERS[mixer], "mixer_blocks": (*sizes["depths"][:2], 0, 0), **sizes}


VARIANTS: dict[str, dict[str, Any]] = {
    f"{mixer}_cswin_{size}": _variant(mixer, options)
    for mixer, sizes in {
        "agent": _SIZES,
        "flatten": {**_SIZES, "small": _SMALL_24},
        "inline": _SIZES,
        "slab": {"tiny": {**_TINY, "drop_path_rate": 0.1}, "small": {**_SMALL_24, "drop_path_rate": 0.3}},
    }.items()
    for size, options in sizes.items()
} | {
    "test_slab_cswin": {
        **_MIXERS["slab"],
        "mixer_blocks": (1, 0, 1, 0),
        "mixer_stripes": (0, 0, 2, 0),
        "depths": (1, 1, 1, 1),
        "num_heads": (2, 2, 2, 4),
        "embed_dim": 8,
        "stripes": (1, 2, 2),
        "img_size": 96,
        "mlp_ratio": 2.0,
    },
}

register_variants(__name__, MixerCSWin, VARIANTS, checkpoint_filter_fn)

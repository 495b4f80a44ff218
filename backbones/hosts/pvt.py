"""PVT (arXiv 2102.12122) with a mixer of linear cost in every block, as their authors have it: without a class token.

Where a stage keeps softmax attention, it is timm's attention of PVT v2, which is that of PVT for the options used here.
"""

# Annotations are not postponed: torch.fx copies those of forward() into code that TorchScript has to understand.

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs
from timm.models.pvt_v2 import Attention
from torch import Tensor, nn

from subquad.backbones import mixers
from subquad.backbones.base import Factory, Pyramid, StageSpec, resample_position
from subquad.backbones.hosts.blocks import MixerBlock, check_positive, map_size
from subquad.backbones.hosts.origins import host_cfg, read_host, slab_cfg
from subquad.backbones.layers import PatchEmbed, check_heads, check_per_stage, position_map
from subquad.backbones.mixers import find_mixer
from subquad.backbones.prepbn import find_norm
from subquad.backbones.registry import register_variants

__all__ = ["MixerPVT"]


class PositionedPatchEmbed(nn.Module):
    """Patches of images (B, C, H, W) or maps (B, H, W, C) as a map (B, H / p, W / p, dim), with learned positions."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        *,
        patch_size: int,
        resolution: tuple[int, int],
        of_images: bool,
        norm: Factory,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.of_images = of_images
        self.embed = PatchEmbed(in_dim, dim, patch_size, norm, **dd)
        self.position = nn.Parameter(torch.empty(1, *resolution, dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Positions start as linear layers do."""
        trunc_normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x if self.of_images else x.permute(0, 3, 1, 2))
        return x + resample_position(self.position, x.shape[1], x.shape[2], "bilinear")


def reduced_attention(dim: int, num_heads: int, sr_ratio: int, norm: Factory, **dd: Any) -> nn.Module:
    """timm's attention of PVT v2, with another norm for the reduced map."""
    attention = Attention(dim, num_heads, sr_ratio=sr_ratio, **dd)
    if sr_ratio > 1:
        attention.norm = norm(dim, **dd)  # type: ignore[assignment]
    return attention


class MixerPVT(Pyramid):
    """PVT with a mixer.

    Args:
        mixer: one of ``MIXERS``.
        mixer_options: further arguments of the mixer, for each stage.
        depths, dims, num_heads, mlp_ratios: blocks, channels, heads and relative width of the MLP of each stage.
        mixer_stages: which stages have the mixer; the others have softmax attention.
        sr_ratios: by how much softmax attention reduces the map of its keys, for each stage.
        img_size: size (or height and width) that position tables are made for; others run too.
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
        depths: Sequence[int],
        dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        *,
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        mixer_stages: Sequence[bool] = (True, True, True, True),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        img_size: int | tuple[int, int] = 224,
        mixer_options: Sequence[Mapping[str, Any]] = ({}, {}, {}, {}),
        norm: str = "layer",
        norm_steps: int = 300000,
        in_chans: int = 3,
        device: Any = None,
        dtype: Any = None,
        **pyramid: Any,
    ) -> None:
        check_heads(depths, dims, num_heads)
        check_per_stage(depths, mlp_ratios=mlp_ratios, mixer_stages=mixer_stages, sr_ratios=sr_ratios)
        check_per_stage(depths, mixer_options=mixer_options)
        check_positive(sr_ratios=min(sr_ratios))
        make_mixer, block_norm = find_mixer(mixer), find_norm(norm, 1e-6, norm_steps)
        # Elsewhere PVT's layer norms have the default eps; those that hand over to a batch norm do not.
        other_norm = find_norm(norm, 1e-5, norm_steps) if norm == "layer" else block_norm
        dd = {"device": device, "dtype": dtype}
        stages, embeds = [], []
        for i, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
            resolution = map_size(img_size, 4 * 2**i)
            embeds.append(
                partial(
                    PositionedPatchEmbed,
                    patch_size=2 if i else 4,
                    resolution=resolution,
                    of_images=i == 0,
                    norm=other_norm,
                )
            )
            attention: Factory
            if mixer_stages[i]:
                attention = partial(make_mixer, **mixer_options[i], num_heads=heads, resolution=resolution)
            else:
                attention = partial(reduced_attention, num_heads=heads, sr_ratio=sr_ratios[i], norm=other_norm)
            block = partial(MixerBlock, mixer=attention, mlp_ratio=mlp_ratios[i], norm=block_norm)
            stages.append(StageSpec(dim, depths[i], 4 * 2**i, block=block, downsample=embeds[i] if i else None))
        super().__init__(
            stem=embeds[0](in_chans, dims[0], **dd),
            stages=stages,
            norm=lambda dim, **dd: nn.Identity(),
            in_chans=in_chans,
            **dd,
            **pyramid,
        )


# Weights ---------------------------------------------------------------------------------------------------------

_NAMES: list[tuple[str, str | None]] = [
    *mixers.NAMES,
    (r"^norm\.", None),  # in some checkpoints, never used
    (r"^pos_embed1$", "stem.position"),
    (r"^patch_embed1\.", "stem.embed."),
    *((rf"^pos_embed{i + 1}$", f"stages.{i}.downsample.position") for i in range(1, 4)),
    *((rf"^patch_embed{i + 1}\.", f"stages.{i}.downsample.embed.") for i in range(1, 4)),
    *((rf"^block{i + 1}\.", f"stages.{i}.blocks.") for i in range(4)),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]
_POSITIONS = ("stem.position", "downsample.position")


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """An official checkpoint under our names, tables resampled for the model's ``img_size``; ours pass unchanged.

    Raises:
        ValueError: if there are no tensors in it (see ``weights.unwrap``).
    """
    expected = model.state_dict()
    state = read_host(state_dict, expected, _NAMES)
    return {
        name: position_map(value, *expected[name].shape[1:3]) if name.endswith(_POSITIONS) else value
        for name, value in state.items()
    }


def _cfg(mixer: str, share: str = "", name: str = "", **kwargs: Any) -> dict[str, Any]:
    return host_cfg(mixer, share, f"{mixer}_pvt_{name}.pth", first_conv="stem.embed.proj", **kwargs)


def _slab(file: str) -> dict[str, Any]:
    return slab_cfg(file, first_conv="stem.embed.proj")


default_cfgs = generate_default_cfgs(
    {
        "agent_pvt_tiny.in1k": _cfg("agent", "13fdf0e0a7c5498c934f", "tiny"),
        "agent_pvt_small.in1k": _cfg("agent", "36b8be9a8863456685a3", "small"),
        "agent_pvt_medium.in1k": _cfg("agent", "4d00ecacf18b45f9b88c", "medium"),
        "agent_pvt_medium_256.in1k": _cfg("agent", "654df734121643b19c52", "medium_256", size=256),
        "agent_pvt_large.in1k": _cfg("agent", "040cfe0cfbbe4762ad09", "large"),
        "flatten_pvt_tiny.in1k": _cfg("flatten", "3ab1d773f19d45648690", "tiny"),
        "flatten_pvt_small.untrained": _cfg("flatten"),
        "flatten_pvt_medium.untrained": _cfg("flatten"),
        "flatten_pvt_large.untrained": _cfg("flatten"),
        "inline_pvt_tiny.in1k": _cfg("inline", "90ac52b1555b401eb5e6", "tiny"),
        "inline_pvt_small.in1k": _cfg("inline", "1ab953b2479d433080a3", "small"),
        "inline_pvt_medium.in1k": _cfg("inline", "a72aec31e6084bc0a280", "medium"),
        "inline_pvt_large.in1k": _cfg("inline", "efd91318ba964f01b288", "large"),
        "polaformer_pvt_tiny.in1k": _cfg("polaformer"),
        "polaformer_pvt_small.in1k": _cfg("polaformer"),
        "polaformer_pvt_medium.untrained": _cfg("polaformer"),
        "polaformer_pvt_large.untrained": _cfg("polaformer"),
        "prepbn_pvt_tiny.in1k": _slab("pvt_tiny_prepbn"),
        "prepbn_pvt_small.in1k": _slab("pvt_small_prepbn"),
        "prepbn_pvt_medium.in1k": _slab("pvt_medium_prepbn"),
        "slab_pvt_tiny.in1k": _slab("slab_pvt_tiny"),
        "slab_pvt_small.untrained": _cfg("slab"),
        "slab_pvt_medium.untrained": _cfg("slab"),
        "test_inline_pvt.untrained": _cfg("inline", size=96),
        "test_slab_pvt.untrained": _cfg("slab", size=96),
    }
)

_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"depths": (2, 2, 2, 2), "drop_path_rate": 0.1},
    "small": {"depths": (3, 4, 6, 3), "drop_path_rate": 0.1},
    "medium": {"depths": (3, 4, 18, 3), "drop_path_rate": 0.3},
    "large": {"depths": (3, 8, 27, 3), "drop_path_rate": 0.3},
}
_TEST_SIZES: dict[str, Any] = {
    "depths": (1, 1, 1, 1),
    "dims": (8, 16, 16, 24),
    "num_heads": (1, 2, 2, 2),
    "mlp_ratios": (2, 2, 2, 2),
    "mixer_stages": (True, True, True, False),
    "img_size": 96,
}
_HEADS: dict[str, dict[str, Any]] = {"flatten": {}, "inline": {"num_heads": (2, 4, 10, 16)}, "polaformer": {}}

_AGENT: dict[str, Any] = {"mixer": "agent", "mixer_options": [{"agents": n} for n in (9, 16, 49, 49)]}

# The authors call the largest one base as well as large.
VARIANTS: dict[str, dict[str, Any]] = {
    **{
        f"{mixer}_pvt_{size}": {"mixer": mixer, **heads, **options}
        for mixer, heads in _HEADS.items()
        for size, options in _SIZES.items()
    },
    **{f"agent_pvt_{size}": {**_AGENT, **options} for size, options in _SIZES.items()},
    "agent_pvt_medium_256": {**_AGENT, **_SIZES["medium"], "img_size": 256},
    **{
        f"{name}_pvt_{size}": {"mixer": "slab", "norm": "prepbn", **stages, **_SIZES[size], "drop_path_rate": rate}
        for name, stages in {"slab": {}, "prepbn": {"mixer_stages": (False, False, False, False)}}.items()
        for size, rate in {"tiny": 0.0, "small": 0.1, "medium": 0.3}.items()
    },
    "test_inline_pvt": {"mixer": "inline", **_TEST_SIZES},
    "test_slab_pvt": {"mixer": "slab", "norm": "prepbn", **_TEST_SIZES},
}

register_variants(__name__, MixerPVT, VARIANTS, checkpoint_filter_fn)

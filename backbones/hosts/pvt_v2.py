"""PVT v2 (arXiv 2106.13797) with a mixer of linear cost in every block; its patch embedding is timm's.

A norm ends each stage: what the next stage, a detector or ``features_only`` gets is normalised.
"""

# Annotations are not postponed: torch.fx copies those of forward() into code that TorchScript has to understand.

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from timm.models import generate_default_cfgs
from timm.models.pvt_v2 import OverlapPatchEmbed
from torch import Tensor, nn

from subquad.backbones import mixers
from subquad.backbones.base import Factory, Pyramid, StageSpec
from subquad.backbones.hosts.blocks import MixerBlock, map_size
from subquad.backbones.hosts.origins import host_cfg, read_host
from subquad.backbones.layers import DepthwiseConv, check_heads, check_per_stage, in_turn
from subquad.backbones.mixers import find_mixer
from subquad.backbones.prepbn import find_norm
from subquad.backbones.registry import register_variants

__all__ = ["MixerPVT2"]


class DepthwiseMlp(nn.Module):
    """MLP on maps (B, H, W, dim) with a depthwise convolution in front of its activation."""

    def __init__(self, dim: int, hidden: int, **dd: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.conv = DepthwiseConv(hidden, 3, activation="gelu", **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.conv(self.fc1(x)))


def overlapping_patches(in_dim: int, dim: int, patch_size: int, stride: int, norm: Factory, **dd: Any) -> nn.Module:
    """timm's patch embedding of PVT v2, with another norm."""
    embed = OverlapPatchEmbed(patch_size, stride, in_dim, dim, **dd)
    embed.norm = norm(dim, **dd)  # type: ignore[assignment]
    return embed


class OverlapDownsample(nn.Module):
    """Overlapping patches, of stride 2, on maps (B, H, W, in_dim)."""

    def __init__(self, in_dim: int, dim: int, norm: Factory, **dd: Any) -> None:
        super().__init__()
        self.embed = overlapping_patches(in_dim, dim, 3, 2, norm, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x.permute(0, 3, 1, 2))


class MixerPVT2(Pyramid):
    """PVT v2 with a mixer.

    Args:
        mixer: one of ``MIXERS``.
        mixer_options: further arguments of the mixer, for each stage.
        depths, dims, num_heads, mlp_ratios: blocks, channels, heads and relative width of the MLP of each stage.
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
        check_per_stage(depths, mlp_ratios=mlp_ratios, mixer_options=mixer_options)
        make_mixer, block_norm = find_mixer(mixer), find_norm(norm, 1e-6, norm_steps)
        # Elsewhere PVT's layer norms have the default eps; those that hand over to a batch norm do not.
        patch_norm = find_norm(norm, 1e-5, norm_steps) if norm == "layer" else block_norm
        stages = []
        for i, (dim, depth, heads) in enumerate(zip(dims, depths, num_heads, strict=True)):
            resolution = map_size(img_size, 4 * 2**i)
            block = partial(
                MixerBlock,
                mixer=partial(make_mixer, **mixer_options[i], num_heads=heads, resolution=resolution),
                mlp=DepthwiseMlp,
                mlp_ratio=mlp_ratios[i],
                norm=block_norm,
            )
            blocks = [*[block] * (depth - 1), partial(block, out_norm=True)]
            downsample = partial(OverlapDownsample, norm=patch_norm) if i else None
            stages.append(StageSpec(dim, depth, 4 * 2**i, block=in_turn(blocks), downsample=downsample))
        super().__init__(
            overlapping_patches(in_chans, dims[0], 7, 4, patch_norm, device=device, dtype=dtype),
            stages,
            norm=lambda dim, **dd: nn.Identity(),
            in_chans=in_chans,
            device=device,
            dtype=dtype,
            **pyramid,
        )

    def init_weights(self, needs_reset: bool = True) -> None:
        """Convolutions normal, scaled to their outputs, with zero bias."""
        super().init_weights(needs_reset)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                outputs = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0, math.sqrt(2 / outputs))
                nn.init.zeros_(module.bias)


# Weights ---------------------------------------------------------------------------------------------------------

_NAMES: list[tuple[str, str | None]] = [
    *mixers.NAMES,
    (r"^patch_embed1\.", "stem."),
    *((rf"^patch_embed{i + 1}\.", f"stages.{i}.downsample.embed.") for i in range(1, 4)),
    *((rf"^block{i + 1}\.", f"stages.{i}.blocks.") for i in range(4)),
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.conv."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """An official checkpoint under our names, tables resampled for the model's ``img_size``; ours pass unchanged.

    Raises:
        ValueError: if there are no tensors in it (see ``weights.unwrap``).
    """
    depths = [len(stage.blocks) for stage in model.stages]  # type: ignore[union-attr]
    norms = [(rf"^norm{i + 1}\.", f"stages.{i}.blocks.{depth - 1}.out_norm.") for i, depth in enumerate(depths)]
    return read_host(state_dict, model.state_dict(), [*_NAMES, *norms])


def _cfg(mixer: str, share: str = "", **kwargs: Any) -> dict[str, Any]:
    return host_cfg(mixer, share, f"{mixer}_pvt_v2_b0.pth", first_conv="stem.proj", **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "flatten_pvt_v2_b0.in1k": _cfg("flatten", "5d1f01532b104da28e7b"),
        **{f"flatten_pvt_v2_b{i}.untrained": _cfg("flatten") for i in range(1, 5)},
        **{f"slab_pvt_v2_b{i}.untrained": _cfg("slab") for i in range(6)},
    }
)

_SIZES: dict[str, dict[str, Any]] = {
    "b0": {"depths": (2, 2, 2, 2), "dims": (32, 64, 160, 256), "drop_path_rate": 0.1},
    "b1": {"depths": (2, 2, 2, 2), "drop_path_rate": 0.1},
    "b2": {"depths": (3, 4, 6, 3), "drop_path_rate": 0.1},
    "b3": {"depths": (3, 4, 18, 3), "drop_path_rate": 0.3},
    "b4": {"depths": (3, 8, 27, 3), "drop_path_rate": 0.3},
}
_B5: dict[str, Any] = {"depths": (3, 6, 40, 3), "mlp_ratios": (4, 4, 4, 4), "drop_path_rate": 0.3}

# Of SLAB's the authors have the sizes, without training settings: the rates are FLatten's, b5's that of b4.
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"flatten_pvt_v2_{size}": {"mixer": "flatten", **options} for size, options in _SIZES.items()},
    **{
        f"slab_pvt_v2_{size}": {"mixer": "slab", "norm": "prepbn", **options}
        for size, options in {**_SIZES, "b5": _B5}.items()
    },
}

register_variants(__name__, MixerPVT2, VARIANTS, checkpoint_filter_fn)

"""DeiT (arXiv 2012.12877), a plain vision transformer with a class token, with a mixer of linear cost in every block.

The sizes are those of the mixer's authors, smaller than DeiT's for larger images.
"""

# Annotations are not postponed: torch.fx copies those of forward() into code that TorchScript has to understand.

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from subquad.backbones import mixers
from subquad.backbones.base import Factory, Isotropic
from subquad.backbones.hosts.blocks import SoftmaxAttention, TokenBlock, check_positive, map_size
from subquad.backbones.hosts.origins import host_cfg, read_host, slab_cfg
from subquad.backbones.layers import PatchEmbed, in_turn, position_map
from subquad.backbones.mixers import PREFIX_MIXERS, find_mixer
from subquad.backbones.prepbn import find_norm
from subquad.backbones.registry import register_variants

__all__ = ["MixerDeiT"]


class MixerDeiT(Isotropic):
    """DeiT with a mixer.

    Args:
        mixer: one of ``PREFIX_MIXERS``, those that know what to do with a class token, or ``"softmax"``, DeiT's own;
            without a class token one of ``MIXERS``.
        dim, depth, num_heads, mlp_ratio: width, number of blocks, heads, hidden size of the MLP over the width.
        agents: of the agent mixer, for each block; None for a block with softmax attention.
        patch_size: pixels per token along one axis.
        img_size: size (or height and width) that the position embedding is made for; others run too.
        class_token: whether there is one, in front of the others.
        norm, norm_steps: of every norm, see ``prepbn.find_norm``.
        global_pool: as in ``Isotropic``, by default the class token or, without one, the mean.
        in_chans, device, dtype, isotropic: arguments of ``Isotropic``.

    Raises:
        ValueError: for a size or option that cannot be built, naming it.
        TypeError: for an unknown argument.
    """

    checkpoint_key = "model"
    """What the official evaluation loads."""

    def __init__(
        self,
        mixer: str,
        dim: int,
        num_heads: int,
        *,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        agents: Sequence[int | None] | None = None,
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        class_token: bool = True,
        norm: str = "layer",
        norm_steps: int = 60000,
        in_chans: int = 3,
        global_pool: str | None = None,
        device: Any = None,
        dtype: Any = None,
        **isotropic: Any,
    ) -> None:
        if agents is not None and len(agents) != depth:
            raise ValueError(f"agents must have one entry for each of {depth} blocks, got {tuple(agents)}")
        if agents is not None and mixer != "agent":
            raise ValueError(f"agents are for the mixer 'agent', got mixer={mixer!r}")
        check_positive(dim=dim, depth=depth, patch_size=patch_size)
        height, width = map_size(img_size, patch_size)
        attention = partial(_find_mixer(mixer, class_token), num_heads=num_heads, resolution=(height, width))
        softmax = partial(SoftmaxAttention, num_heads=num_heads)
        kinds: list[Factory] = [softmax if mixer == "softmax" else attention] * depth
        if agents is not None:
            kinds = [softmax if number is None else partial(attention, agents=number) for number in agents]
        make_norm = find_norm(norm, 1e-6, norm_steps)
        super().__init__(
            PatchEmbed(in_chans, dim, patch_size, norm=None, device=device, dtype=dtype),
            in_turn([partial(TokenBlock, mixer=kind, mlp_ratio=mlp_ratio, norm=make_norm) for kind in kinds]),
            dim=dim,
            depth=depth,
            reduction=patch_size,
            norm=make_norm,
            pos_grid=(height, width),
            num_prefix_tokens=int(class_token),
            in_chans=in_chans,
            global_pool=global_pool if global_pool is not None else "token" if class_token else "avg",
            device=device,
            dtype=dtype,
            **isotropic,
        )


def _find_mixer(name: str, class_token: bool) -> Factory:
    """The mixer of that name, one that takes a class token where there is one."""
    if name == "softmax":
        return SoftmaxAttention
    if not class_token:
        return find_mixer(name)
    if name not in PREFIX_MIXERS:
        raise ValueError(f"mixer must be one of {[*PREFIX_MIXERS, 'softmax']} with a class token, got {name!r}")
    return partial(PREFIX_MIXERS[name], prefix_tokens=1)


# Weights ---------------------------------------------------------------------------------------------------------

_NAMES: list[tuple[str, str | None]] = [*mixers.NAMES, (r"^patch_embed\.", "stem."), (r"^cls_token$", "prefix_tokens")]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """An official checkpoint under our names, positions resampled for the model's ``img_size``; ours pass unchanged.

    Raises:
        ValueError: if there are no tensors in it (see ``weights.unwrap``).
    """
    expected = model.state_dict()
    state = read_host(state_dict, expected, _NAMES)
    if "prefix_tokens" not in expected:
        state.pop("prefix_tokens", None)  # in SLAB's checkpoints, never used
    positions = state.get("pos_embed")
    if positions is not None and positions.dim() == 3 and "prefix_tokens" in state:
        # The class token's own position is added to it once and for all.
        state["prefix_tokens"] = state["prefix_tokens"] + positions[:, :1]
        state["pos_embed"] = position_map(positions[:, 1:], *expected["pos_embed"].shape[1:3])
    elif positions is not None:
        state["pos_embed"] = position_map(positions, *expected["pos_embed"].shape[1:3])
    return state


def _cfg(mixer: str, size: int, share: str, name: str) -> dict[str, Any]:
    file = f"{mixer}_deit_{name}.pth"
    return host_cfg(mixer, share, file, size=size, stride=16, first_conv="stem.proj", classifier="head")


def _slab(file: str) -> dict[str, Any]:
    return slab_cfg(file, first_conv="stem.proj", classifier="head", stride=16)


default_cfgs = generate_default_cfgs(
    {
        "agent_deit_tiny.in1k": _cfg("agent", 224, "57e0904221824ee7b7af", "tiny"),
        "agent_deit_small.in1k": _cfg("agent", 224, "fdd43304372541db8ea7", "small"),
        "agent_deit_small_448.in1k": _cfg("agent", 448, "a228f86241c445f1969b", "small_448"),
        "agent_deit_base.in1k": _cfg("agent", 224, "5115f15fdd7e4ab58fbc", "base"),
        "inline_deit_tiny.in1k": _cfg("inline", 224, "1d6b8191ad6d4114b291", "tiny"),
        "inline_deit_small.in1k": _cfg("inline", 288, "2f3898b07e9247f3beb3", "small"),
        "inline_deit_base.in1k": _cfg("inline", 448, "10bdd726d4b0435eb34e", "base"),
        "prepbn_deit_tiny.in1k": _slab("deit_tiny_prepbn"),
        "prepbn_deit_small.in1k": _slab("deit_small_prepbn"),
        "slab_deit_tiny.in1k": _slab("slab_deit_tiny"),
        "slab_deit_small.in1k": _slab("slab_deit_small"),
    }
)

_AGENT_SMALL: dict[str, Any] = {"mixer": "agent", "dim": 384, "num_heads": 6, "drop_path_rate": 0.1}
_FOUR_OF_81 = (*[81] * 4, *[None] * 8)

VARIANTS: dict[str, dict[str, Any]] = {
    "agent_deit_tiny": {"mixer": "agent", "dim": 192, "num_heads": 3},
    "agent_deit_small": _AGENT_SMALL,
    "agent_deit_small_448": {**_AGENT_SMALL, "img_size": 448},
    "agent_deit_base": {
        "mixer": "agent",
        "dim": 768,
        "num_heads": 12,
        "agents": _FOUR_OF_81,
        "drop_path_rate": 0.3,
    },
    "inline_deit_tiny": {"mixer": "inline", "dim": 192, "num_heads": 6, "drop_path_rate": 0.1},
    "inline_deit_small": {"mixer": "inline", "dim": 320, "num_heads": 10, "img_size": 288, "drop_path_rate": 0.1},
    "inline_deit_base": {"mixer": "inline", "dim": 384, "num_heads": 12, "img_size": 448, "drop_path_rate": 0.1},
    "prepbn_deit_tiny": {"mixer": "softmax", "dim": 192, "num_heads": 3, "norm": "repbn"},
    "prepbn_deit_small": {"mixer": "softmax", "dim": 384, "num_heads": 6, "norm": "prepbn"},
    "slab_deit_tiny": {"mixer": "slab", "dim": 192, "num_heads": 3, "norm": "prepbn", "class_token": False},
    "slab_deit_small": {"mixer": "slab", "dim": 384, "num_heads": 6, "norm": "prepbn", "class_token": False},
}

register_variants(__name__, MixerDeiT, VARIANTS, checkpoint_filter_fn, out_indices=(2, 5, 8, 11))

"""DeiT (arXiv 2012.12877), a plain vision transformer with a class token, with a mixer of linear cost in every block.

The sizes are those of the mixer's authors, smaller than DeiT's for larger images.
"""

# Annotations are not postponed: torch.fx copies those of forward() into code that TorchScript has to understand.

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers import DropPath, Mlp, to_2tuple
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from subquad.backbones import mixers, weights
from subquad.backbones.base import Factory, Isotropic, resample_position
from subquad.backbones.hosts.origins import host_cfg
from subquad.backbones.layers import PatchEmbed, in_turn
from subquad.backbones.mixers import PREFIX_MIXERS
from subquad.backbones.registry import register_variants

__all__ = ["MixerDeiT"]


class TokenBlock(nn.Module):
    """Pre-norm residual block on tokens (B, N, dim), prefix tokens in front: a mixer and an MLP."""

    def __init__(
        self,
        dim: int,
        *,
        mixer: Factory,
        mlp_ratio: float,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = mixer(dim, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), [height, width]))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SoftmaxAttention(nn.Module):
    """DeiT's own mixer, called as the others are."""

    def __init__(self, dim: int, num_heads: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3)  # (B, heads, 3, N, d)
        o = F.scaled_dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return self.proj(o.transpose(1, 2).flatten(2))


class MixerDeiT(Isotropic):
    """DeiT with a mixer.

    Args:
        mixer: one of ``PREFIX_MIXERS``, those that know what to do with a class token.
        dim, depth, num_heads, mlp_ratio: width, number of blocks, heads, hidden size of the MLP over the width.
        agents: of the agent mixer, for each block; None for a block with softmax attention.
        patch_size: pixels per token along one axis.
        img_size: size (or height and width) that the position embedding is made for; others run too.
        in_chans, global_pool, device, dtype, isotropic: arguments of ``Isotropic``.

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
        in_chans: int = 3,
        global_pool: str = "token",
        device: Any = None,
        dtype: Any = None,
        **isotropic: Any,
    ) -> None:
        if mixer not in PREFIX_MIXERS:
            raise ValueError(f"mixer must be one of {list(PREFIX_MIXERS)}, got {mixer!r}")
        if agents is not None and len(agents) != depth:
            raise ValueError(f"agents must have one entry for each of {depth} blocks, got {tuple(agents)}")
        height, width = (max(1, side // patch_size) for side in to_2tuple(img_size))
        attention = partial(PREFIX_MIXERS[mixer], num_heads=num_heads, resolution=(height, width), prefix_tokens=1)
        softmax = partial(SoftmaxAttention, num_heads=num_heads)
        kinds: list[Factory] = [attention] * depth
        if agents is not None:
            kinds = [softmax if number is None else partial(attention, agents=number) for number in agents]
        super().__init__(
            PatchEmbed(in_chans, dim, patch_size, norm=False, device=device, dtype=dtype),
            in_turn([partial(TokenBlock, mixer=kind, mlp_ratio=mlp_ratio) for kind in kinds]),
            dim=dim,
            depth=depth,
            reduction=patch_size,
            norm=partial(nn.LayerNorm, eps=1e-6),
            pos_grid=(height, width),
            num_prefix_tokens=1,
            in_chans=in_chans,
            global_pool=global_pool,
            device=device,
            dtype=dtype,
            **isotropic,
        )


# Weights ---------------------------------------------------------------------------------------------------------

_NAMES: list[tuple[str, str | None]] = [*mixers.NAMES, (r"^patch_embed\.", "stem."), (r"^cls_token$", "prefix_tokens")]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """An official checkpoint under our names, positions resampled for the model's ``img_size``; ours pass unchanged.

    Raises:
        ValueError: if there are no tensors in it (see ``weights.unwrap``).
    """
    expected = model.state_dict()
    state = mixers.fit_mixers(weights.rename(weights.unwrap(state_dict), _NAMES), expected)
    positions = state.get("pos_embed")
    if positions is not None and positions.dim() == 3 and "prefix_tokens" in state:
        # The class token's own position is added to it once and for all.
        state["prefix_tokens"] = state["prefix_tokens"] + positions[:, :1]
        state["pos_embed"] = mixers.fit_position(positions[:, 1:], expected["pos_embed"])
    elif positions is not None and positions.dim() == 4:
        state["pos_embed"] = resample_position(positions, *expected["pos_embed"].shape[1:3])
    return state


def _cfg(mixer: str, side: int, share: str = "", size: str = "", **kwargs: Any) -> dict[str, Any]:
    sizes = {"input_size": (3, side, side), "pool_size": (side // 16, side // 16)}
    return host_cfg(
        mixer,
        first_conv="stem.proj",
        classifier="head",
        share=share,
        file=f"{mixer}_deit_{size}.pth",
        **sizes,
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "agent_deit_tiny.in1k": _cfg("agent", 224, "57e0904221824ee7b7af", "tiny"),
        "agent_deit_small.in1k": _cfg("agent", 224, "fdd43304372541db8ea7", "small"),
        "agent_deit_small_448.in1k": _cfg("agent", 448, "a228f86241c445f1969b", "small_448"),
        "agent_deit_base.in1k": _cfg("agent", 224, "5115f15fdd7e4ab58fbc", "base"),
        "inline_deit_tiny.in1k": _cfg("inline", 224, "1d6b8191ad6d4114b291", "tiny"),
        "inline_deit_small.in1k": _cfg("inline", 288, "2f3898b07e9247f3beb3", "small"),
        "inline_deit_base.in1k": _cfg("inline", 448, "10bdd726d4b0435eb34e", "base"),
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
}

register_variants(__name__, MixerDeiT, VARIANTS, checkpoint_filter_fn, out_indices=(2, 5, 8, 11))

"""The blocks of CSWin (arXiv 2107.00652), on maps: attention in stripes of two directions, or in the whole map."""

# Annotations are not postponed: torch.fx copies those of forward() into code that TorchScript has to understand.

from functools import partial
from typing import Any, Final

import torch
from timm.models import register_notrace_function
from torch import Tensor, nn

from subquad.backbones.base import Factory
from subquad.backbones.hosts.blocks import Block, SoftmaxAttention
from subquad.backbones.layers import DepthwiseConv, crop_to, pad_to
from subquad.backbones.mixers import InjectiveAttention


@register_notrace_function
def to_stripes(x: Tensor, stripe: int, vertical: bool) -> Tensor:
    """Maps (B, H, W, C) to stripes (B * stripes, H, stripe, C) or (B * stripes, stripe, W, C); zeros fill the last."""
    size = x.shape[2] if vertical else x.shape[1]
    count = (size + stripe - 1) // stripe
    if vertical:
        x = pad_to(x, x.shape[1], count * stripe).unflatten(2, (count, stripe)).transpose(1, 2)
    else:
        x = pad_to(x, count * stripe, x.shape[2]).unflatten(1, (count, stripe))
    return x.flatten(0, 1)


@register_notrace_function
def from_stripes(x: Tensor, vertical: bool, height: int, width: int) -> Tensor:
    """The inverse of ``to_stripes`` for maps (B, height, width, C)."""
    if vertical:
        count = (width + x.shape[2] - 1) // x.shape[2]
        x = x.unflatten(0, (x.shape[0] // count, count)).transpose(1, 2).flatten(2, 3)
    else:
        count = (height + x.shape[1] - 1) // x.shape[1]
        x = x.unflatten(0, (x.shape[0] // count, count)).flatten(1, 2)
    return crop_to(x, height, width)


class Stripes(nn.Module):
    """Attention, and a local branch of the values, inside the stripes of a map.

    Args:
        dim: channels.
        mixer: called as ``mixer(dim, device=, dtype=)``; a bare one.
        stripe: width of the stripes, 0 for the whole map.
        vertical: whether a stripe has the height of the map, else its width.
    """

    wants_mean: Final[bool]

    def __init__(
        self, dim: int, mixer: Factory, stripe: int = 0, vertical: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.stripe = stripe
        self.vertical = vertical
        self.attn = mixer(dim, device=device, dtype=dtype)
        self.lepe = DepthwiseConv(dim, 3, device=device, dtype=dtype)
        self.wants_mean = isinstance(self.attn, InjectiveAttention)

    def forward(self, qkv: Tensor, source: Tensor) -> Tensor:
        """Queries, keys and values (B, H, W, 3 dim), and the input of the block, to (B, H, W, dim)."""
        height, width = qkv.shape[1], qkv.shape[2]
        if self.stripe > 0:
            qkv = to_stripes(qkv, self.stripe, self.vertical)
        size = [qkv.shape[1], qkv.shape[2]]
        if self.wants_mean:
            # InLine predicts its kernels from the mean before the norm in this host: released weights depend on it.
            x = self.attn(qkv.flatten(1, 2), size, source.mean((1, 2)))
        else:
            x = self.attn(qkv.flatten(1, 2), size)
        x = x.unflatten(1, (size[0], size[1])) + self.lepe(qkv.chunk(3, dim=-1)[2])
        if self.stripe > 0:
            x = from_stripes(x, self.vertical, height, width)
        return x


class CrossShapedAttention(nn.Module):
    """Projections, and between them attention in the whole map or, in two halves of the channels, in its stripes.

    Args:
        dim, num_heads: channels and heads; stripes halve both.
        mixer: called as ``mixer(dim, num_heads=, resolution=, device=, dtype=)``; a bare one.
        stripe: width of the stripes, 0 for the whole map.
        resolution: height and width of the map that tables are made for.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mixer: Factory,
        stripe: int,
        resolution: tuple[int, int],
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        height, width = resolution
        if stripe > 0 and (num_heads % 2 or dim % 2):
            raise ValueError(f"stripes halve heads and channels, got {num_heads} heads and {dim} channels")
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        if stripe > 0:
            sizes = [(height, min(stripe, width)), (min(stripe, height), width)]
            self.branches = nn.ModuleList(
                Stripes(dim // 2, partial(mixer, num_heads=num_heads // 2, resolution=size), stripe, not i, **dd)
                for i, size in enumerate(sizes)
            )
        else:
            whole = partial(mixer, num_heads=num_heads, resolution=resolution)
            self.branches = nn.ModuleList([Stripes(dim, whole, **dd)])
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """Maps (B, H, W, dim) behind a norm, and the same before it, to maps."""
        # Stripes are filled behind the projection: with zeros, not with its bias, and a norm can be folded into it.
        qkv = self.qkv(x).unflatten(-1, (3, len(self.branches), -1))
        parts: list[Tensor] = []
        for i, branch in enumerate(self.branches):
            parts.append(branch(qkv[..., i, :].flatten(-2), source))
        return self.proj(torch.cat(parts, dim=-1))


class CrossShapedBlock(Block):
    """Block on maps (B, H, W, dim) whose mixer is cross-shaped attention; arguments as in ``Block``."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), x))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def softmax_attention(dim: int, num_heads: int, resolution: tuple[int, int], **dd: Any) -> SoftmaxAttention:
    """CSWin's own mixer, which has no tables."""
    return SoftmaxAttention(dim, num_heads, bare=True, **dd)

"""The blocks of the hosts, on maps and on tokens, windows of maps, and what hosts check."""

# Annotations are not postponed: torch.fx copies those of forward() into code that TorchScript has to understand.

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers import DropPath, Mlp, to_2tuple
from timm.models import register_notrace_function
from torch import Tensor, nn

from subquad.backbones.base import Factory
from subquad.backbones.layers import crop_to, pad_to
from subquad.backbones.mixers import check_mixer, projections


@register_notrace_function
def to_windows(x: Tensor, side: int) -> Tensor:
    """Maps (B, H, W, C), zeros added at the right and at the bottom, to windows (B * windows, side * side, C)."""
    rows, columns = (x.shape[1] + side - 1) // side, (x.shape[2] + side - 1) // side
    x = pad_to(x, rows * side, columns * side)
    x = x.unflatten(2, (columns, side)).unflatten(1, (rows, side)).transpose(2, 3)  # (B, rows, columns, i, j, C)
    return x.flatten(3, 4).flatten(0, 2)


@register_notrace_function
def from_windows(x: Tensor, side: int, height: int, width: int) -> Tensor:
    """The inverse of ``to_windows`` for maps (B, height, width, C)."""
    rows, columns = (height + side - 1) // side, (width + side - 1) // side
    batch = x.shape[0] // (rows * columns)
    x = x.unflatten(0, (batch, rows, columns)).unflatten(3, (side, side)).transpose(2, 3)
    return crop_to(x.flatten(3, 4).flatten(1, 2), height, width)


class Block(nn.Module):
    """What the pre-norm residual blocks are made of: a mixer and an MLP, each behind a norm.

    Args:
        dim: channels.
        mixer: called as ``mixer(dim, device=, dtype=)``.
        mlp_ratio: hidden size of the MLP over the channels.
        norm: called as ``norm(dim, device=, dtype=)``.
        mlp: called as ``mlp(dim, hidden, device=, dtype=)``.
    """

    def __init__(
        self,
        dim: int,
        *,
        mixer: Factory,
        mlp_ratio: float,
        norm: Factory,
        mlp: Factory = Mlp,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = norm(dim, **dd)
        self.attn = mixer(dim, **dd)
        self.norm2 = norm(dim, **dd)
        self.mlp = mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()


class MixerBlock(Block):
    """Block on maps (B, H, W, dim).

    Args:
        dim, norm, block: arguments of ``Block``; the MLP is called with maps.
        window: side of the square windows that the mixer sees one by one, 0 for the whole map.
        out_norm: a norm behind the block.
    """

    def __init__(
        self,
        dim: int,
        *,
        norm: Factory,
        window: int = 0,
        out_norm: bool = False,
        device: Any = None,
        dtype: Any = None,
        **block: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, norm=norm, **dd, **block)
        self.window = window
        self.out_norm = norm(dim, **dd) if out_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        y = self.norm1(x)
        if self.window > 0:
            parts = self.attn(to_windows(y, self.window), [self.window, self.window])
            y = from_windows(parts, self.window, height, width)
        else:
            y = self.attn(y.flatten(1, 2), [height, width]).unflatten(1, (height, width))
        x = x + self.drop_path(y)
        return self.out_norm(x + self.drop_path(self.mlp(self.norm2(x))))


class TokenBlock(Block):
    """Block on tokens (B, N, dim), prefix tokens in front; arguments as in ``Block``.

    Not timm's, which hands its attention a mask where mixers want the size of the map.
    """

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), [height, width]))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SoftmaxAttention(nn.Module):
    """DeiT's own mixer, and that of CSWin's windows, called as the others are.

    Not timm's ``Attention``: a subclass with the others' ``forward`` cannot call timm's in TorchScript.
    """

    def __init__(self, dim: int, num_heads: int, bare: bool = False, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        check_mixer(dim, num_heads)
        self.num_heads = num_heads
        self.qkv, self.proj = projections(dim, 3, bare, device=device, dtype=dtype)

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3)  # (B, heads, 3, N, d)
        q, k, v = qkv.unbind(2)
        o = F.scaled_dot_product_attention(q, k, v)
        return self.proj(o.transpose(1, 2).flatten(2))


def map_size(img_size: int | tuple[int, int], reduction: int) -> tuple[int, int]:
    """Height and width, at least 1, of the map whose pixels are ``reduction`` pixels of an image wide.

    Raises:
        ValueError: for an image without pixels.
    """
    height, width = to_2tuple(img_size)
    if height < 1 or width < 1:
        raise ValueError(f"img_size must be positive, got {img_size}")
    return max(1, height // reduction), max(1, width // reduction)


def check_positive(**sizes: int) -> None:
    """Raises ValueError, naming the option, unless each is at least 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def check_mixer_blocks(
    depths: Sequence[int], mixer_blocks: Sequence[int], mixer_options: Sequence[Mapping[str, Any]]
) -> None:
    """Raises ValueError unless each stage has as many blocks as are to have the mixer, and options for it."""
    if len(mixer_blocks) != len(depths) or any(not 0 <= n <= d for n, d in zip(mixer_blocks, depths, strict=True)):
        raise ValueError(f"mixer_blocks must be at most depths={tuple(depths)}, got {tuple(mixer_blocks)}")
    if len(mixer_options) < len(depths):
        raise ValueError(f"mixer_options must have one entry for each of {len(depths)} stages, got {mixer_options}")

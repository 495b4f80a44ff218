"""Layers that two or more families share and timm lacks, on channels-last maps (B, H, W, C)."""

# Annotations are not postponed: torch.fx copies those of forward() into code that TorchScript has to understand.

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn

from subquad.ops import linear_attention


@register_notrace_function
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    normalizer: str = "divide",
    feature_map: str = "identity",
    scale: float = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """``subquad.ops.linear_attention`` for modules: in eager mode, in TorchScript and as a leaf of torch.fx."""
    if torch.jit.is_scripting():
        # The operator itself, because TorchScript cannot compile the checks of the public function.
        found = torch.ops.subquad.linear_attention(q, k, v, None, None, cos, sin, normalizer, feature_map, scale, eps)
        o = found[0]
    else:
        rotary = None if cos is None or sin is None else (cos, sin)
        o = linear_attention(
            q, k, v, normalizer=normalizer, feature_map=feature_map, rotary=rotary, scale=scale, eps=eps
        )
    return o


@register_notrace_function
def rotary_by_head(x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rotary tables (cos, sin) for heads of x (B, N, H, D), all alike, each (height * width, 1, D / 2); 4 divides D.

    The first half of the pairs turns with the row, the second with the column; the D / 4 frequencies of each run from 1
    to 1e-4, both included.
    """
    count = x.shape[-1] // 4
    cos, sin = _rotary(x, count, max(count - 1, 1), height, width)
    return cos.unsqueeze(1), sin.unsqueeze(1)


@register_notrace_function
def rotary_by_width(x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rotary tables (cos, sin) over all channels of x (B, N, H, D), each (height * width, H, D / 2); 4 divides H D.

    As ``rotary_by_head`` for one head of H D channels, cut into heads afterwards, and without the last frequency: so
    the first heads turn with the row, the last with the column, and each has frequencies of its own.
    """
    count = x.shape[-2] * x.shape[-1] // 4
    cos, sin = _rotary(x, count, count, height, width)
    return cos.unflatten(1, (x.shape[-2], -1)), sin.unflatten(1, (x.shape[-2], -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, N, H, D) in x's dtype; tables as from ``rotary_by_head``."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


def _rotary(x: Tensor, count: int, steps: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles, (height * width, 2 count), with 1e-4 ** (t / steps) as the t-th frequency."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    frequencies = 1e-4 ** (torch.arange(count, dtype=dtype, device=x.device) / steps)
    rows = torch.arange(height, dtype=dtype, device=x.device)[:, None] * frequencies
    columns = torch.arange(width, dtype=dtype, device=x.device)[:, None] * frequencies
    by_row = rows[:, None].expand(-1, width, -1)
    by_column = columns[None].expand(height, -1, -1)
    angles = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)
    return angles.cos(), angles.sin()


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of a map (B, H, W, dim) that keeps its size; ``kernel_size`` is odd."""

    def __init__(self, dim: int, kernel_size: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        # The convolution sees the same memory as a channels-last (B, C, H, W), and mostly answers in that format.
        return self._conv_forward(x.permute(0, 3, 1, 2), self.weight, self.bias).permute(0, 2, 3, 1)


class PatchMerging(nn.Module):
    """Four neighbouring pixels to one, norm, projection: (B, H, W, in_dim) to (B, ceil(H / 2), ceil(W / 2), dim)."""

    def __init__(self, in_dim: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * in_dim, eps=1e-5, **dd)
        self.reduction = nn.Linear(4 * in_dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        height, width = (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2
        x = F.pad(x, (0, 0, 0, 2 * width - x.shape[2], 0, 2 * height - x.shape[1]))
        x = x.unflatten(2, (width, 2)).unflatten(1, (height, 2))  # (B, H / 2, i, W / 2, j, C)
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))  # channels (j, i, C)


def ceil_to(size: int, multiple: int) -> int:
    """The next multiple. In this form, not with a remainder, symbolic sizes of an export stay simple."""
    return (size + multiple - 1) // multiple * multiple


class PatchEmbed(nn.Module):
    """Images (B, C, H, W), zeros added to whole patches, to (B, ceil(H / p), ceil(W / p), dim), then layer norm."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, norm: bool = True, **dd: Any) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **dd)
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        height, width = ceil_to(x.shape[2], self.patch_size), ceil_to(x.shape[3], self.patch_size)
        x = self.proj(F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2])))
        return self.norm(x.permute(0, 2, 3, 1))


def in_turn(blocks: Sequence[Callable[..., nn.Module]]) -> Callable[..., nn.Module]:
    """A block factory for a stage whose blocks differ: each call goes to the next of ``blocks``."""
    left = iter(blocks)
    return lambda *args, **kwargs: next(left)(*args, **kwargs)


def check_heads(depths: Sequence[int], dims: Sequence[int], num_heads: Sequence[int]) -> None:
    """Raises ValueError unless the stages have blocks and as many heads as divide their channels evenly."""
    if not depths or min(depths) < 1:
        raise ValueError(f"depths must be positive, got {tuple(depths)}")
    if not len(depths) == len(dims) == len(num_heads):
        raise ValueError(f"one entry a stage: got depths={depths}, dims={dims}, num_heads={num_heads}")
    for dim, heads in zip(dims, num_heads, strict=True):
        if heads < 1 or dim < 1 or dim % heads or dim // heads % 2:
            raise ValueError(f"num_heads must cut the channels into even parts, got {heads} heads for {dim} channels")

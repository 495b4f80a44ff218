"""The canonical call of region attention: what the public function hands to every implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.maps import crop


class RegionCall(NamedTuple):
    """Checked arguments in canonical form; see ``subquad.ops.region_attention`` for their meaning.

    Attributes:
        q: (B, H, W, heads, D).
        k: (B, H_k, W_k, heads, D).
        v: (B, H_k, W_k, heads, E).
        regions: (B, heads or 1, R, topk), integers below the number of key regions.
        weights: (B, heads or 1, R, topk), or None.
        pad_k: (heads, D), or None for zeros.
        pad_v: (heads, E), or None for zeros.
        region_size, kv_region_size: height and width.
        scale: what products of queries and keys are multiplied by.
        hide_padding: whether padding is hidden from the queries.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    regions: Tensor
    weights: Tensor | None
    pad_k: Tensor | None
    pad_v: Tensor | None
    region_size: Sequence[int]
    kv_region_size: Sequence[int]
    scale: float
    hide_padding: bool

    @property
    def counts(self) -> tuple[int, int]:
        """Regions of the queries along each axis."""
        return count_regions(self.q, self.region_size)

    @property
    def kv_counts(self) -> tuple[int, int]:
        """Regions of the keys along each axis."""
        return count_regions(self.k, self.kv_region_size)

    @property
    def working(self) -> torch.dtype:
        """Dtype of logits, softmax and sums."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


def count_regions(x: Tensor, size: Sequence[int]) -> tuple[int, int]:
    """Regions of a map (B, H, W, ...) along each axis; the last ones may reach beyond it."""
    # In this form, not with a negative operand, symbolic sizes of an export stay simple.
    return (x.shape[1] + size[0] - 1) // size[0], (x.shape[2] + size[1] - 1) // size[1]


def cut(x: Tensor, size: Sequence[int], value: float = 0.0) -> Tensor:
    """A map (B, H, W, heads, C) in regions, row by row: (B, heads, regions, tokens, C), with ``value`` beyond it."""
    rows, columns = count_regions(x, size)
    bottom, right = rows * size[0] - x.shape[1], columns * size[1] - x.shape[2]
    x = F.pad(x, (0, 0, 0, 0, 0, right, 0, bottom), value=value)
    x = x.unflatten(2, (columns, size[1])).unflatten(1, (rows, size[0]))
    return x.permute(0, 5, 1, 3, 2, 4, 6).flatten(4, 5).flatten(2, 3)


def join(x: Tensor, size: Sequence[int], height: int, width: int) -> Tensor:
    """The inverse of ``cut``: (B, heads, regions, tokens, C) to (B, height, width, heads, C)."""
    rows, columns = (height + size[0] - 1) // size[0], (width + size[1] - 1) // size[1]
    x = x.unflatten(3, (size[0], size[1])).unflatten(2, (rows, columns))
    return crop(x.permute(0, 2, 4, 3, 5, 1, 6).flatten(3, 4).flatten(1, 2), [height, width])


def padding_of(x: Tensor, size: Sequence[int]) -> Tensor:
    """Which tokens of the regions of a map (B, H, W, ...) lie beyond it, (regions, tokens)."""
    return cut(x.new_zeros(1, x.shape[1], x.shape[2], 1, 1), size, 1.0)[0, 0, :, :, 0] > 0


Gradients = tuple[Tensor | None, ...]
"""Of q, k, v, weights, pad_k and pad_v, in this order; None for an absent argument."""

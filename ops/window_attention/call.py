"""The canonical call of window attention: what the public functions hand to every implementation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class WindowCall(NamedTuple):
    """Checked arguments in canonical form; see ``subquad.ops.window_attention`` for their meaning.

    Attributes:
        q: (B, H, W, heads, D); or packed, (B, H, W, 3, heads, D), with k and v None.
        k: (B, H, W, heads, D), or None.
        v: (B, H, W, heads, E), or None.
        table: ((2 h - 1) (2 w - 1), heads) for windows of h x w tokens, or None.
        pad_k: (heads, D), or None for zeros.
        pad_v: (heads, E), or None for zeros.
        window, shift: one entry an axis.
        scale: what products of queries and keys are multiplied by.
        pad_first: whether the map is padded before it is rolled.
        hide_padding: whether padding is hidden from the queries.
        mask_value: what is added between tokens of different regions of a shifted window.
        key_minus_query: direction of the table's relative positions.
        grid: whether a window is a grid over the whole map instead of a block of neighbours.
        drop_shift: "never", "axis" or "map", which shifts a map that is no larger than a window loses.
    """

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    table: Tensor | None
    pad_k: Tensor | None
    pad_v: Tensor | None
    window: Sequence[int]
    shift: Sequence[int]
    scale: float
    pad_first: bool
    hide_padding: bool
    mask_value: float
    key_minus_query: bool
    grid: bool
    drop_shift: str

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, views of the packed tensor if there is one."""
        if self.k is None or self.v is None:
            q, k, v = self.q.unbind(3)
            return q, k, v
        return self.q, self.k, self.v

    @property
    def channels(self) -> tuple[int, int]:
        """D and E."""
        return self.q.shape[-1], (self.q if self.v is None else self.v).shape[-1]

    @property
    def counts(self) -> tuple[int, int]:
        """Windows along each axis."""
        return tuple((n + w - 1) // w for n, w in zip(self.q.shape[1:3], self.window, strict=True))  # type: ignore[return-value]

    @property
    def steps(self) -> tuple[int, int]:
        """The shift that the map at hand has along each axis; symbolic where its size is, unless shifts stay."""
        (rows, columns), (down, right) = self.counts, self.shift
        if self.drop_shift == "never":
            return down, right
        # Without a branch, which an exported program would keep as it was for the example.
        by_row, by_column = 1 - 1 // rows, 1 - 1 // columns
        if self.drop_shift == "map":
            by_row = by_column = by_row * by_column
        return down * by_row, right * by_column

    def settled(self) -> WindowCall:
        """The same call with the map's own shift; implementations of the operator get no other."""
        return self if self.drop_shift == "never" else self._replace(shift=list(self.steps), drop_shift="never")

    @property
    def tokens(self) -> int:
        """Tokens of a window."""
        return math.prod(self.window)

    @property
    def working(self) -> torch.dtype:
        """Dtype of logits, softmax and sums."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


def relative_positions(call: WindowCall) -> Tensor:
    """Row of the bias table for each query and key of a window, (tokens, tokens)."""
    height, width = call.window
    y, x = (torch.arange(size, device=call.q.device) for size in (height, width))
    if call.key_minus_query:
        rows, columns = y - y[:, None], x - x[:, None]
    else:
        rows, columns = y[:, None] - y, x[:, None] - x
    entry = (rows[:, None, :, None] + height - 1) * (2 * width - 1) + columns[None, :, None, :] + width - 1
    return entry.reshape(height * width, height * width)


Gradients = tuple[Tensor | None, ...]
"""Of q, k, v, table, pad_k and pad_v, in this order; None for an absent argument."""

"""Which log decays of a chunk add up to which exponent."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 16
"""Longest chunk. Pairs cost CHUNK * d_k exponentials a token, states d_k * d_v / CHUNK elements."""


def exponent_sums(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Matrix (4 c + c c, 2 c) of zeros and ones from a chunk's log decays to all sums of them that are exponents.

    Columns: rows r of the forward, then of the backward direction. Rows: for ``inner`` and then for ``outer`` those of
    the two directions, then the pairs (t, s).
    """
    r = torch.arange(rows, device=device)
    t, s = r[:, None, None], r[:, None]
    none = torch.zeros(rows, rows, dtype=torch.bool, device=device)
    up_to, behind = r <= s, r > s
    blocks = [
        torch.cat([up_to, none], 1),
        torch.cat([none, r >= s], 1),
        torch.cat([behind, none], 1),
        torch.cat([none, r < s], 1),
        torch.cat([(s < r) & (r <= t), (t <= r) & (r < s)], 2).flatten(0, 1),
    ]
    return torch.cat(blocks).to(dtype)

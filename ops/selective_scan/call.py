"""The canonical call of the selective scan: what the public function hands to every implementation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]
"""Of x, dt, A, B, C, D, dt_weight, dt_bias, initial_state, in this order; None for an absent argument."""

CHUNK = 64
"""Pixels between two saved states: a route of L steps saves ceil(L / CHUNK) + 1 states.

Both implementations save the same: ``states[:, k, i]`` (B, K, chunks, E, N) is the state with which route k enters
chunk i, where chunk i is pixels ``i * CHUNK`` to ``(i + 1) * CHUNK`` of the route's path walked forwards. A reversed
route enters a chunk from its end. One more entry follows: the state after the last step. So at least two
states are saved, and torch.export does not take a single one on a small example for a rule.
"""


class ScanCall(NamedTuple):
    """Checked arguments in canonical form; see ``subquad.ops.selective_scan`` for their meaning.

    Attributes:
        x: (B, H, W, E).
        dt: (B, H, W, K, R) with ``dt_weight``, else (B, H, W, K, E).
        A: (K, E, N).
        B, C: (B, H, W, K, G, N).
        D: (K, E) or None.
        dt_weight: (K, E, R) or None.
        dt_bias: (K, E) or None.
        initial_state: (B, K, E, N) or None.
        table: (K, L) pixel indices where ``routes`` says TABLE, or None.
        routes: K route codes.
        dt_softplus: whether the step is softplus(dt + bias) or dt + bias.
        out_dtype: dtype of the merged output.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_weight: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None
    table: Tensor | None
    routes: list[int]
    dt_softplus: bool
    out_dtype: torch.dtype

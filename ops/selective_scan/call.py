"""The canonical call of the selective scan: what the public function hands to every implementation."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]
"""Of the first ``DIFFERENTIABLE`` fields of a call, in order; None for an absent argument."""

DIFFERENTIABLE: Final = 11

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
        z: gate (B, H, W, E) or None; nothing looks at ``addend``, ``scale`` and ``keep`` without it.
        addend: (B, H, W, E) or None.
        table: (K, L) pixel indices where ``routes`` says TABLE, or None.
        routes: K route codes.
        dt_softplus: whether the step is softplus(dt + bias) or dt + bias.
        out_dtype: dtype of the merged output.
        scale: factor of the gated output.
        keep: whether the forward pass keeps the sum of routes in front of the gate, for the gradient of z.
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
    z: Tensor | None
    addend: Tensor | None
    table: Tensor | None
    routes: list[int]
    dt_softplus: bool
    out_dtype: torch.dtype
    scale: float
    keep: bool

    @property
    def gate_dtype(self) -> torch.dtype:
        """Dtype of the sum of routes in front of the gate, and of its gradient: bfloat16 if inputs and output are.

        But not float16, whose range sums of states may leave.
        """
        narrow = self.x.dtype == self.out_dtype == torch.bfloat16
        return torch.bfloat16 if narrow else self.A.dtype

    def new_kept(self) -> Tensor:
        """Memory for the kept sum; empty if nothing is kept."""
        return self.x.new_empty(self.x.shape, dtype=self.gate_dtype) if self.keep else self.x.new_empty(0)

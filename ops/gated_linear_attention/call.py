"""The canonical call of gated linear attention: what the public function hands to every implementation."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of q, k, v, gates, in this order, each of its argument's shape and dtype."""


class GatedCall(NamedTuple):
    """Checked arguments in canonical form; see ``subquad.ops.gated_linear_attention`` for their meaning.

    Any strides may come: q, k and v mostly are views of one projection.

    Attributes:
        q, k: (B, N, H, d_k).
        v: (B, N, H, d_v).
        gates: (B, N, 2, H, d_k), of q's dtype or float32: log decays, or logits with ``gate_normalizer``.
        gate_normalizer: None, or what logsigmoid(gates) is divided by.
        scale: factor of the output, the half for the mean of the two directions not included.
        out_dtype: dtype of the output.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor
    gate_normalizer: float | None
    scale: float
    out_dtype: torch.dtype

    @property
    def working_dtype(self) -> torch.dtype:
        """Of decays, states and sums."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


def log_decays(gates: Tensor, gate_normalizer: float | None, dtype: torch.dtype) -> Tensor:
    """Log decays out of a call's gates or a part of them."""
    gates = gates.to(dtype)
    return gates if gate_normalizer is None else F.logsigmoid(gates) / gate_normalizer

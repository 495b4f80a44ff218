"""The canonical call of linear attention: what the public function hands to every implementation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NORMALIZERS = ("divide", "subtract", "magnitude", "clamp", "none", "softmax_weighted")
"""What becomes of the numerator; the table in ``subquad.ops.linear_attention`` has the formulas."""

FEATURE_MAPS = ("identity", "elu1", "relu")
"""Applied to q and k: nothing, x + 1 above 0 and exp(x) below, max(x, 0)."""

USES_VALUE_MEAN = ("subtract", "magnitude")
NEEDS_POSITIVE_FEATURES = ("divide", "magnitude", "clamp", "softmax_weighted")
"""Normalisers that divide by a sum of products of features."""


class AttentionCall(NamedTuple):
    """Checked arguments in canonical form; see ``subquad.ops.linear_attention`` for their meaning.

    Attributes:
        q: (B, M, H, D).
        k: (B, N, H, D).
        v: (B, N, H, E).
        q_content, k_content: of q's and k's shape, or None.
        cos, sin: (N, 1 or H, D / 2), or None.
        normalizer: one of ``NORMALIZERS``.
        feature_map: one of ``FEATURE_MAPS``.
        scale, eps: s and eps of the formula.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_content: Tensor | None
    k_content: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    normalizer: str
    feature_map: str
    scale: float
    eps: float

    @property
    def product_scale(self) -> float:
        """The factor s of S and z; the weights of ``softmax_weighted`` use up the scale."""
        return 1.0 if self.normalizer == "softmax_weighted" else self.scale

    @property
    def working(self) -> torch.dtype:
        """Dtype of statistics and sums."""
        return torch.float64 if self.v.dtype == torch.float64 else torch.float32


class Statistics(NamedTuple):
    """Sums over the keys of each image and head, all that the backward pass keeps beside the inputs.

    In float32 (float64 with float64 inputs). What the normaliser has no use for has a last axis of size 0.

    Attributes:
        state: S, (B, H, D, E).
        key_mean: mean of the normaliser features of the keys, weighted ones for ``softmax_weighted``, (B, H, D).
        value_mean: mean of the values, (B, H, E); ``subtract`` and ``magnitude``.
        query_mean: mean of the normaliser features of the queries, (B, H, D); ``softmax_weighted``.
        log_sum: log of the sum of the exponentials under the softmax over the keys, (B, H, 1); ``softmax_weighted``.
    """

    state: Tensor
    key_mean: Tensor
    value_mean: Tensor
    query_mean: Tensor
    log_sum: Tensor


def empty_statistics(call: AttentionCall) -> Statistics:
    """Uninitialised statistics of a call, each with its own axes."""
    batch, _, heads, dim = call.k.shape
    values = call.v.shape[-1]
    weighted = call.normalizer == "softmax_weighted"
    shapes: tuple[tuple[int, ...], ...] = (
        (dim, values),
        (dim,),
        (values if call.normalizer in USES_VALUE_MEAN else 0,),
        (dim if weighted else 0,),
        (1 if weighted else 0,),
    )
    return Statistics(*(call.v.new_empty((batch, heads, *shape), dtype=call.working) for shape in shapes))


Gradients = tuple[Tensor | None, ...]
"""Of q, k, v, q_content, k_content, in this order; None for an absent argument."""

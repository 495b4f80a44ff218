"""The canonical call of neighborhood attention: what the public functions hand to every implementation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


class NeighborhoodCall(NamedTuple):
    """Checked arguments in canonical form; see ``subquad.ops.neighborhood_attention`` for their meaning.

    In calls of the split forms what they lack is empty: v of ``qk``, k of ``av``, whose q are the weights.

    Attributes:
        q: (B, *S, H, D) with one to three axes S.
        k: (B, *S, G, D) with G dividing H.
        v: (B, *S, G, E).
        rpb: (H, 2 K - 1 for each axis), or None.
        additional_keys: (B, M, G, D), or None.
        additional_values: (B, M, G, E), or None.
        kernel_size, dilation, stride, is_causal: one entry an axis.
        scale: what products of queries and keys are multiplied by.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rpb: Tensor | None
    additional_keys: Tensor | None
    additional_values: Tensor | None
    kernel_size: Sequence[int]
    dilation: Sequence[int]
    stride: Sequence[int]
    is_causal: Sequence[bool]
    scale: float

    @classmethod
    def of_qk(cls, q: Tensor, k: Tensor, rpb: Tensor | None, additional_keys: Tensor | None, *options: Any) -> Self:
        """A call of ``qk``; the options are the fields from ``kernel_size`` on."""
        return cls._make((q, k, q.new_empty(0), rpb, additional_keys, None, *options))

    @classmethod
    def of_av(cls, attn: Tensor, v: Tensor, additional_values: Tensor | None, *options: Any) -> Self:
        """A call of ``av``; the options are ``kernel_size`` to ``is_causal``."""
        return cls._make((attn, attn.new_empty(0), v, None, None, additional_values, *options, 1.0))

    @property
    def size(self) -> tuple[int, ...]:
        """The map's axes."""
        return tuple(self.q.shape[1:-2])

    @property
    def extra(self) -> int:
        """Number of additional keys."""
        additional = self.additional_values if self.additional_keys is None else self.additional_keys
        return 0 if additional is None else additional.shape[1]

    @property
    def keys(self) -> int:
        """Keys of a query at most: its window and the additional ones."""
        return math.prod(self.kernel_size) + self.extra

    @property
    def working(self) -> torch.dtype:
        """Dtype of logits, softmax and sums."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


Gradients = tuple[Tensor | None, ...]
"""Of q, k, v, rpb, additional_keys and additional_values, in this order; None for an absent argument."""

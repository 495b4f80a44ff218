"""The canonical call of the depthwise convolution: what the public functions hand to every implementation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = ("none", "silu", "gelu")
"""Behind the convolution: nothing, x sigmoid(x), or x Phi(x) with the normal distribution's Phi itself."""


class ConvCall(NamedTuple):
    """Checked arguments in canonical form; see ``subquad.ops.depthwise_conv`` for their meaning.

    Attributes:
        x: (B, H, W, C).
        weight: (C, kh, kw).
        bias: (C,), or None.
        top, left: zeros in front of each axis of the map; kh - 1 - top and kw - 1 - left follow behind it.
        flipped: whether the taps are used in reverse order, on both axes.
        activation: one of ``ACTIVATIONS``.
        residual: whether x is added before the activation.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    top: int
    left: int
    flipped: bool
    activation: str
    residual: bool

    @property
    def padding(self) -> tuple[int, int, int, int]:
        """Zeros on the left, on the right, above and below the map, in the order of ``torch.nn.functional.pad``."""
        _, kh, kw = self.weight.shape
        return self.left, kw - 1 - self.left, self.top, kh - 1 - self.top

    @property
    def working(self) -> torch.dtype:
        """Dtype of the sums."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32


Gradients = tuple[Tensor, Tensor, Tensor | None]
"""Of x, weight and bias, in this order; None for an absent bias."""

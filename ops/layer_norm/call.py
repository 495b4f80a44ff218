"""The canonical call of the layer norm: what the public functions hand to every implementation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class NormCall(NamedTuple):
    """Checked arguments in canonical form; see ``subquad.ops.layer_norm`` for their meaning.

    Attributes:
        x: (*, C).
        branch: of x's shape, added to it first; or None.
        weight: (C,).
        bias: (C,), or None.
        eps: added to the variance.
        dtype: of the result.
    """

    x: Tensor
    branch: Tensor | None
    weight: Tensor
    bias: Tensor | None
    eps: float
    dtype: torch.dtype

    @property
    def total_dtype(self) -> torch.dtype:
        """Dtype of x + branch."""
        return self.x.dtype if self.branch is None else torch.promote_types(self.x.dtype, self.branch.dtype)

    @property
    def working(self) -> torch.dtype:
        """Dtype of statistics and products."""
        return torch.float64 if self.total_dtype == torch.float64 else torch.float32


class GradCall(NamedTuple):
    """What the gradients of a call are made from.

    Attributes:
        grad_y: gradient of the result.
        grad_total: gradient that enters through x + branch, of its shape; None where none does.
        total: what the norm was taken of: x + branch, or x.
        weight, bias, eps: the call's.
        x_dtype: dtype of the gradient of x.
        branch_dtype: dtype of the gradient of the branch; None where there is none.
    """

    grad_y: Tensor
    grad_total: Tensor | None
    total: Tensor
    weight: Tensor
    bias: Tensor | None
    eps: float
    x_dtype: torch.dtype
    branch_dtype: torch.dtype | None

    @property
    def working(self) -> torch.dtype:
        """Dtype of statistics and sums."""
        return torch.float64 if self.total.dtype == torch.float64 else torch.float32


Gradients = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
"""Of x, branch, weight and bias, in this order; None for what is absent."""

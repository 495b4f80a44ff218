"""The layer norm in operators that every exporter knows, in place of ``subquad::layer_norm`` and ``add_layer_norm``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.ops.layer_norm import torch_impl
from subquad.ops.layer_norm.call import NormCall


def export_form(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """Same arguments and result as the operator ``subquad::layer_norm``."""
    return torch_impl.forward(NormCall(x, None, weight, bias, eps, dtype))[1]


def sum_form(*args: Any) -> tuple[Tensor, Tensor]:
    """Same arguments and results as the operator ``subquad::add_layer_norm``."""
    return torch_impl.forward(NormCall(*args))

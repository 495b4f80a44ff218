"""The layer norm by PyTorch's own operators."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.layer_norm.call import GradCall, Gradients, NormCall


def forward(call: NormCall) -> tuple[Tensor, Tensor]:
    """x + branch (x itself without one), and the norm of it; contiguous."""
    total = (call.x if call.branch is None else call.x + call.branch).contiguous()
    y, _, _ = _norm(total, call)
    return total, y.to(call.dtype)


def backward(call: GradCall) -> Gradients:
    """Gradients of x, branch, weight and bias."""
    _, mean, rstd = _norm(call.total, call)
    weight, bias = _parameters(call)
    grad_total, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        call.grad_y.to(call.working), call.total.to(call.working), list(weight.shape), mean, rstd, weight, bias,
        [True, True, bias is not None],
    )  # fmt: skip
    if call.grad_total is not None:
        grad_total = grad_total + call.grad_total
    return (
        grad_total.to(call.x_dtype),
        None if call.branch_dtype is None else grad_total.to(call.branch_dtype, copy=True),
        grad_weight.to(call.weight.dtype),
        None if call.bias is None else grad_bias.to(call.bias.dtype),
    )


def _norm(total: Tensor, call: NormCall | GradCall) -> tuple[Tensor, Tensor, Tensor]:
    """The norm in the working dtype, means, and inverse standard deviations."""
    weight, bias = _parameters(call)
    return torch.native_layer_norm(total.to(call.working), list(weight.shape), weight, bias, call.eps)


def _parameters(call: NormCall | GradCall) -> tuple[Tensor, Tensor | None]:
    return call.weight.to(call.working), None if call.bias is None else call.bias.to(call.working)

"""Layer norm of the last axis, alone or behind the sum of a residual block: the contract.

For a row of C channels,

    total = x + branch
    y = (total - mean(total)) / sqrt(var(total) + eps) * weight + bias

with the variance over C, not C - 1. ``layer_norm`` takes the norm of x itself; ``add_layer_norm`` returns total too,
for a pre-norm block goes on with both.

Source: arXiv 1607.06450, equation 3 and 4.

x and branch are float32, bfloat16, float16 or float64, and total is in the dtype that PyTorch's sum has; weight and
bias have dtypes of their own. Statistics and products are float32 (float64 for a total of float64), y is rounded once,
to ``dtype``. Between a float32 sum and a projection under autocast that is the projection's 16-bit dtype, which
PyTorch's norm leaves for a cast of its own. Autocast itself changes nothing here. All tensors are differentiable, once
and backwards. For the backward pass the op keeps total (x, without a branch) and no statistics: a row is read whole and
has them again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.ops import _checks, _dispatch, _library
from subquad.ops.layer_norm import reference
from subquad.ops.layer_norm.call import GradCall, NormCall

__all__ = ["NormCall", "add_layer_norm", "layer_norm"]

_NORM = "layer_norm"
_SUM = "add_layer_norm"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5, dtype: torch.dtype | None = None
) -> Tensor:
    """Norm of the last axis; see the module's docstring for the formula.

    Args:
        x: (*, C).
        weight: (C,).
        bias: (C,).
        eps: added to the variance, positive.
        dtype: of the result, x's by default.

    Returns:
        (*, C) in ``dtype``, contiguous.

    Raises:
        TypeError: for a non-tensor or a dtype that is not supported.
        ValueError: for shapes, devices or an eps that do not fit, naming the argument.
    """
    call = prepare(x, weight, bias, eps=eps, dtype=dtype)
    if _dispatch.requested() == "reference":
        # Outside the operator, so that autograd differentiates the formula itself.
        return reference.normalize(call)[1]
    return _norm_operator(x, weight, bias, call.eps, call.dtype)


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x + branch, and the norm of its last axis; see the module's docstring for the formula.

    Args:
        x: (*, C).
        branch: of x's shape.
        weight: (C,).
        bias: (C,).
        eps: added to the variance, positive.
        dtype: of the norm, that of x + branch by default.

    Returns:
        The sum (*, C), in the dtype that PyTorch gives it, and its norm (*, C) in ``dtype``, both contiguous.

    Raises:
        TypeError: for a non-tensor or a dtype that is not supported.
        ValueError: for shapes, devices or an eps that do not fit, naming the argument.
    """
    call = prepare_sum(x, branch, weight, bias, eps=eps, dtype=dtype)
    if _dispatch.requested() == "reference":
        return reference.normalize(call)
    return _sum_operator(x, branch, weight, bias, call.eps, call.dtype)


# Arguments -------------------------------------------------------------------------------------------------------

_passed = _checks.Passed()


def prepare(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5, dtype: torch.dtype | None = None
) -> NormCall:
    """Check the arguments of ``layer_norm`` and bring them to canonical form."""
    return _prepare(_NORM, x, None, weight, bias, eps, dtype)


def prepare_sum(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> NormCall:
    """Check the arguments of ``add_layer_norm`` and bring them to canonical form."""
    _checks.check_tensor(_SUM, "branch", branch)
    return _prepare(_SUM, x, branch, weight, bias, eps, dtype)


def _prepare(
    op: str,
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
) -> NormCall:
    eps = _checks.check_factor(op, "eps", eps)
    if eps <= 0:
        raise ValueError(f"{op}: eps must be positive, got {eps}")
    if dtype is not None and dtype not in _DTYPES:
        raise TypeError(f"{op}: dtype must be one of {[str(allowed) for allowed in _DTYPES]}, got {dtype!r}")
    key = _checks.shape_class(x, branch, weight, bias, options=op)
    if not _passed.has(key):
        for name, value in (("x", x), ("branch", branch), ("weight", weight), ("bias", bias)):
            if value is not None or name in ("x", "weight"):
                tensor = _checks.check_tensor(op, name, value)
                _checks.check_dtype(op, name, tensor, _DTYPES)
                _checks.check_device(op, name, tensor, x.device)
        if x.dim() == 0 or x.shape[-1] == 0:
            raise ValueError(f"{op}: x must be (*, C) with at least one channel, got shape {tuple(x.shape)}")
        if branch is not None:
            _checks.check_shape(op, "branch", branch, "that of x", x.shape)
        _checks.check_shape(op, "weight", weight, "(C,)", x.shape[-1:])
        if bias is not None:
            _checks.check_shape(op, "bias", bias, "(C,)", x.shape[-1:])
        _passed.add(key)
    if dtype is None:
        dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    return NormCall(x, branch, weight, bias, eps, dtype)


# The operators ---------------------------------------------------------------------------------------------------
# Not by ``define_differentiable``, whose operators keep all their inputs: x and branch are in the sum.


def _norm_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    call = NormCall(x, None, weight, bias, eps, dtype)
    _, y = _dispatch.choose_inside(_NORM, call).forward(call)
    return y


def _sum_forward(*args: Any) -> tuple[Tensor, Tensor]:
    call = NormCall(*args)
    return _dispatch.choose_inside(_SUM, call).forward(call)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    call = GradCall(*args)
    like = NormCall(call.total, None, call.weight, call.bias, call.eps, call.grad_y.dtype)
    grads = _dispatch.choose_inside(_NORM, like).backward(call)
    return tuple(call.weight.new_empty(0) if grad is None else grad for grad in grads)  # an operator returns no None


def _norm_fake(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _sum_fake(*args: Any) -> tuple[Tensor, Tensor]:
    call = NormCall(*args)
    return call.x.new_empty(call.x.shape, dtype=call.total_dtype), call.x.new_empty(call.x.shape, dtype=call.dtype)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    call = GradCall(*args)
    total, weight, bias = call.total, call.weight, call.bias
    return (
        total.new_empty(total.shape, dtype=call.x_dtype),
        weight.new_empty(0) if call.branch_dtype is None else total.new_empty(total.shape, dtype=call.branch_dtype),
        weight.new_empty(weight.shape),
        weight.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


def _no_flops(*args: Any, out_shape: Any = None) -> int:
    """None, as PyTorch counts a norm."""
    return 0


_norm_operator = _library.define(
    "layer_norm",
    _norm_forward,
    schema="(Tensor x, Tensor weight, Tensor? bias, float eps, ScalarType dtype) -> Tensor",
    fake=_norm_fake,
    flops=_no_flops,
)
_sum_operator = _library.define(
    "add_layer_norm",
    _sum_forward,
    schema=(
        "(Tensor x, Tensor branch, Tensor weight, Tensor? bias, float eps, ScalarType dtype)"
        " -> (Tensor total, Tensor y)"
    ),
    fake=_sum_fake,
    flops=_no_flops,
)
_backward_operator = _library.define(
    "layer_norm_backward",
    _backward,
    schema=(
        "(Tensor grad_y, Tensor? grad_total, Tensor total, Tensor weight, Tensor? bias, float eps,"
        " ScalarType x_dtype, ScalarType? branch_dtype) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    fake=_backward_fake,
    flops=_no_flops,
)


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight, bias)


def _norm_gradient(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    grad_x, _, grad_weight, grad_bias = _backward_operator(grad_y, None, x, weight, bias, ctx.eps, x.dtype, None)
    return grad_x, grad_weight, None if bias is None else grad_bias, None, None


def _keep_sum(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, branch, weight, bias, ctx.eps, ctx.dtype = inputs
    ctx.set_materialize_grads(False)
    ctx.dtypes = x.dtype, branch.dtype
    ctx.save_for_backward(output[0], weight, bias)


def _sum_gradient(ctx: Any, grad_total: Tensor | None, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight, bias = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(total, dtype=ctx.dtype)
    grad_x, grad_branch, grad_weight, grad_bias = _backward_operator(
        grad_y, grad_total, total, weight, bias, ctx.eps, *ctx.dtypes
    )
    return grad_x, grad_branch, grad_weight, None if bias is None else grad_bias, None, None


_norm_operator.register_autograd(_norm_gradient, setup_context=_keep_norm)
_sum_operator.register_autograd(_sum_gradient, setup_context=_keep_sum)


# Implementations -------------------------------------------------------------------------------------------------

_WIDEST = 4096


def _why_not_triton(call: NormCall) -> str | None:
    from subquad.ops import _triton

    if (reason := _triton.why_not(call.x)) is not None:
        return reason
    if call.working == torch.float64 or call.dtype == torch.float64:
        return "float64 runs in PyTorch"
    if call.x.numel() == 0:
        return "empty batch"
    if call.x.numel() >= 2**31 * call.x.shape[-1]:
        return "2^31 rows or more, the kernels count fewer"
    if call.x.shape[-1] > _WIDEST:
        return f"{call.x.shape[-1]} channels, our kernels have registers for up to {_WIDEST}"
    return None


for _name, _prepare_call in ((_NORM, prepare), (_SUM, prepare_sum)):
    _dispatch.register(_name, _prepare_call, *_dispatch.usual(__name__, _why_not_triton))

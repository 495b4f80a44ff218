"""Depthwise convolution of maps and sequences whose channels come last: the contract.

For channel c at row h and column w of a map, zeros beyond its borders, with t = (kh - 1) / 2 and l = (kw - 1) / 2,

    z = bias[c] + sum_ij weight[c, i, j] x[h + i - t, w + j - l, c] + residual x[h, w, c]
    y = activation(z)

and for token n of a sequence

    z = bias[c] + sum_j weight[c, j] x[n - (K - 1) + j, c]        causal: a token sees itself and those before it
    z = bias[c] + sum_j weight[c, j] x[n + (K - 1) - j, c]        with ``reverse``: itself and those after it

so the reverse of a sequence, convolved and reversed again, without the two copies. activation is one of
``ACTIVATIONS``. The residual is in front of it: x + conv(x) is a conditional position encoding, gelu(x + conv(x)) the
inside of an MLP with a convolution.

Sources: arXiv 2102.10882 (conditional position encodings), 2312.00752 (Mamba, for the causal one).

x may have any strides; a map whose channels have stride 1 is read as it is. x is float32, bfloat16, float16 or float64,
weight and bias have dtypes of their own. Sums are float32 (float64 with float64 inputs) and the result is rounded once,
but PyTorch's convolution, which serves CPUs, rounds weights to x's dtype first. Autocast casts x; with a residual it
does not, as a sum x + conv(x) keeps x's dtype too. x, weight and bias are differentiable. The op keeps nothing but its
inputs for the backward pass: z is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.ops import _checks, _dispatch, _library
from subquad.ops.depthwise_conv import reference
from subquad.ops.depthwise_conv.call import ACTIVATIONS, ConvCall

__all__ = ["ACTIVATIONS", "ConvCall", "causal_conv1d", "depthwise_conv2d"]

_MAPS = "depthwise_conv2d"
_SEQUENCES = "causal_conv1d"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none", residual: bool = False
) -> Tensor:
    """Convolve each channel of a map with its own kernel, at stride 1; see the module's docstring for the formula.

    Args:
        x: (B, H, W, C).
        weight: (C, kh, kw), both sizes odd.
        bias: (C,).
        activation: one of ``ACTIVATIONS``.
        residual: add x before the activation.

    Returns:
        (B, H, W, C) in x's dtype (under autocast and without a residual in the dtype that x is cast to), contiguous.

    Raises:
        TypeError: for a non-tensor or a dtype that is not supported.
        ValueError: for shapes, devices or an activation that do not fit, naming the argument.
    """
    return _convolve(_MAPS, prepare_map(x, weight, bias, activation=activation, residual=residual))


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none", reverse: bool = False
) -> Tensor:
    """Convolve each channel of a sequence with its own kernel; see the module's docstring for the formula.

    Args:
        x: (B, N, C).
        weight: (C, K).
        bias: (C,).
        activation: one of ``ACTIVATIONS``.
        reverse: a token sees those after it instead of those before it.

    Returns:
        (B, N, C) in x's dtype (under autocast in the dtype that x is cast to), contiguous.

    Raises:
        TypeError: for a non-tensor or a dtype that is not supported.
        ValueError: for shapes, devices or an activation that do not fit, naming the argument.
    """
    return _convolve(_SEQUENCES, prepare_sequence(x, weight, bias, activation=activation, reverse=reverse)).squeeze(1)


def _convolve(op: str, call: ConvCall) -> Tensor:
    if _dispatch.requested() == "reference":
        # Outside the operator, so that autograd differentiates the formula itself.
        return reference.convolve(call)
    return _operator(*call)


# Arguments -------------------------------------------------------------------------------------------------------

_passed = _checks.Passed()


def prepare_map(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none", residual: bool = False
) -> ConvCall:
    """Check the arguments of ``depthwise_conv2d`` and bring them to canonical form."""
    _check(_MAPS, x, "(B, H, W, C)", weight, "(C, kh, kw)", bias, activation)
    _, kh, kw = weight.shape
    if kh % 2 == 0 or kw % 2 == 0:
        raise ValueError(f"{_MAPS}: the sizes of the kernel must be odd, got {kh} x {kw}")
    return ConvCall(
        x if residual else _cast(x), weight, bias, (kh - 1) // 2, (kw - 1) // 2, False, activation, bool(residual)
    )


def prepare_sequence(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none", reverse: bool = False
) -> ConvCall:
    """Check the arguments of ``causal_conv1d`` and bring them to canonical form: a map of one row."""
    _check(_SEQUENCES, x, "(B, N, C)", weight, "(C, K)", bias, activation)
    left = 0 if reverse else weight.shape[1] - 1
    return ConvCall(_cast(x).unsqueeze(1), weight.unsqueeze(1), bias, 0, left, bool(reverse), activation, False)


def _check(op: str, x: Tensor, x_axes: str, weight: Tensor, axes: str, bias: Tensor | None, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown activation {activation!r}, expected one of {list(ACTIVATIONS)}")
    key = _checks.shape_class(x, weight, bias, options=op)
    if _passed.has(key):
        return
    for name, value in (("x", x), ("weight", weight), ("bias", bias)):
        if value is not None or name != "bias":
            tensor = _checks.check_tensor(op, name, value)
            _checks.check_dtype(op, name, tensor, _DTYPES)
            _checks.check_device(op, name, tensor, x.device)
    if x.dim() != x_axes.count(",") + 1 or 0 in x.shape[1:]:
        raise ValueError(f"{op}: x must be {x_axes} and not empty but for its batch, got shape {tuple(x.shape)}")
    if weight.dim() != axes.count(",") + 1 or weight.shape[0] != x.shape[-1] or 0 in weight.shape:
        raise ValueError(f"{op}: weight must be {axes} with C = {x.shape[-1]}, got shape {tuple(weight.shape)}")
    if bias is not None:
        _checks.check_shape(op, "bias", bias, "(C,)", x.shape[-1:])
    _passed.add(key)


def _cast(x: Tensor) -> Tensor:
    autocast = _library.autocast_dtype(x.device) if x.dtype != torch.float64 else None
    return x if autocast is None else x.to(autocast)


# The operator ----------------------------------------------------------------------------------------------------

_CALL_SCHEMA = "Tensor x, Tensor weight, Tensor? bias, int top, int left, bool flipped, str activation, bool residual"
"""The fields of ConvCall, in order."""


def _forward(*args: Any) -> Tensor:
    call = ConvCall(*args)
    return _dispatch.choose_inside(_MAPS, call).forward(call)


def _forward_fake(*args: Any) -> Tensor:
    x = ConvCall(*args).x
    return x.new_empty(x.shape)


def _backward(grad_y: Tensor, *args: Any) -> Sequence[Tensor | None]:
    call = ConvCall(*args)
    return _dispatch.choose_inside(_MAPS, call).backward(call, grad_y)


def _flops(*args: Any, out_shape: Any = None) -> int:
    """Two operations a pixel, channel and tap, as PyTorch counts a convolution."""
    call = ConvCall(*args)
    batch, height, width, channels = call.x
    return 2 * batch * height * width * channels * call.weight[1] * call.weight[2]


def _backward_flops(*args: Any) -> int:
    """As many for each of the two gradients, and for z if there is an activation."""
    return _flops(*args) * (2 if ConvCall(*args).activation == "none" else 3)


_operator = _library.define_differentiable(
    "depthwise_conv",
    schema=_CALL_SCHEMA,
    tensors=3,
    results=["y"],
    forward=_forward,
    fake=_forward_fake,
    flops=_flops,
    backward=_backward,
    backward_flops=_backward_flops,
)


# Implementations -------------------------------------------------------------------------------------------------


def _why_not_triton(call: ConvCall) -> str | None:
    from subquad.ops import _triton

    if (reason := _triton.why_not(call.x)) is not None:
        return reason
    if call.x.dtype == torch.float64:
        return "float64 runs in PyTorch"
    if call.x.shape[0] == 0:
        return "empty batch"
    _, kh, kw = call.weight.shape
    if kh * kw > 25 or max(kh, kw) > 8:
        return f"a kernel of {kh} x {kw}, ours have registers for up to 25 taps, 8 along an axis"
    return None


for _name, _prepare in ((_MAPS, prepare_map), (_SEQUENCES, prepare_sequence)):
    _dispatch.register(_name, _prepare, *_dispatch.usual(__name__, _why_not_triton))

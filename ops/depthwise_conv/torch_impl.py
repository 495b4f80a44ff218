"""The depthwise convolution as PyTorch's own, on the same memory as a channels-last (B, C, H, W): the path of CPUs.

Where the zeros in front of an axis are not as many as those behind it, both sides get the larger number, and what is
too much is cut off. The backward pass of a call with an activation convolves again instead of keeping what went into
it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.depthwise_conv.call import ConvCall, Gradients


def forward(call: ConvCall) -> Tensor:
    """Output (B, H, W, C) in x's dtype, contiguous."""
    y = _before_activation(call)
    if call.activation == "silu":
        y = F.silu(y)
    elif call.activation == "gelu":
        y = F.gelu(y)
    return y.contiguous()


def backward(call: ConvCall, grad_y: Tensor) -> Gradients:
    """Gradients of x, weight and bias, in their dtypes."""
    if call.activation == "silu":
        grad_y = torch.ops.aten.silu_backward(grad_y, _before_activation(call))
    elif call.activation == "gelu":
        grad_y = torch.ops.aten.gelu_backward(grad_y, _before_activation(call))
    whole = F.pad(grad_y, (0, 0, *_surplus(call)))
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        whole.permute(0, 3, 1, 2), call.x.permute(0, 3, 1, 2), _weight(call),
        None if call.bias is None else list(call.bias.shape), [1, 1], _padding(call), [1, 1], False, [0, 0],
        call.x.shape[3], [True, True, call.bias is not None],
    )  # fmt: skip
    grad_x = grad_x.permute(0, 2, 3, 1)
    if call.residual:
        grad_x = grad_x + grad_y
    grad_weight = grad_weight.squeeze(1)
    if call.flipped:
        grad_weight = grad_weight.flip(1, 2)
    return (
        grad_x.contiguous(),
        grad_weight.to(call.weight.dtype, memory_format=torch.contiguous_format),
        None if call.bias is None else grad_bias.to(call.bias.dtype),
    )


def _before_activation(call: ConvCall) -> Tensor:
    _, height, width, channels = call.x.shape
    bias = None if call.bias is None else call.bias.to(call.x.dtype)
    y = F.conv2d(call.x.permute(0, 3, 1, 2), _weight(call), bias, padding=_padding(call), groups=channels)
    left, _, top, _ = _surplus(call)
    y = y.permute(0, 2, 3, 1)[:, top : top + height, left : left + width]
    return y + call.x if call.residual else y


def _weight(call: ConvCall) -> Tensor:
    weight = call.weight.flip(1, 2) if call.flipped else call.weight
    return weight.to(call.x.dtype).unsqueeze(1)


def _padding(call: ConvCall) -> list[int]:
    """Zeros that PyTorch adds on both sides of each axis."""
    left, right, top, bottom = call.padding
    return [max(top, bottom), max(left, right)]


def _surplus(call: ConvCall) -> list[int]:
    """Columns and rows of PyTorch's result that are too much, in the order of ``ConvCall.padding``."""
    rows, columns = _padding(call)
    left, right, top, bottom = call.padding
    return [columns - left, columns - right, rows - top, rows - bottom]

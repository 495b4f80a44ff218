"""The depthwise convolution as a sum over taps."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from subquad.ops.depthwise_conv.call import ConvCall


def convolve(call: ConvCall) -> Tensor:
    """Output (B, H, W, C) in x's dtype."""
    x, weight = call.x.to(call.working), call.weight.to(call.working)
    _, height, width, _ = x.shape
    _, kh, kw = weight.shape
    if call.flipped:
        weight = weight.flip(1, 2)
    padded = F.pad(x, (0, 0, *call.padding))
    taps = [(i, j) for i in range(kh) for j in range(kw)]
    y = sum((weight[:, i, j] * padded[:, i : i + height, j : j + width] for i, j in taps), x.new_zeros(()))
    if call.bias is not None:
        y = y + call.bias.to(call.working)
    if call.residual:
        y = y + x
    if call.activation == "silu":
        y = F.silu(y)
    elif call.activation == "gelu":
        y = F.gelu(y)
    return y.to(call.x.dtype)

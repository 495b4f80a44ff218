"""The gate behind the sum of routes, scale (sum + addend) silu(z), for the PyTorch path and the export form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.selective_scan.call import ScanCall

# Results are contiguous whatever the gate is, as the operator's fake tensors are.


def gated(call: ScanCall, merged: Tensor) -> tuple[Tensor, Tensor]:
    """The gated output for the sum of routes in float32 (float64), and the kept sum."""
    kept = merged.to(call.gate_dtype, copy=True) if call.keep else call.new_kept()
    if call.z is not None:
        if call.addend is not None:
            merged = merged + call.addend.to(merged.dtype)
        merged = call.scale * merged * F.silu(call.z.to(merged.dtype))
    return merged.to(call.out_dtype).contiguous(), kept


def gate_gradients(call: ScanCall, kept: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the sum of routes (in ``gate_dtype``), z and addend; None for z if the sum was not kept."""
    if call.z is None:
        return grad_y, None, None
    z, grad_y = call.z.to(call.A.dtype).contiguous(), call.scale * grad_y.to(call.A.dtype).contiguous()
    grad_sum = (grad_y * F.silu(z)).to(call.gate_dtype)
    grad_z = None
    if call.keep:
        total = kept if call.addend is None else kept + call.addend.to(z.dtype).contiguous()
        grad_z = torch.ops.aten.silu_backward(grad_y * total, z).to(call.z.dtype)
    return grad_sum, grad_z, None if call.addend is None else grad_sum.to(call.addend.dtype)

"""The gate behind the selective scan in Triton: one kernel behind its forward pass, one in front of its backward pass.

Inside the scan's own kernels the gate would save little: the sum in front of it is what the gradient of z needs. And
they take seconds to compile, again for a gate, and again for one without gradients. Bytes: tools/benchmarks/NOTES.md.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from subquad.ops import _triton
from subquad.ops.selective_scan._triton_gate_kernels import (
    selective_scan_bwd_kernel_gate,
    selective_scan_fwd_kernel_gate,
)
from subquad.ops.selective_scan.call import ScanCall

_META = {"BLOCK": 1024, "num_warps": 4}
_launchers: _triton.Plans[_triton.Launcher] = _triton.Plans()


def gated(call: ScanCall, merged: Tensor) -> tuple[Tensor, Tensor]:
    """The gated output for the sum of routes in ``gate_dtype``, and the kept sum."""
    y = torch.empty_like(merged, dtype=call.out_dtype)
    with torch.cuda.device_of(y):
        _launch(call, "output", selective_scan_fwd_kernel_gate, (merged, *_maps(call), y))
    return y, merged if call.keep else call.new_kept()


def gate_gradients(call: ScanCall, kept: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the sum of routes (in ``gate_dtype``), z and addend; None for z if the sum was not kept."""
    if call.z is None:
        return grad_y, None, None
    z, addend = _maps(call)
    grad_sum = torch.empty_like(z, dtype=call.gate_dtype)
    grad_z = torch.empty_like(z) if call.keep else None
    with torch.cuda.device_of(z):
        tensors = grad_y.contiguous(), z, addend, kept, grad_sum, grad_sum if grad_z is None else grad_z
        _launch(call, "gradients", selective_scan_bwd_kernel_gate, tensors)
    return grad_sum, grad_z, None if call.addend is None else grad_sum.to(call.addend.dtype)


def _maps(call: ScanCall) -> tuple[Tensor, Tensor]:
    """z and addend as the kernels read them; z stands for an absent addend."""
    assert call.z is not None
    z = call.z.contiguous()
    return z, z if call.addend is None else call.addend.contiguous()


def _launch(call: ScanCall, name: str, kernel: object, tensors: tuple[Tensor, ...]) -> None:
    meta = {**_META, "ADD": call.addend is not None, "KEPT": call.keep}
    key = name, meta["ADD"], meta["KEPT"], *map(_triton.facts, tensors)
    numbers = call.x.numel()
    grid = (triton.cdiv(numbers, meta["BLOCK"]), 1, 1)
    _launchers.get(key, call.x, _triton.Launcher)(name, kernel, grid, (*tensors, numbers, call.scale), meta)

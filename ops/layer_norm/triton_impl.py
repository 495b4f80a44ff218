"""The layer norm in Triton: forward and backward.

Design. A program holds some rows whole: it reads them once, and sum, statistics and result are on the chip, so a pass
takes as long as its bytes. The backward pass has the statistics again from the row that it reads anyway. Its programs
go through many blocks of rows and sum the gradients of weight and bias in registers, apart for each row of a block;
what they find at last is added up by a second kernel, in a fixed order.

A kernel is compiled for the power of two that the channels fit into, so the stages of a model have one each. Bytes,
floors and measurements: tools/benchmarks/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.ops import _compile, _triton
from subquad.ops._compile import Turn
from subquad.ops.layer_norm._triton_kernels import (
    layer_norm_bwd_kernel,
    layer_norm_bwd_kernel_sums,
    layer_norm_fwd_kernel,
)
from subquad.ops.layer_norm.call import GradCall, Gradients, NormCall

_TILE = 512
"""Numbers a warp holds of a block of rows: 16 a thread, of up to six tensors in the backward pass."""

_WIDEST_STAGE = 1024
"""Most channels that are compiled for ahead of their first use."""

_WAVES = 4
"""Programs of the backward pass for each multiprocessor."""


class _Plan(NamedTuple):
    """What all calls of one shape class share."""

    rows: int
    dim: int
    blocks: int
    programs: int  # of the backward pass
    meta: dict[str, Any]
    launch: _triton.Launcher


_plans: _triton.Plans[_Plan] = _triton.Plans()


def _plan_for(
    which: str,
    x: Tensor,
    entering: Tensor | None,
    branch: Tensor | None,
    bias: Tensor | None,
    *more: Tensor,
    on_new: Callable[[], None] | None = None,
) -> _Plan:
    """The plan of a call's shape class: all that the kernels are compiled for.

    Args:
        which: "forward" or "backward".
        x: what the norm is taken of, without its branch.
        entering: gradient that enters through the sum.
        branch, bias: they or their gradients.
        more: other tensors that the kernels see.
        on_new: see ``Plans.get``.
    """
    key = (which, x.shape, *map(_facts, (x, entering, branch, bias, *more)))
    return _plans.get(key, x, lambda: _make_plan(x, entering, branch, bias), on_new)


def _facts(tensor: Tensor | None) -> object:
    """As ``_triton.facts`` for a contiguous tensor whose shape follows from x's."""
    return None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16)


def _make_plan(x: Tensor, entering: Tensor | None, branch: Tensor | None, bias: Tensor | None) -> _Plan:
    dim = x.shape[-1]
    rows, width = x.numel() // dim, triton.next_power_of_2(dim)
    warps = 4 if width <= 1024 else 8
    height = max(1, _TILE * warps // width)
    blocks = triton.cdiv(rows, height)
    meta = {
        "ENTERING": entering is not None,
        "BRANCH": branch is not None,
        "BIAS": bias is not None,
        "BM": height,
        "BC": width,
        "BP": 32,
        "BJ": 32,
        "INDEX": tl.int64 if x.numel() >= 2**31 else tl.int32,
        "num_warps": warps,
        "num_stages": 1,
    }
    programs = min(blocks, _WAVES * _triton.multiprocessor_count(x.device))
    return _Plan(rows, dim, blocks, programs, meta, _triton.Launcher())


def _compile_ahead(call: NormCall) -> None:
    """Compile the kernel of a call that is about to run for the first time, and at once those of its gradients.

    Those of the next stages too: a norm is the first thing in a block, and each stage would wait for its kernels alone.
    """
    meta, device = _triton.on_meta(call), call.x.device
    with _compile.compiling_ahead(device):
        passes = [(meta, forward(meta))]
    with _compile.compiling_ahead(device, Turn.NEXT):
        for factor in (2, 4, 8):
            if meta.x.shape[-1] * factor <= _WIDEST_STAGE:
                wider = NormCall._make(_widen(value, factor) for value in meta)
                passes.append((wider, forward(wider)))
    if call.x.requires_grad or call.weight.requires_grad:
        with _compile.compiling_ahead(device, Turn.GRADIENTS):
            for each, (total, y) in passes:
                entering, branch_dtype = (None, None) if each.branch is None else (total, each.branch.dtype)
                backward(GradCall(y, entering, total, each.weight, each.bias, each.eps, each.x.dtype, branch_dtype))


def _widen(value: Any, factor: int) -> Any:
    """A meta tensor with more channels; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.new_empty((*value.shape[:-1], value.shape[-1] * factor))


def forward(call: NormCall) -> tuple[Tensor, Tensor]:
    """x + branch (x itself without one), and the norm of it; contiguous."""
    x, weight = call.x.contiguous(), call.weight.contiguous()
    branch = None if call.branch is None else call.branch.contiguous()
    bias = None if call.bias is None else call.bias.contiguous()
    total = x if branch is None else torch.empty_like(x, dtype=call.total_dtype)
    y = torch.empty_like(x, dtype=call.dtype)
    plan = _plan_for("forward", x, None, branch, bias, weight, total, y, on_new=lambda: _compile_ahead(call))
    arguments = (x, x if branch is None else branch, weight, weight if bias is None else bias, total, y)
    with torch.cuda.device_of(x):
        plan.launch(
            "norm", layer_norm_fwd_kernel, (plan.blocks, 1, 1), (*arguments, plan.rows, plan.dim, call.eps), plan.meta
        )
    return total, y


def backward(call: GradCall) -> Gradients:
    """Gradients of x, branch, weight and bias."""
    total, grad_y, weight = call.total.contiguous(), call.grad_y.contiguous(), call.weight.contiguous()
    entering = None if call.grad_total is None else call.grad_total.contiguous()
    grad_x = torch.empty_like(total, dtype=call.x_dtype)
    grad_branch = None if call.branch_dtype is None else torch.empty_like(total, dtype=call.branch_dtype)
    grad_weight = torch.empty_like(weight)
    grad_bias = None if call.bias is None else torch.empty_like(call.bias, memory_format=torch.contiguous_format)
    plan = _plan_for("backward", total, entering, grad_branch, grad_bias, grad_y, weight, grad_x)
    partials = total.new_empty((plan.programs, 2, plan.dim), dtype=torch.float32)
    arguments: tuple[Any, ...] = (total, weight, total if entering is None else entering, grad_y, grad_x)
    arguments = (*arguments, grad_x if grad_branch is None else grad_branch, partials)
    with torch.cuda.device_of(total):
        numbers = plan.rows, plan.dim, plan.blocks, call.eps
        plan.launch("gradients", layer_norm_bwd_kernel, (plan.programs, 1, 1), (*arguments, *numbers), plan.meta)
        arguments = (partials, grad_weight, grad_weight if grad_bias is None else grad_bias, plan.programs, plan.dim)
        grid = (triton.cdiv(plan.dim, plan.meta["BJ"]), 2, 1)
        plan.launch("sums", layer_norm_bwd_kernel_sums, grid, arguments, plan.meta)
    return grad_x, grad_branch, grad_weight, grad_bias

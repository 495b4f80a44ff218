"""The depthwise convolution in Triton: forward and backward.

Design. All columns of all images stand side by side, some of them a tile with 32 channels, so that maps of any width
fill it, and a program walks down the rows. A row of the input comes from memory once and, shifted by a column or two,
from the L1; it is added to all of the rows of outputs that see it, whose unfinished sums wait in registers beside the
taps. A sequence is a map of one column, walked along the tokens: its inputs are loaded once and never shifted.

The backward pass walks in the same way over dz and meets x and dx at the rows that dz sees: dx and the gradients of the
taps come from one read of x and dz. Gradients of taps are summed in registers over all that a program walks and leave
as its partial sums, which a second kernel adds up in a fixed order. With an activation dz = dy act'(conv(x)) is a
tensor of its own, made by the forward kernel: 6 bytes an element more in 16 bits, where to compute it inside would
repeat convolution and exponentials kw times, which takes longer.

Channels, sizes and strides are numbers of run time: one kernel for all stages of a model. Up to 25 taps fit into
registers. Bytes, floors and measurements: tools/benchmarks/NOTES.md.
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
from subquad.ops.depthwise_conv._triton_kernels import (
    depthwise_conv_bwd_kernel,
    depthwise_conv_bwd_kernel_sums,
    depthwise_conv_fwd_kernel,
)
from subquad.ops.depthwise_conv.call import ConvCall, Gradients

_CHANNELS = 32
"""Channels of a tile: 64 bytes of a pixel in 16 bits, and what the channels of most models are multiples of."""


class Config(NamedTuple):
    """Launch choices of a pass for a shape class.

    Attributes:
        columns: of a tile.
        warps: of a program.
        waves: programs wanted for each multiprocessor.
    """

    columns: int
    warps: int
    waves: int


_CONFIGS = {
    ("forward", "up to 4 taps"): Config(columns=16, warps=2, waves=24),
    ("forward", "up to 9 taps"): Config(columns=16, warps=4, waves=24),
    ("forward", "up to 25 taps"): Config(columns=16, warps=4, waves=24),
    ("backward", "up to 4 taps"): Config(columns=16, warps=4, waves=6),
    ("backward", "up to 9 taps"): Config(columns=16, warps=4, waves=6),
    ("backward", "up to 25 taps"): Config(columns=8, warps=4, waves=6),
}
"""The one table of launch heuristics; ``SUBQUAD_AUTOTUNE=1`` searches ``_CANDIDATES`` instead."""

_CANDIDATES = [
    Config(columns, warps, waves)
    for columns, warps in ((4, 1), (8, 1), (8, 2), (16, 2), (8, 4), (16, 4), (32, 4))
    for waves in (3, 6, 12, 24, 48)
]


def default_config(which: str, call: ConvCall) -> Config:
    """The table's launch choices for the ``"forward"`` or ``"backward"`` pass of a call."""
    taps = call.weight.shape[1] * call.weight.shape[2]
    return _CONFIGS[which, f"up to {4 if taps <= 4 else 9 if taps <= 9 else 25} taps"]


def _config_for(which: str, call: ConvCall, run: Callable[[Config], object]) -> Config:
    key = ("depthwise_conv", which, *call.x.shape, *call.weight.shape[1:], call.activation, call.x.dtype)
    return _triton.tuned(key, call.x, _CANDIDATES, default_config(which, call), run)


def _canonical(call: ConvCall) -> ConvCall:
    """``call`` as the kernels take it: a sequence as a map of one column, channels with stride 1."""
    if call.x.shape[1] == 1 and call.weight.shape[1] == 1:
        call = call._replace(x=call.x.transpose(1, 2), weight=call.weight.mT, top=call.left, left=call.top)
    if call.x.stride(3) == 1 and call.weight.is_contiguous() and (call.bias is None or call.bias.is_contiguous()):
        return call
    x = call.x if call.x.stride(3) == 1 else call.x.contiguous()
    bias = None if call.bias is None else call.bias.contiguous()
    return call._replace(x=x, weight=call.weight.contiguous(), bias=bias)


class _Plan(NamedTuple):
    """What all calls of one shape class share."""

    grid: tuple[int, int, int]
    programs: int
    sizes: tuple[int, ...]  # stride_b to rows of the kernels' arguments
    taps: tuple[int, int, float]  # first, step and center
    meta: dict[str, Any]
    launch: _triton.Launcher


_plans: _triton.Plans[_Plan] = _triton.Plans()


def _plan_for(
    which: str, call: ConvCall, config: Config, *more: Tensor, on_new: Callable[[], None] | None = None
) -> _Plan:
    """The plan of a call's shape class: all that the kernels are compiled for.

    Args:
        which: "forward", "activation" (its gradient, by the forward kernel) or "backward".
        more: tensors besides the call's that the kernels see.
        on_new: see ``Plans.get``.
    """
    key = (which, config, *call[3:], *map(_triton.facts, (*call[:3], *more)))
    return _plans.get(key, call.x, lambda: _make_plan(which, call, config), on_new)


def _make_plan(which: str, call: ConvCall, config: Config) -> _Plan:
    x, (_, kh, kw) = call.x, call.weight.shape
    batch, height, width, dim = x.shape
    blocks, dim_blocks = triton.cdiv(batch * width, config.columns), triton.cdiv(dim, _CHANNELS)
    wanted = max(1, config.waves * _triton.multiprocessor_count(x.device) // dim_blocks)
    # Rows at the seams of items are loaded twice: items have four times as many at least, where there are so many.
    rows = triton.cdiv(height, max(1, min(triton.cdiv(wanted, blocks), height // max(1, 4 * (kh - 1)))))
    items = blocks * triton.cdiv(height, rows)
    backward = which == "backward"
    programs = triton.cdiv(items, triton.cdiv(items, wanted)) if backward else items
    flipped = call.flipped != backward
    align = _alignment(x)
    largest = max(x.numel(), 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)))
    meta = {
        "KH": kh,
        "KW": kw,
        "TOP": kh - 1 - call.top if backward else call.top,
        "LEFT": kw - 1 - call.left if backward else call.left,
        "TAPS": kh * kw,
        "BM": config.columns,
        "BC": _CHANNELS,
        "BP": 128,
        "BJ": 32,
        "ALIGN": align,
        "ACTIVATION": call.activation,
        "GRADIENT": which == "activation",
        "BIAS": call.bias is not None,
        "INDEX": tl.int64 if largest >= 2**31 else tl.int32,
        "num_warps": config.warps,
        "num_stages": 1,
    }
    strides = (step // align for step in x.stride()[:3])
    return _Plan(
        grid=(programs * dim_blocks, 1, 1),
        programs=programs,
        sizes=(*strides, batch * width, blocks, height, width, dim // align, dim_blocks, items, rows),
        taps=(kh * kw - 1 if flipped else 0, -1 if flipped else 1, float(call.residual)),
        meta=meta,
        launch=_triton.Launcher(),
    )


def _alignment(x: Tensor) -> int:
    """Elements (1, 2, 4 or 8) that strides and channels are multiples of, for wide loads."""
    align = 8
    while any(number % align for number in (*x.stride()[:3], x.shape[3])):
        align //= 2
    return align


def _compile_ahead(call: ConvCall) -> None:
    """Compile the kernel of a call that is about to run for the first time, and at once those of its gradients."""
    meta = _triton.on_meta(call)
    with _compile.compiling_ahead(call.x.device):
        y = forward(meta)
    if call.x.requires_grad or call.weight.requires_grad:
        with _compile.compiling_ahead(call.x.device, Turn.GRADIENTS):
            backward(meta, y)


def forward(call: ConvCall) -> Tensor:
    """Output (B, H, W, C) in x's dtype."""
    y = torch.empty_like(call.x, memory_format=torch.contiguous_format)
    given, call = call, _canonical(call)

    def run(config: Config) -> None:
        _run_forward("forward", call, y, y, config, on_new=lambda: _compile_ahead(given))

    run(_config_for("forward", call, run))
    return y


def _run_forward(
    which: str, call: ConvCall, grad_y: Tensor, y: Tensor, config: Config, on_new: Callable[[], None] | None = None
) -> None:
    plan = _plan_for(which, call, config, grad_y, on_new=on_new)
    bias = call.weight if call.bias is None else call.bias
    arguments = (call.x, call.weight, bias, grad_y, y, *plan.sizes, *plan.taps)
    with torch.cuda.device_of(call.x):
        plan.launch("convolution", depthwise_conv_fwd_kernel, plan.grid, arguments, plan.meta)


def backward(call: ConvCall, grad_y: Tensor) -> Gradients:
    """Gradients of x, weight and bias, in their dtypes."""
    grad_x, grad_weight, grad_bias = (
        None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in call[:3]
    )
    assert grad_x is not None and grad_weight is not None
    grads = grad_x, grad_weight, grad_bias
    call, grad_z = _canonical(call), grad_y.contiguous()
    if call.activation != "none":
        grad_y, grad_z = grad_z, torch.empty_like(grad_z)
        _run_forward("activation", call, grad_y, grad_z, default_config("forward", call))
        call = call._replace(activation="none")

    def run(config: Config) -> None:
        _run_backward(call, grad_z, grads, config)

    run(_config_for("backward", call, run))
    return grads


def _run_backward(call: ConvCall, grad_z: Tensor, grads: Gradients, config: Config) -> None:
    plan = _plan_for("backward", call, config, grad_z)
    grad_x, grad_weight, grad_bias = grads
    numbers = (plan.meta["TAPS"] + plan.meta["BIAS"]) * call.x.shape[3]
    partials = call.x.new_empty((plan.programs, numbers), dtype=torch.float32)
    first, step, _ = plan.taps
    with torch.cuda.device_of(call.x):
        arguments: tuple[Any, ...] = (call.x, call.weight, grad_z, grad_x, partials, *plan.sizes, *plan.taps)
        plan.launch("gradients", depthwise_conv_bwd_kernel, plan.grid, arguments, plan.meta)
        arguments = (partials, grad_weight, grad_weight if grad_bias is None else grad_bias)
        arguments = (*arguments, plan.programs, call.x.shape[3], first, step, numbers)
        grid = (-(-numbers // plan.meta["BJ"]), 1, 1)
        plan.launch("sums", depthwise_conv_bwd_kernel_sums, grid, arguments, plan.meta)

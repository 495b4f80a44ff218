"""Window attention in Triton: forward and backward.

Design. The tokens of a window are rows that index arithmetic finds on the map: roll, padding, partition and their
inverses cost a division by the window's width (a constant). A window of up to 64 tokens is one tile of 16, 32 or 64
rows, and its logits never leave the chip; larger windows are cut into tiles of 64, with an online softmax forward, and
backward one kernel for the gradients of queries and one for those of keys and values. A program walks over many windows
of one head, so that the bias, spread out from its table to [rows, rows] by a small kernel before, stays in reach, and
sums the gradient of the bias over them. The partial sums of the programs are added in a fixed order and folded into the
table.

Rows behind the window's end are masked by minus infinity in the spread-out bias; tokens of padding have the key and
value of padding. 7 x 7 windows fill 49 of 64 rows: 59 % of the products, which memory hides (24.5 operations a byte).
Bytes, floors and measurements: tools/benchmarks/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from subquad.ops import _compile, _triton
from subquad.ops._compile import Turn
from subquad.ops._triton_attention import pad_gradient, strides_of, with_rows
from subquad.ops.window_attention._triton_kernels import (
    window_attention_bwd_kernel,
    window_attention_bwd_kernel_keys,
    window_attention_bwd_kernel_queries,
    window_attention_bwd_kernel_table,
    window_attention_fwd_kernel,
    window_attention_fwd_kernel_bias,
)
from subquad.ops.window_attention.call import Gradients, WindowCall

_BLOCK = 64
"""Rows of the largest tile."""


class Config(NamedTuple):
    """Launch choices of a pass for a shape class.

    Attributes:
        waves: programs wanted for each multiprocessor; each walks over its share of the windows.
        warps: warps of a program.
        stages: windows whose rows are on their way at once.
    """

    waves: int
    warps: int
    stages: int


_CONFIGS = {
    ("forward", 16, "narrow"): Config(waves=16, warps=4, stages=2),
    ("forward", 16, "wide"): Config(waves=16, warps=8, stages=1),
    ("forward", 32, "narrow"): Config(waves=16, warps=8, stages=1),
    ("forward", 32, "wide"): Config(waves=16, warps=16, stages=1),
    ("backward", 16, "narrow"): Config(waves=8, warps=4, stages=2),
    ("backward", 16, "wide"): Config(waves=8, warps=8, stages=1),
    ("backward", 32, "narrow"): Config(waves=8, warps=8, stages=1),
    ("backward", 32, "wide"): Config(waves=8, warps=16, stages=1),
}
"""The one table of launch heuristics, by pass, bits of a number and channels of a head (up to 32, or more);
``SUBQUAD_AUTOTUNE=1`` searches ``_CANDIDATES`` instead."""

_CANDIDATES = [Config(waves, warps, stages) for waves in (4, 8, 16, 32) for warps in (4, 8) for stages in (1, 2)]


def default_config(which: str, call: WindowCall) -> Config:
    """The table's launch choices for the ``"forward"`` or ``"backward"`` pass of a call."""
    return _CONFIGS[which, 8 * call.q.element_size(), "narrow" if max(call.channels) <= 32 else "wide"]


def _config_for(which: str, call: WindowCall, run: Callable[[Config], object]) -> Config:
    key = ("window_attention", which, *call.q.shape, *call.window, *call.shift, call.grid, call.q.dtype)
    return _triton.tuned(key, call.q, _CANDIDATES, default_config(which, call), run)


class _Inputs(NamedTuple):
    """Inputs as the kernels take them: one stride from pixel to pixel; q for what is absent."""

    q: Tensor
    k: Tensor
    v: Tensor
    pad_k: Tensor
    pad_v: Tensor
    table: Tensor


def _inputs(call: WindowCall) -> _Inputs:
    q, k, v = (with_rows(x) for x in call.parts)
    return _Inputs(
        q,
        k,
        v,
        q if call.pad_k is None else call.pad_k.contiguous(),
        q if call.pad_v is None else call.pad_v.contiguous(),
        q if call.table is None else call.table,
    )


class _Plan(NamedTuple):
    """What all calls of one shape class share."""

    programs: int
    block: int
    blocks: int
    strides: tuple[int, ...]  # stride_qb to stride_vh of the kernels' arguments
    sizes: tuple[int, ...]  # windows to offset_x of the kernels' arguments
    meta: dict[str, Any]
    launch: _triton.Launcher


_plans: _triton.Plans[_Plan] = _triton.Plans()


def _plan_for(
    which: str,
    call: WindowCall,
    inputs: _Inputs,
    config: Config,
    *more: Tensor,
    on_new: Callable[[], None] | None = None,
) -> _Plan:
    """The plan of a call's shape class: all that the kernels are compiled for.

    Args:
        which: "forward" or "backward".
        more: tensors besides ``inputs`` that the kernels see.
        on_new: see ``Plans.get``.
    """
    options = (*call.window, *call.shift, *call[8:])
    absent = call.k is None, call.table is None, call.pad_k is None, call.pad_v is None
    key = (which, config, options, absent, *map(_triton.facts, inputs), *map(_triton.facts, more))
    return _plans.get(key, call.q, lambda: _make_plan(call, inputs, config), on_new)


def _make_plan(call: WindowCall, inputs: _Inputs, config: Config) -> _Plan:
    q, k, v = inputs[:3]
    batch, height, width, heads, dim = q.shape
    values = v.shape[-1]
    (rows, columns), (window_h, window_w) = call.counts, call.window
    block = min(_BLOCK, max(16, triton.next_power_of_2(call.tokens)))
    blocks = triton.cdiv(call.tokens, block)
    windows = batch * rows * columns
    wanted = config.waves * _triton.multiprocessor_count(q.device)
    offsets = call.shift if call.pad_first else [s % n for s, n in zip(call.shift, (height, width), strict=True)]
    meta = {
        "WH": window_h,
        "WW": window_w,
        "SY": call.shift[0],
        "SX": call.shift[1],
        "D": dim,
        "E": values,
        "BD": max(16, triton.next_power_of_2(dim)),
        "BE": max(16, triton.next_power_of_2(values)),
        "BT": block,
        "BLOCKS": blocks,
        "SCALE": call.scale,
        "MASK": call.mask_value,
        "BIAS": call.table is not None,
        "RAGGED": rows * window_h != height or columns * window_w != width,
        "PADK": call.pad_k is not None,
        "PADV": call.pad_v is not None,
        "HIDE": call.hide_padding,
        "PAD_FIRST": call.pad_first,
        "GRID": call.grid,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "SIZE": block * blocks,
        "BS": 256,
        "BX": triton.next_power_of_2(window_w),
        "BQ": triton.next_power_of_2(call.tokens),
        "KEY_MINUS_QUERY": call.key_minus_query,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    return _Plan(
        programs=max(1, min(windows, wanted // (heads * blocks))),
        block=block,
        blocks=blocks,
        strides=(*strides_of(q), *strides_of(k), *strides_of(v)),
        sizes=(windows, height, width, rows, columns, heads, *offsets),
        meta=meta,
        launch=_triton.Launcher(),
    )


def _spread_bias(call: WindowCall, plan: _Plan, inputs: _Inputs) -> Tensor:
    """The bias of every pair of a window's rows, (heads, rows, rows), as the kernels add it; q if there is none."""
    if call.table is None:
        return inputs.q
    heads, size = call.q.shape[-2], plan.meta["SIZE"]
    bias = call.q.new_empty((heads, size, size), dtype=torch.float32)
    plan.launch(
        "bias",
        window_attention_fwd_kernel_bias,
        (size * size // plan.meta["BS"], heads, 1),
        (call.table, bias, *call.table.stride(), heads),
        plan.meta,
    )
    return bias


def _compile_ahead(call: WindowCall) -> None:
    """Compile the kernels of a call that is about to run for the first time at once, and those of its gradients."""
    meta = _triton.on_meta(call)
    with _compile.compiling_ahead(call.q.device):
        o, lse = _forward(meta, default_config("forward", call))
    if any(value is not None and value.requires_grad for value in call[:6]):
        with _compile.compiling_ahead(call.q.device, Turn.GRADIENTS):
            _backward(meta, o, o, lse, default_config("backward", call))


def forward(call: WindowCall) -> tuple[Tensor, Tensor]:
    """Output (B, H, W, heads, E) in q's dtype and lse (B, H, W, heads) in float32."""
    return _forward(call, _config_for("forward", call, lambda config: _forward(call, config)))


def _forward(call: WindowCall, config: Config) -> tuple[Tensor, Tensor]:
    inputs = _inputs(call)
    q, k, v = inputs[:3]
    plan = _plan_for("forward", call, inputs, config, on_new=lambda: _compile_ahead(call))
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    with torch.cuda.device_of(q):
        bias = _spread_bias(call, plan, inputs)
        plan.launch(
            "attention",
            window_attention_fwd_kernel,
            (q.shape[-2] * plan.blocks, plan.programs, 1),
            (q, k, v, bias, inputs.pad_k, inputs.pad_v, o, lse, *plan.strides, *plan.sizes),
            plan.meta,
        )
    return o, lse


def backward(call: WindowCall, grad_o: Tensor, o: Tensor, lse: Tensor) -> Gradients:
    """Gradients of q, k, v, table, pad_k and pad_v, in their dtypes; None for an absent argument."""
    grad_o = grad_o.contiguous()

    def run(config: Config) -> Gradients:
        return _backward(call, grad_o, o, lse, config)

    return run(_config_for("backward", call, run))


def _backward(call: WindowCall, grad_o: Tensor, o: Tensor, lse: Tensor, config: Config) -> Gradients:
    inputs = _inputs(call)
    q, k, v = inputs[:3]
    plan = _plan_for("backward", call, inputs, config, grad_o)
    heads, dim, values = q.shape[-2], q.shape[-1], v.shape[-1]
    grad = call._replace(
        q=torch.empty_like(call.q, memory_format=torch.contiguous_format),
        k=None if call.k is None else torch.empty_like(call.k, memory_format=torch.contiguous_format),
        v=None if call.v is None else torch.empty_like(call.v, memory_format=torch.contiguous_format),
    )
    grad_q, grad_k, grad_v = grad.parts
    ragged = plan.meta["RAGGED"]
    pairs = _partials(q, plan.programs, heads, *[call.tokens] * 2 if call.table is not None else (0,))
    partials = plan.programs * plan.blocks, heads
    pad_k = _partials(q, *partials, dim if ragged and call.pad_k is not None else 0)
    pad_v = _partials(q, *partials, values if ragged and call.pad_v is not None else 0)
    with torch.cuda.device_of(q):
        given = (q, k, v, _spread_bias(call, plan, inputs), inputs.pad_k, inputs.pad_v, o, lse, grad_o)
        strides = plan.strides
        grid = (heads * plan.blocks, plan.programs, 1)
        if plan.blocks == 1:
            found: tuple[Tensor, ...] = (grad_q, grad_k, grad_v, pairs, pad_k, pad_v)
            strides = (*strides, *strides_of(grad_q), *strides_of(grad_v), *plan.sizes)
            plan.launch("gradients", window_attention_bwd_kernel, grid, (*given, *found, *strides), plan.meta)
        else:
            pairs.zero_()
            arguments = (*given, grad_q, pairs, *strides, *strides_of(grad_q), *plan.sizes)
            plan.launch("queries", window_attention_bwd_kernel_queries, grid, arguments, plan.meta)
            found = (grad_k, grad_v, pad_k, pad_v)
            strides = (*strides, *strides_of(grad_k), *strides_of(grad_v), *plan.sizes)
            plan.launch("keys", window_attention_bwd_kernel_keys, grid, (*given, *found, *strides), plan.meta)
        table = None
        if call.table is not None:
            table = torch.empty_like(call.table, memory_format=torch.contiguous_format)
            plan.launch(
                "table",
                window_attention_bwd_kernel_table,
                (heads, 2 * call.window[0] - 1, 1),
                (pairs.sum(0), table, heads),
                plan.meta,
            )
    return (
        grad.q,
        grad.k,
        grad.v,
        table,
        None if call.pad_k is None else pad_gradient(call.pad_k, pad_k),
        None if call.pad_v is None else pad_gradient(call.pad_v, pad_v),
    )


def _partials(q: Tensor, *shape: int) -> Tensor:
    """Unfilled memory for partial sums of the programs, in float32."""
    return q.new_empty(shape, dtype=torch.float32)

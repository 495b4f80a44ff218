"""Selective scan in Triton: forward and backward.

Design. A *tile* is 8 (or 4) consecutive steps of a path, a *segment* a run of tiles that one lane walks, a *lane* one
segment of one image. A program is one warp: it walks 4 lanes side by side over BC channels. The [BC, 32] tile has the
layout of the tensor core product that expands the step sizes, with column = (step // 2, lane, step % 2): a thread holds
all steps of its lane and adjacent channels, so the recurrence is plain sequential arithmetic on registers. Low-rank
steps, B and C of a pixel and route are one packed row, read once; B and C reach all channels by one product with unit
vectors.

Routes that visit the same pixels in opposite directions ("row" and "row_reversed") form a *group*. Its pixels are read
once for both: the output pass walks a segment from its start, keeps the forward route's state on chip and takes the
reversed route's state at each tile from a pass before it, which walked from the end and computed nothing but states.
With one segment an image (enough images and channels to fill the GPU) that is all; otherwise every segment of that
first pass starts from zero, ``chain`` carries states from segment to segment, and a tile's state is corrected by the
decay since the segment's end: exp(A * sum of steps) * entering state. The backward pass is the same with adjoint
states: the first pass walks from the start, the gradient pass from the end.

This is the scan with one state; for several see _triton_many.py. Groups of channels run in PyTorch.
Bytes, floors and measurements: tools/benchmarks/NOTES.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from subquad.ops import _compile, _triton
from subquad.ops._compile import Turn
from subquad.ops.selective_scan import _triton_many
from subquad.ops.selective_scan._triton_backward import (
    selective_scan_bwd_kernel,
    selective_scan_bwd_kernel_states,
)
from subquad.ops.selective_scan._triton_forward import (
    selective_scan_fwd_kernel,
    selective_scan_fwd_kernel_states,
)
from subquad.ops.selective_scan._triton_gate import gate_gradients, gated
from subquad.ops.selective_scan._triton_plan import (
    Config,
    Plan,
    by_channel,
    chain,
    config_for,
    default_config,
    dot_dtype,
    kernel_inputs,
    next_stages,
    pack_routes,
    plan_for,
    scratch,
    sum_parameters,
)
from subquad.ops.selective_scan._triton_sums import selective_scan_bwd_kernel_rows
from subquad.ops.selective_scan.call import Gradients, ScanCall


class _Between(NamedTuple):
    """What the passes of a call hand to each other, in float32; not there when nothing is handed."""

    tiles: Tensor  # (groups, B, tiles, E): state that enters each tile
    sums: Tensor  # (groups, B, tiles, E): steps since the segment's start of the walk
    ends: Tensor  # (B, K, segments, 1, E): state that leaves each segment when it starts from zero
    totals: Tensor  # (B, K, segments, E): sum of a segment's steps


def _between(x: Tensor, plan: Plan, n_routes: int) -> _Between:
    batch, dim = x.shape[0], x.shape[-1]
    groups = plan.groups_at_once if any(group.reversed >= 0 for group in plan.groups) else 0
    tiles = scratch(x, max(1, groups), batch, plan.tiles if groups else 0, dim)
    if not plan.two_level:
        return _Between(tiles, tiles, tiles, tiles)
    return _Between(
        tiles,
        torch.empty_like(tiles),
        scratch(x, batch, n_routes, plan.segments, 1, dim),
        scratch(x, batch, n_routes, plan.segments, dim),
    )


def _of_group(between: _Between, i: int) -> tuple[Tensor, Tensor]:
    """Tiles and sums of the i-th group of a batch; some of either where there are none to read."""
    i = min(i, len(between.tiles) - 1)
    return between.tiles[i], between.sums[i]


def _compile_ahead(call: ScanCall, config: Config) -> None:
    """Compile all kernels of a call that is about to run for the first time, those of next stages and of gradients."""
    meta, device = _triton.on_meta(call), call.x.device
    with _compile.compiling_ahead(device) as started:
        y, states = _forward(meta, config)
    with _compile.compiling_ahead(device, Turn.NEXT):
        for stage in next_stages(meta) if started else ():  # else this is a stage that was foreseen
            _forward(stage, default_config("forward", stage))
    if call.x.requires_grad:
        with _compile.compiling_ahead(device, Turn.GRADIENTS):
            _backward(meta, states, y, None, default_config("backward", call))


def forward(call: ScanCall) -> tuple[Tensor, Tensor, Tensor]:
    """Merged output, saved states and kept sum of a canonical call (see call.py)."""

    routes = call if call.z is None else call._replace(z=None, addend=None, out_dtype=call.gate_dtype)

    def run(config: Config) -> tuple[Tensor, Tensor, Tensor]:
        if call.A.shape[-1] > 1:
            y, states = _triton_many.forward(routes, config, default_config("backward", call))
        else:
            y, states = _forward(routes, config)
        if call.z is None:
            return y, states, call.new_kept()
        y, kept = gated(call, y)
        return y, states, kept

    return run(config_for("forward", call, run))


def _forward(call: ScanCall, config: Config) -> tuple[Tensor, Tensor]:
    inputs = kernel_inputs(call)
    plan = plan_for("forward", call, inputs, config, on_new=lambda: _compile_ahead(call, config))
    x, meta = inputs.x, plan.meta
    batch, dim, n_routes = x.shape[0], x.shape[-1], len(call.routes)

    table = x if call.table is None else call.table.contiguous()
    y = torch.empty_like(x, dtype=call.out_dtype)
    partial = y if len(plan.groups) == 1 or y.dtype == torch.float32 else scratch(x, *x.shape)
    states = scratch(x, batch, n_routes, plan.sizes[4], dim, 1)
    between = _between(x, plan, n_routes)
    given = by_channel(call.initial_state)
    has_given = given is not None
    given = states if given is None else given
    entries = given
    shared = (x, inputs.dt, inputs.rows, inputs.weight, inputs.bias, inputs.A)

    with torch.cuda.device_of(x):
        for batch_number, groups in enumerate(plan.batches):
            is_forward, is_reversed = groups[0].directions
            directions = {"FORWARD": is_forward, "REVERSED": is_reversed}
            first = plan.groups.index(groups[0])
            if is_reversed or plan.two_level:
                plan.launch(
                    f"states {batch_number}",
                    selective_scan_fwd_kernel_states,
                    (*plan.grid, len(groups)),
                    (
                        *shared, table, given, *between, states,
                        *plan.sizes, pack_routes(groups), batch,
                    ),
                    {**meta, **directions, "ENTRY": has_given and not plan.two_level},
                )  # fmt: skip
            if plan.two_level:
                last = states[0, 0, -1]
                entries = chain(
                    plan.launch, inputs.A, between.ends, between.totals, given if has_given else None, last,
                    states.stride(1), plan.routes("reversed"),
                )  # fmt: skip
            for i, group in enumerate(groups):
                number = first + i
                plan.launch(
                    f"output {number}",
                    selective_scan_fwd_kernel,
                    (*plan.grid, 1),
                    (
                        *shared, inputs.D, table, entries, *_of_group(between, i), states,
                        partial, y, *plan.sizes, pack_routes([group]),
                        int(number > 0), int(number == len(plan.groups) - 1),
                    ),
                    {**meta, **directions, "ENTRY": plan.two_level or has_given},
                )  # fmt: skip
    return y, states


def backward(call: ScanCall, states: Tensor, kept: Tensor, grad_y: Tensor, grad_last_state: Tensor | None) -> Gradients:
    """Gradients of a canonical call from what its forward pass saved, each in its input's dtype."""

    def run(config: Config) -> Gradients:
        grad_sum, grad_z, grad_addend = gate_gradients(call, kept, grad_y)
        backward_of = _triton_many.backward if call.A.shape[-1] > 1 else _backward
        grads = backward_of(call, states.contiguous(), grad_sum.contiguous(), grad_last_state, config)
        return (*grads, grad_z, grad_addend)

    return run(config_for("backward", call, run))


def _backward(
    call: ScanCall, states: Tensor, grad_y: Tensor, grad_last_state: Tensor | None, config: Config
) -> Gradients:
    inputs = kernel_inputs(call)
    plan = plan_for("backward", call, inputs, config, states, grad_y, grad_last_state)
    x, meta = inputs.x, plan.meta
    batch, height, width, dim = x.shape
    n_routes, rank = len(call.routes), meta["RANK"]
    blocks, lane_programs = plan.grid
    low_rank = call.dt_weight is not None

    table = x if call.table is None else call.table.contiguous()
    grad_x = torch.empty_like(x)
    partial = grad_x if len(plan.groups) == 1 or x.dtype == torch.float32 else scratch(x, *x.shape)
    grad_dt, grad_B, grad_C = (x.new_empty(value.shape) for value in (call.dt, call.B, call.C))
    # One partial sum a channel block. bfloat16 where the sum has no more bits in the end: half the bytes.
    rows_dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    rows = x.new_empty((blocks, batch * height * width * n_routes, meta["ROW"]), dtype=rows_dtype)
    params = scratch(x, lane_programs, n_routes, dim, 3)
    weights = scratch(x, lane_programs, n_routes, dim, meta["BR"]) if low_rank else params
    grad_A, grad_D, grad_bias = torch.empty_like(inputs.A), torch.empty_like(inputs.D), torch.empty_like(inputs.bias)
    grad_weight = torch.empty_like(inputs.weight)
    grad_initial = None if call.initial_state is None else scratch(x, *call.initial_state.shape)
    keep = grad_initial is not None
    between = _between(x, plan, n_routes)
    state_tiles = scratch(x, plan.groups_at_once, batch, plan.tiles, dim)
    given = by_channel(grad_last_state)
    has_given = given is not None
    given = states if given is None else given
    entries = given
    shared = (grad_y, x, inputs.dt, inputs.rows, inputs.weight, inputs.bias, inputs.A)
    initial = states if grad_initial is None else grad_initial

    with torch.cuda.device_of(x):
        for batch_number, groups in enumerate(plan.batches):
            is_forward, is_reversed = groups[0].directions
            directions = {"FORWARD": is_forward, "REVERSED": is_reversed, "KEEP_INITIAL": keep}
            first = plan.groups.index(groups[0])
            plan.launch(
                f"states {batch_number}",
                selective_scan_bwd_kernel_states,
                (*plan.grid, len(groups)),
                (
                    *shared, table, states, given, state_tiles, *between, initial,
                    *plan.sizes, pack_routes(groups), batch,
                ),
                {**meta, **directions, "ENTRY": has_given and not plan.two_level},
            )  # fmt: skip
            if plan.two_level:
                entries = chain(
                    plan.launch, inputs.A, between.ends, between.totals, given if has_given else None, grad_initial,
                    dim, plan.routes("forward"),
                )  # fmt: skip
            for i, group in enumerate(groups):
                number = first + i
                plan.launch(
                    f"gradients {number}",
                    selective_scan_bwd_kernel,
                    (*plan.grid, 1),
                    (
                        *shared, inputs.D, table, states, entries, state_tiles[i],
                        *_of_group(between, i), partial, grad_x, grad_dt, rows, weights,
                        params, initial, *plan.sizes, pack_routes([group]), batch,
                        int(number > 0), int(number == len(plan.groups) - 1),
                    ),
                    {
                        **meta, **directions, "ENTRY": plan.two_level or has_given,
                        "DOT": dot_dtype(x),
                    },
                )  # fmt: skip
        plan.launch(
            "rows",
            selective_scan_bwd_kernel_rows,
            (triton.cdiv(rows.shape[1], 32), 1, 1),
            (rows, grad_dt, grad_B, grad_C, rows.shape[1], blocks),
            {
                "RANK": rank,
                "ROW": meta["ROW"],
                "BT": 32,
                "BW": triton.next_power_of_2(meta["ROW"]),
                "num_warps": 4,
            },
        )
        sum_parameters(plan.launch, params, weights, (grad_A, grad_D, grad_bias, grad_weight), meta)
    return (
        grad_x,
        grad_dt,
        grad_A,
        grad_B,
        grad_C,
        None if call.D is None else grad_D,
        grad_weight if low_rank else None,
        None if call.dt_bias is None else grad_bias,
        grad_initial,
    )

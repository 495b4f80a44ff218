"""Selective scan with several states in Triton: forward and backward.

Design. Tiles, lanes and segments are those of triton_impl.py, but each program walks one route from its own start: with
several states the work is in the exponentials, and reading x for one more route costs nothing. A tile's states are
computed one after the other from the same steps.

B and C of a state are needed for all channels, one number a step. ``turn`` writes them down in the order of each
route's steps, so that a thread loads what it needs for a tile with one instruction; their gradients come back the same
way. Each route leaves a sum of its own in float32, and the last kernel adds the routes in a fixed order.

The backward pass goes from chunk to chunk: it computes the states that enter a chunk's tiles again, from the saved
state that enters the chunk, and then walks these tiles from the last one. What waits between tiles does so in memory
that mostly stays in the caches; it is loaded one state ahead.

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
from subquad.ops.selective_scan._triton_many_backward import (
    selective_scan_many_bwd_kernel,
    selective_scan_turn_back_kernel,
)
from subquad.ops.selective_scan._triton_many_forward import (
    selective_scan_kernel_sum,
    selective_scan_many_fwd_kernel,
    selective_scan_many_kernel_ends,
    selective_scan_turn_kernel,
)
from subquad.ops.selective_scan._triton_plan import (
    LANES,
    Config,
    Inputs,
    alignment,
    by_channel,
    chain,
    common_meta,
    division,
    dot_dtype,
    extent,
    kernel_inputs,
    next_stages,
    plan_key,
    rank_of,
    scratch,
    strides_of,
    sum_parameters,
)
from subquad.ops.selective_scan.call import CHUNK, Gradients, ScanCall
from subquad.ops.selective_scan.routes import COLUMN, REVERSED, TABLE


class Plan(NamedTuple):
    """What all calls of one shape class share."""

    segments: int
    padded: int
    grid: tuple[int, int, int]
    lanes: tuple[int, ...]  # n_lanes to stride_dt_k of the kernels' arguments
    rows: tuple[int, ...]  # strides of packed rows
    path: tuple[int, ...]  # height to reversed_routes
    meta: dict[str, Any]
    launch: _triton.Launcher

    @property
    def two_level(self) -> bool:
        return self.segments > 1


_plans: _triton.Plans[Plan] = _triton.Plans()


def _plan_for(
    which: str,
    call: ScanCall,
    inputs: Inputs,
    config: Config,
    *more: Tensor | None,
    on_new: Callable[[], None] | None = None,
) -> Plan:
    key = plan_key(which, call, inputs, config, *more)
    return _plans.get(key, call.x, lambda: _make_plan(call, inputs, config), on_new)


def _make_plan(call: ScanCall, inputs: Inputs, config: Config) -> Plan:
    batch, height, width, dim = call.x.shape
    state, n_routes, rank = call.A.shape[-1], len(call.routes), rank_of(call)
    length = height * width
    chunks = triton.cdiv(length, CHUNK)
    blocks = triton.cdiv(dim, config.block)
    programs = blocks * n_routes * triton.cdiv(batch, LANES)  # if each image is one segment
    wanted = config.waves * _triton.multiprocessor_count(call.x.device)
    segment_chunks = chunks
    if programs < wanted / 2:  # below, a pass more costs less than multiprocessors that wait
        lanes_wanted = wanted * LANES / (blocks * n_routes)
        segment_chunks = max(1, min(chunks, round(chunks * batch / lanes_wanted)))
    segments = triton.cdiv(chunks, segment_chunks)
    padded = segments * segment_chunks * CHUNK
    lanes = batch * segments
    row = 8 * triton.cdiv(rank, 8)  # of partial gradients, written 16 bytes wide
    largest = max(
        batch * padded * n_routes * max(2 * state, dim if rank == 0 else blocks * row),
        batch * n_routes * (chunks + 1) * dim * state,
        *map(extent, inputs.tensors),
    )
    align = alignment(inputs.rows), alignment(inputs.dt)
    codes = [code & ~TABLE for code in call.routes]
    meta = common_meta(call, config, lanes, padded, largest) | {
        "N": state,
        "BR": max(16, triton.next_power_of_2(rank)),
        "ROW": row,
        "ALIGN": align[1],
        "TWO_LEVEL": segments > 1,
        "DOT": dot_dtype(call.x),
    }
    turn = {"BT": CHUNK, "BN": triton.next_power_of_2(2 * state), "ALIGN": align[0], "EVEN": padded == length}
    return Plan(
        segments=segments,
        padded=padded,
        grid=(blocks, triton.cdiv(lanes, LANES), n_routes),
        lanes=(
            lanes, length, padded, segments, segment_chunks * CHUNK // config.steps, dim,
            *(stride // align[1] for stride in strides_of(inputs.dt)),
        ),
        rows=tuple(stride // align[0] for stride in strides_of(inputs.rows)),
        path=(
            height, width, *division(height), n_routes,
            sum(1 << k for k, code in enumerate(codes) if code & COLUMN),
            sum(1 << k for k, code in enumerate(codes) if code & REVERSED),
        ),
        meta=meta | {"turn": meta | turn | {"num_warps": 4}},
        launch=_triton.Launcher(),
    )  # fmt: skip


def _sum(plan: Plan, name: str, parts: Tensor, result: Tensor) -> None:
    """Add up ``parts``, one for each route, unless there is only one and it is the result."""
    if parts is result:
        return
    plan.launch(
        name,
        selective_scan_kernel_sum,
        (triton.cdiv(result.numel(), 1024), 1, 1),
        (parts, result, result.numel()),
        {"PARTS": parts.shape[0], "BLOCK": 1024, "num_warps": 4},
    )


def _turn(plan: Plan, inputs: Inputs, table: Tensor) -> Tensor:
    """B and C (B, K, tiles, 2 N, STEPS) in the order of each route's steps."""
    turn, (batch, length) = plan.meta["turn"], (inputs.x.shape[0], plan.lanes[1])
    turned = inputs.rows.new_empty((batch, plan.grid[2], 2 * turn["N"], plan.padded))
    plan.launch(
        "turn",
        selective_scan_turn_kernel,
        (batch * plan.grid[2] * plan.padded // turn["BT"], 1, 1),
        (inputs.rows, table, turned, length, plan.padded, *plan.rows, *plan.path),
        turn,
    )
    return turned


def _ends(
    plan: Plan, inputs: Inputs, values: Tensor, turned: Tensor, table: Tensor, adjoint: bool
) -> tuple[Tensor, Tensor]:
    """What leaves the segments that nothing enters (B, K, segments, N, E), and the sums of their steps."""
    x = inputs.x
    batch, dim, n_routes, state = x.shape[0], x.shape[-1], plan.grid[2], plan.meta["N"]
    ends = scratch(x, batch, n_routes, plan.segments, state, dim)
    totals = scratch(x, batch, n_routes, plan.segments, dim)
    plan.launch(
        "ends",
        selective_scan_many_kernel_ends,
        plan.grid,
        (
            values, inputs.dt, turned, inputs.weight, inputs.bias, inputs.A, table, ends, totals,
            *plan.lanes, *plan.path,
        ),
        {**plan.meta, "ADJOINT": adjoint},
    )  # fmt: skip
    return ends, totals


def _compile_ahead(call: ScanCall, config: Config, backward_config: Config) -> None:
    """Compile all kernels of a call that is about to run for the first time, those of next stages and of gradients."""
    meta, device = _triton.on_meta(call), call.x.device
    with _compile.compiling_ahead(device) as started:
        y, states = forward(meta, config, backward_config)
    with _compile.compiling_ahead(device, Turn.NEXT):
        for stage in next_stages(meta) if started else ():  # else this is a stage that was foreseen
            forward(stage, config, backward_config)
    if call.x.requires_grad:
        with _compile.compiling_ahead(device, Turn.GRADIENTS):
            backward(meta, states, y, None, backward_config)


def forward(call: ScanCall, config: Config, backward_config: Config) -> tuple[Tensor, Tensor]:
    """Merged output and saved states of a canonical call (see call.py)."""
    inputs = kernel_inputs(call)
    plan = _plan_for("forward", call, inputs, config, on_new=lambda: _compile_ahead(call, config, backward_config))
    x, n_routes, state = inputs.x, plan.grid[2], plan.meta["N"]
    batch, height, width, dim = x.shape
    slots = triton.cdiv(height * width, CHUNK) + 1
    table = x if call.table is None else call.table.contiguous()
    y = torch.empty_like(x, dtype=call.out_dtype)
    parts = y if n_routes == 1 else scratch(x, n_routes, *x.shape)
    states = scratch(x, batch, n_routes, slots, dim, state)
    given = by_channel(call.initial_state)
    entries = given
    with torch.cuda.device_of(x):
        turned = _turn(plan, inputs, table)
        if plan.two_level:
            ends, totals = _ends(plan, inputs, x, turned, table, adjoint=False)
            entries = chain(plan.launch, inputs.A, ends, totals, given, states[0, 0, -1], states.stride(1), 0)
        plan.launch(
            "output",
            selective_scan_many_fwd_kernel,
            plan.grid,
            (
                x, inputs.dt, turned, inputs.weight, inputs.bias, inputs.A, inputs.D, table,
                states if entries is None else entries, states, parts,
                *plan.lanes, *plan.path, slots, batch,
            ),
            {**plan.meta, "ENTRY": entries is not None},
        )  # fmt: skip
        _sum(plan, "sum", parts, y)
    return y, states


def backward(
    call: ScanCall, states: Tensor, grad_y: Tensor, grad_last_state: Tensor | None, config: Config
) -> Gradients:
    """Gradients of a canonical call from its saved states, each in its input's dtype."""
    inputs = kernel_inputs(call)
    plan = _plan_for("backward", call, inputs, config, states, grad_y, grad_last_state)
    x, (blocks, lane_programs, n_routes), meta = inputs.x, plan.grid, plan.meta
    batch, height, width, dim = x.shape
    state, rank, low_rank = meta["N"], meta["RANK"], meta["LOW_RANK"]
    table = x if call.table is None else call.table.contiguous()
    grad_x, grad_dt, grad_B, grad_C = (x.new_empty(value.shape) for value in (x, call.dt, call.B, call.C))
    parts = grad_x if n_routes == 1 else scratch(x, n_routes, *x.shape)
    # One partial sum a channel block. bfloat16 where the sum has no more bits in the end: half the bytes.
    narrow = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    turned_grads = x.new_empty((blocks, batch, n_routes, 2 * state, plan.padded), dtype=narrow)
    rows = x.new_empty((blocks, batch, height, width, n_routes, meta["ROW"]), dtype=narrow)
    params = scratch(x, lane_programs, n_routes, dim, state + 2)
    weights = scratch(x, lane_programs, n_routes, dim, meta["BR"]) if low_rank else params
    grad_A, grad_D, grad_bias = torch.empty_like(inputs.A), torch.empty_like(inputs.D), torch.empty_like(inputs.bias)
    grad_weight = torch.empty_like(inputs.weight)
    grad_initial = None if call.initial_state is None else scratch(x, *call.initial_state.shape)
    waiting = scratch(x, blocks * lane_programs * n_routes, CHUNK // meta["STEPS"] + 2, state, LANES, meta["BC"])
    given = by_channel(grad_last_state)
    entries = given
    with torch.cuda.device_of(x):
        turned = _turn(plan, inputs, table)
        if plan.two_level:
            ends, totals = _ends(plan, inputs, grad_y, turned, table, adjoint=True)
            every = (1 << n_routes) - 1
            entries = chain(plan.launch, inputs.A, ends, totals, given, grad_initial, dim * state, every)
        plan.launch(
            "gradients",
            selective_scan_many_bwd_kernel,
            plan.grid,
            (
                grad_y, x, inputs.dt, turned, inputs.weight, inputs.bias, inputs.A, inputs.D, table, states,
                states if entries is None else entries, parts, grad_dt, rows, turned_grads, weights, params,
                states if grad_initial is None else grad_initial, waiting,
                *plan.lanes, *plan.path, states.shape[2], batch,
            ),
            {**meta, "ENTRY": entries is not None, "KEEP_INITIAL": grad_initial is not None},
        )  # fmt: skip
        _sum(plan, "sum", parts, grad_x)
        plan.launch(
            "turn back",
            selective_scan_turn_back_kernel,
            (batch * n_routes * plan.padded // CHUNK, 1, 1),
            (
                turned_grads, table, grad_B, grad_C, height * width, plan.padded, *plan.path, batch, blocks,
            ),
            {**meta["turn"], "BN": triton.next_power_of_2(state)},
        )  # fmt: skip
        sum_parameters(plan.launch, params, weights, (grad_A, grad_D, grad_bias, grad_weight), meta)
    if low_rank:
        grad_dt = rows.sum(0, dtype=torch.float32)[..., :rank].to(x.dtype)
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

"""Selective scan in Triton: forward and backward.

Design. A *chunk* is CHUNK consecutive pixels of a route's path, a *segment* a run of chunks that one lane walks one
after another, a *lane* one segment of one image. A program is one warp: it walks CH = 8 lanes side by side over BC
channels, 4 steps at a time. The [4 * CH, BC] tile of a step has the layout of the tensor core product that expands the
step sizes, with row = time * CH + lane: a thread holds all 4 steps of its lane, so splitting the tile by time moves
nothing and the recurrence is plain sequential arithmetic on registers. Low-rank steps, B and C of a pixel and route are
one packed row, read once; its columns of B and C reach all channels by products with unit vectors. One state stays in
registers from tile to tile; several wait in a scratch buffer.

Routes that visit the same pixels in opposite directions ("row" and "row_reversed") form a *group*: one launch walks
both. With one segment an image (enough images and channels to fill the GPU) a scan is one launch a group. Otherwise it
has two levels: every segment is scanned from a zero state (aggregate), ``chain`` carries states from segment to
segment, and the second walk starts from the right states. The backward pass is the same with adjoint states; inside a
chunk it recomputes the states from the one saved at the chunk's entry.

Limits: made for N <= 16; groups of channels and index tables run in PyTorch.
Bytes, floors and measurements: tools/benchmarks/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.ops import _triton
from subquad.ops.selective_scan._triton_backward import selective_scan_bwd_kernel, selective_scan_bwd_kernel_aggregate
from subquad.ops.selective_scan._triton_forward import selective_scan_chain_kernel, selective_scan_fwd_kernel
from subquad.ops.selective_scan.call import CHUNK, Gradients, ScanCall
from subquad.ops.selective_scan.routes import COLUMN, REVERSED

_LANES = 8
_STEPS = 4
_ZERO, _SAVED, _GIVEN = 0, 1, 2  # where the state that enters a segment comes from


class _Config(NamedTuple):
    """Launch choices of a pass for a shape class.

    Attributes:
        block: channels of a program.
        waves: programs wanted for each multiprocessor; a scan with fewer is cut into segments.
    """

    block: int
    waves: int


_CONFIGS = {
    ("forward", "one state"): _Config(block=32, waves=48),
    ("forward", "many states"): _Config(block=16, waves=24),
    ("backward", "one state"): _Config(block=16, waves=48),
    ("backward", "many states"): _Config(block=16, waves=24),
}
"""The one table of launch heuristics; ``SUBQUAD_AUTOTUNE=1`` searches ``_CANDIDATES`` instead."""

_CANDIDATES = [_Config(block, waves) for block in (16, 32) for waves in (12, 24, 48)]


def _config(which: str, call: ScanCall, run: Callable[[_Config], object]) -> _Config:
    default = _CONFIGS[which, "one state" if call.A.shape[-1] == 1 else "many states"]
    rank = 0 if call.dt_weight is None else call.dt.shape[-1]
    key = ("selective_scan", which, *call.x.shape, len(call.routes), call.A.shape[-1], rank, call.x.dtype)
    return _triton.tuned(key, call.x, _CANDIDATES, default, run)


class _Group(NamedTuple):
    """Routes that visit the same pixels in opposite directions; -1 for an absent one."""

    forward: int
    reversed: int
    column: int


def _groups(codes: list[int]) -> list[_Group]:
    """Pair each route with a later one that walks the same path the other way round."""
    groups: list[_Group] = []
    for k, code in enumerate(codes):
        column, field = code & COLUMN, "reversed" if code & REVERSED else "forward"
        for i, group in enumerate(groups):
            if group.column == column and getattr(group, field) < 0:
                groups[i] = group._replace(**{field: k})
                break
        else:
            groups.append(_Group(-1, -1, column)._replace(**{field: k}))
    return groups


def _pixels(call: ScanCall, groups: list[_Group]) -> dict[_Group, Tensor]:
    """Row-major pixels along each group's path, walked forwards, int32 (L,).

    Made anew for each call, in its stream: a table kept from a graph capture would be unfilled outside of the graph.
    """
    height, width = call.x.shape[1:3]
    rows = torch.arange(height * width, dtype=torch.int32, device=call.x.device)
    columns = rows.view(height, width).t().contiguous() if any(group.column for group in groups) else rows
    return {group: columns if group.column else rows for group in groups}


class _Plan(NamedTuple):
    """Sizes of one call's launches and the arguments that all kernels share."""

    groups: list[_Group]
    pixels: dict[_Group, Tensor]
    config: _Config
    length: int
    chunks: int
    segments: int
    segment_chunks: int
    lanes: int
    rank: int
    strides: tuple[int, ...]  # of dt, then of the packed rows in units of their alignment
    meta: dict[str, object]

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.segments, self.segment_chunks, self.chunks

    @property
    def lane_programs(self) -> int:
        return triton.cdiv(self.lanes, _LANES)


def _plan(call: ScanCall, inputs: _Inputs, config: _Config) -> _Plan:
    batch, height, width, dim = call.x.shape
    state = call.A.shape[-1]
    length = height * width
    chunks = triton.cdiv(length, CHUNK)
    blocks = triton.cdiv(dim, config.block)
    programs = triton.cdiv(batch, _LANES) * blocks
    wanted = config.waves * _triton.multiprocessor_count(call.x.device)
    segment_chunks = max(1, min(chunks, chunks * programs // wanted))
    segments = triton.cdiv(chunks, segment_chunks)
    rank = call.dt.shape[-1] if call.dt_weight is not None else 0
    n_routes = len(call.routes)
    # Offsets into x, dt or its gradients for each of up to all channel blocks, and the states.
    row = max(call.dt.shape[-1], blocks * (rank + 2 * state))
    largest = max(
        batch * length * dim,
        batch * length * n_routes * row,
        batch * n_routes * (chunks + 1) * dim * state,
        inputs.dt.extent,
        inputs.rows.extent,
    )
    align = _alignment(inputs.rows)
    strides = (*inputs.dt.strides, *(stride // align for stride in inputs.rows.strides))
    meta = {
        "N": state,
        "CH": _LANES,
        "BR": max(16, triton.next_power_of_2(rank + 2 if state == 1 else rank)),
        "NP": max(16, triton.next_power_of_2(state)),
        "RANK": rank,
        "WIDTH": rank + 2 if state == 1 else rank,
        "ALIGN": align,
        "TILES": CHUNK // _STEPS,
        "LOW_RANK": call.dt_weight is not None,
        "SOFTPLUS": call.dt_softplus,
        "PRECISION": "ieee" if call.x.dtype == torch.float32 else "tf32",
        "INDEX": tl.int64 if largest >= 2**31 else tl.int32,
        "num_warps": 1,
    }
    groups = _groups(call.routes)
    return _Plan(
        groups=groups,
        pixels=_pixels(call, groups),
        config=config,
        length=length,
        chunks=chunks,
        segments=segments,
        segment_chunks=segment_chunks,
        lanes=batch * segments,
        rank=rank,
        strides=strides,
        meta=meta,
    )


class _Rows(NamedTuple):
    """A tensor (B, H, W, K, ...) as rows: strides of an image, a pixel and a route, innermost axis contiguous."""

    tensor: Tensor
    strides: tuple[int, int, int]

    @property
    def extent(self) -> int:
        """One past the largest offset; more than the number of elements for a strided view."""
        return 1 + sum((size - 1) * step for size, step in zip(self.tensor.shape, self.tensor.stride(), strict=True))


def _rows(tensor: Tensor) -> _Rows:
    if tensor.stride(-1) != 1 or (tensor.shape[1] > 1 and tensor.stride(1) != tensor.shape[2] * tensor.stride(2)):
        tensor = tensor.contiguous()
    pixel = tensor.stride(2) if tensor.shape[2] > 1 else tensor.stride(1)
    return _Rows(tensor, (tensor.stride(0), pixel, tensor.stride(3)))


def _packed_rows(call: ScanCall) -> _Rows:
    """dt (if low-rank), B and C of a pixel and route as one row.

    The three views of one projection are such rows already; anything else is copied together.
    """
    parts = [call.B.squeeze(-2), call.C.squeeze(-2)]
    if call.dt_weight is not None:
        parts.insert(0, call.dt)
    first = parts[0]
    end = first.storage_offset()
    for part in parts:
        if (
            part.stride(-1) != 1
            or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or part.storage_offset() != end
            or part.stride() != first.stride()
        ):
            return _rows(torch.cat(parts, dim=-1))
        end += part.shape[-1]
    width = sum(part.shape[-1] for part in parts)
    return _rows(first.as_strided((*first.shape[:-1], width), first.stride()))


def _alignment(rows: _Rows) -> int:
    """Elements (1, 2, 4 or 8) that every row's address is a multiple of, for wide loads."""
    align = 8
    while rows.tensor.data_ptr() % (align * rows.tensor.element_size()) or any(step % align for step in rows.strides):
        align //= 2
    return align


class _Inputs(NamedTuple):
    """Inputs as the kernels take them: contiguous maps and parameters, zeros for absent vectors."""

    x: Tensor
    dt: _Rows
    rows: _Rows
    A: Tensor
    D: Tensor
    weight: Tensor
    bias: Tensor


def _inputs(call: ScanCall) -> _Inputs:
    A = call.A.contiguous()
    zeros = A.new_zeros(A.shape[:2]) if call.D is None or call.dt_bias is None else A
    rows = _packed_rows(call)
    return _Inputs(
        x=call.x.contiguous(),
        dt=rows if call.dt_weight is not None else _rows(call.dt),
        rows=rows,
        A=A,
        D=zeros if call.D is None else call.D.contiguous(),
        weight=A if call.dt_weight is None else call.dt_weight.contiguous(),
        bias=zeros if call.dt_bias is None else call.dt_bias.contiguous(),
    )


def _chain(
    plan: _Plan, A: Tensor, sums: Tensor, ends: Tensor, given: Tensor | None, entries: Tensor, mask: int, by_chunk: bool
) -> None:
    """Fill ``entries`` with the states that enter the segments, by chunk or by segment."""
    batch, n_routes, segments, dim, state = ends.shape
    block = 32
    selective_scan_chain_kernel[(batch * n_routes, triton.cdiv(dim * state, block))](
        sums, A, ends, ends if given is None else given.contiguous(), entries,
        segments, plan.segment_chunks if by_chunk else 1, plan.chunks if by_chunk else segments, entries.shape[2],
        dim, n_routes, mask,
        N=state, BS=32, BJ=block, GIVEN=given is not None, num_warps=1,
    )  # fmt: skip


def forward(call: ScanCall) -> tuple[Tensor, Tensor]:
    """Merged output and saved states of a canonical call (see call.py)."""
    return _forward(call, _config("forward", call, lambda config: _forward(call, config)))


def _forward(call: ScanCall, config: _Config) -> tuple[Tensor, Tensor]:
    inputs = _inputs(call)
    plan = _plan(call, inputs, config)
    batch, dim = call.x.shape[0], call.x.shape[-1]
    n_routes, state = len(call.routes), call.A.shape[-1]
    x = inputs.x
    block = plan.config.block
    programs = (triton.cdiv(dim, block), plan.lane_programs)
    two_level = plan.segments > 1

    partial = _scratch(x, *x.shape)
    y = partial if call.out_dtype == torch.float32 else torch.empty_like(x, dtype=call.out_dtype)
    states = _scratch(x, batch, n_routes, plan.chunks + 1, dim, state)
    waiting = _scratch(x, programs[0] * programs[1], state, _LANES, block) if state > 1 else states
    ends, sums = states, states
    if two_level:
        ends, sums = (
            _scratch(x, batch, n_routes, plan.segments, dim, state),
            _scratch(x, batch, n_routes, plan.segments, dim),
        )
    given = states if call.initial_state is None else call.initial_state.contiguous()
    entry = _SAVED if two_level else _ZERO if call.initial_state is None else _GIVEN

    def launch(group: _Group, entry: int, aggregate: bool) -> None:
        selective_scan_fwd_kernel[programs](
            x, inputs.dt.tensor, inputs.rows.tensor, inputs.weight, inputs.bias, inputs.A, inputs.D,
            given, states, ends, sums, partial, y, waiting, plan.pixels[group],
            plan.lanes, plan.length, *plan.sizes, states.shape[2], dim, *plan.strides,
            n_routes, group.forward, group.reversed, int(group is not plan.groups[0]),
            ENTRY=entry, AGGREGATE=aggregate, OUTPUT=not aggregate and _writes(group, plan, y), BC=block, **plan.meta,
        )  # fmt: skip

    with torch.cuda.device_of(x):
        if two_level:
            for group in plan.groups:
                launch(group, _ZERO, aggregate=True)
            _chain(plan, inputs.A, sums, ends, call.initial_state, states, _reversed_mask(call), by_chunk=True)
        for group in plan.groups:
            launch(group, entry, aggregate=False)
    return _finish(y, partial, plan), states


def backward(call: ScanCall, states: Tensor, grad_y: Tensor, grad_last_state: Tensor | None) -> Gradients:
    """Gradients of a canonical call from its saved states, each in its input's dtype."""

    def run(config: _Config) -> Gradients:
        return _backward(call, states, grad_y, grad_last_state, config)

    return run(_config("backward", call, run))


def _backward(
    call: ScanCall, states: Tensor, grad_y: Tensor, grad_last_state: Tensor | None, config: _Config
) -> Gradients:
    inputs = _inputs(call)
    plan = _plan(call, inputs, config)
    batch, height, width, dim = call.x.shape
    n_routes, state = len(call.routes), call.A.shape[-1]
    x, grad_y = inputs.x, grad_y.contiguous()
    block = plan.config.block
    blocks = triton.cdiv(dim, block)
    wanted = max(1, plan.config.waves // 2 * _triton.multiprocessor_count(x.device) // plan.lane_programs)
    blocks_each = triton.cdiv(blocks, min(blocks, wanted))
    channel_programs = triton.cdiv(blocks, blocks_each)
    low_rank = call.dt_weight is not None
    row_width = plan.rank + 2 * state

    partial = _scratch(x, *x.shape)
    grad_x = partial if x.dtype == torch.float32 else torch.empty_like(x)
    grad_dt = x if low_rank else torch.empty(call.dt.shape, dtype=x.dtype, device=x.device)
    rows = _scratch(x, channel_programs, batch, height, width, n_routes, row_width)
    params = _scratch(x, plan.lane_programs, n_routes, dim, plan.rank + state + 2)
    grad_initial = None if call.initial_state is None else _scratch(x, *call.initial_state.shape)
    slots = (CHUNK // _STEPS + 2) * state
    waiting = _scratch(x, plan.lane_programs * channel_programs, slots, _LANES, block)
    entering = grad_last_state
    shared = (inputs.dt.tensor, inputs.rows.tensor, inputs.weight, inputs.bias, inputs.A)

    with torch.cuda.device_of(x):
        if plan.segments > 1:
            ends, sums = (
                _scratch(x, batch, n_routes, plan.segments, dim, state),
                _scratch(x, batch, n_routes, plan.segments, dim),
            )
            states_waiting = _scratch(x, plan.lane_programs * blocks, state, _LANES, block) if state > 1 else ends
            for group in plan.groups:
                selective_scan_bwd_kernel_aggregate[(blocks, plan.lane_programs)](
                    grad_y, *shared, ends, sums, states_waiting, plan.pixels[group],
                    plan.lanes, plan.length, plan.segments, plan.segment_chunks,
                    dim, *plan.strides, n_routes, group.forward, group.reversed, BC=block, **plan.meta,
                )  # fmt: skip
            mask = ~_reversed_mask(call) & ((1 << n_routes) - 1)
            entering = torch.empty_like(ends)
            _chain(plan, inputs.A, sums, ends, grad_last_state, entering, mask, by_chunk=False)
        for group in plan.groups:
            selective_scan_bwd_kernel[(channel_programs, plan.lane_programs)](
                grad_y, x, *shared, inputs.D, states, states if entering is None else entering,
                waiting, partial, grad_x, grad_dt, rows, params, params if grad_initial is None else grad_initial,
                plan.pixels[group],
                plan.lanes, plan.length, *plan.sizes, states.shape[2], dim, *plan.strides,
                n_routes, group.forward, group.reversed, int(group is not plan.groups[0]), blocks_each, batch,
                ENTRY=_ZERO if entering is None else _SAVED, KEEP_INITIAL=grad_initial is not None,
                OUTPUT=_writes(group, plan, grad_x), DOT=_dot_dtype(x), BC=block, **plan.meta,
            )  # fmt: skip
    row = rows.sum(0) if channel_programs > 1 else rows[0]
    grad_low, grad_B, grad_C = row.split([plan.rank, state, state], dim=-1)
    grad_weight, grad_A, grad_D, grad_bias = params.sum(0).split([plan.rank, state, 1, 1], dim=-1)
    return (
        _finish(grad_x, partial, plan),
        grad_low.to(x.dtype, copy=True) if low_rank else grad_dt,
        grad_A.contiguous(),
        grad_B.unsqueeze(-2).to(x.dtype, copy=True),
        grad_C.unsqueeze(-2).to(x.dtype, copy=True),
        None if call.D is None else grad_D.squeeze(-1).clone(),
        grad_weight.contiguous() if low_rank else None,
        None if call.dt_bias is None else grad_bias.squeeze(-1).clone(),
        grad_initial,
    )


def _scratch(x: Tensor, *shape: int) -> Tensor:
    """Unfilled float32 memory beside x."""
    return x.new_empty(shape, dtype=torch.float32)


def _writes(group: _Group, plan: _Plan, output: Tensor) -> bool:
    """Whether a launch writes the 16-bit output itself: the second walk of the last group does."""
    return output.dtype != torch.float32 and group is plan.groups[-1] and group.reversed >= 0


def _finish(output: Tensor, partial: Tensor, plan: _Plan) -> Tensor:
    """The output; converted here from the fp32 sum where no kernel wrote it."""
    if output.dtype == torch.float32 or _writes(plan.groups[-1], plan, output):
        return output
    return partial.to(output.dtype)


def _reversed_mask(call: ScanCall) -> int:
    return sum(1 << k for k, code in enumerate(call.routes) if code & REVERSED)


def _dot_dtype(x: Tensor) -> tl.dtype:
    """Operands of the gradient products: bfloat16 holds any gradient's range; the interpreter cannot multiply it."""
    return tl.float32 if x.dtype == torch.float32 or _triton.interpreting() else tl.bfloat16

"""Selective scan in Triton: forward and backward.

Design. A *tile* is 8 consecutive steps of a path, a *segment* a run of tiles that one lane walks, a *lane* one segment
of one image. A program is one warp: it walks 4 lanes side by side over BC channels. The [BC, 32] tile of a step has the
layout of the tensor core product that expands the step sizes, with column = (step // 2, lane, step % 2): a thread holds
all 8 steps of its lane and adjacent channels, so the recurrence is plain sequential arithmetic on registers. Low-rank
steps, B and C of a pixel and route are one packed row, read once; B and C reach all channels by one product with unit
vectors.

Routes that visit the same pixels in opposite directions ("row" and "row_reversed") form a *group*. Its pixels are read
once for both: the output pass walks a segment from its start, keeps the forward route's state on chip and takes the
reversed route's state at each tile from a pass before it, which walked from the end and computed nothing but states.
With one segment an image (enough images and channels to fill the GPU) that is all; otherwise every segment of that
first pass starts from zero, ``chain`` carries states from segment to segment, and a tile's state is corrected by the
decay since the segment's end: exp(A * sum of steps) * entering state. The backward pass is the same with adjoint
states: the first pass walks from the start, the gradient pass from the end.

Limits: made for N <= 16; groups of channels run in PyTorch.
Bytes, floors and measurements: tools/benchmarks/NOTES.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.ops import _triton
from subquad.ops.selective_scan._triton_backward import selective_scan_bwd_kernel, selective_scan_bwd_kernel_states
from subquad.ops.selective_scan._triton_forward import (
    selective_scan_chain_kernel,
    selective_scan_fwd_kernel,
    selective_scan_fwd_kernel_states,
)
from subquad.ops.selective_scan.call import CHUNK, Gradients, ScanCall
from subquad.ops.selective_scan.routes import COLUMN, REVERSED, TABLE

_LANES = 4
_STEPS = 8
_TILES = CHUNK // _STEPS


class _Config(NamedTuple):
    """Launch choices of a pass for a shape class.

    Attributes:
        block: channels of a program, 16 or 32.
        waves: programs wanted for each multiprocessor; a scan with fewer is cut into segments.
        stages: tiles whose rows are on their way at once.
    """

    block: int
    waves: int
    stages: int


_CONFIGS = {
    ("forward", "one state"): _Config(block=16, waves=16, stages=3),
    ("forward", "many states"): _Config(block=16, waves=16, stages=1),
    ("backward", "one state"): _Config(block=16, waves=16, stages=1),
    ("backward", "many states"): _Config(block=16, waves=16, stages=1),
}
"""The one table of launch heuristics; ``SUBQUAD_AUTOTUNE=1`` searches ``_CANDIDATES`` instead."""

_CANDIDATES = [_Config(block, waves, stages) for block in (16, 32) for waves in (8, 16, 32) for stages in (1, 3)]


def _config(which: str, call: ScanCall, run: Callable[[_Config], object]) -> _Config:
    default = _CONFIGS[which, "one state" if call.A.shape[-1] == 1 else "many states"]
    rank = 0 if call.dt_weight is None else call.dt.shape[-1]
    key = ("selective_scan", which, *call.x.shape, len(call.routes), call.A.shape[-1], rank, call.x.dtype)
    return _triton.tuned(key, call.x, _CANDIDATES, default, run)


class _Group(NamedTuple):
    """Routes that visit the same pixels in opposite directions; -1 for an absent one."""

    forward: int
    reversed: int
    code: int

    @property
    def directions(self) -> tuple[bool, bool]:
        return self.forward >= 0, self.reversed >= 0


def _groups(codes: list[int]) -> list[_Group]:
    """Pair each route with a later one that walks the same path the other way round; tables stay alone."""
    groups: list[_Group] = []
    for k, code in enumerate(codes):
        path, field = code & ~REVERSED, "reversed" if code & REVERSED else "forward"
        for i, group in enumerate(groups):
            if code != TABLE and group.code == path and getattr(group, field) < 0:
                groups[i] = group._replace(**{field: k})
                break
        else:
            groups.append(_Group(-1, -1, path)._replace(**{field: k}))
    return groups


def _paths(call: ScanCall, groups: list[_Group]) -> Tensor:
    """Row-major pixels along each group's path, walked forwards, int32 (groups, L).

    Made anew for each call, in its stream: a table kept from a graph capture would be unfilled outside of the graph.
    """
    height, width = call.x.shape[1:3]
    rows = torch.arange(height * width, dtype=torch.int32, device=call.x.device)
    paths = []
    for group in groups:
        if group.code == TABLE:
            assert call.table is not None
            paths.append(call.table[group.forward])
        else:
            paths.append(rows.view(height, width).t().reshape(-1) if group.code & COLUMN else rows)
    return torch.stack(paths)


class _Plan(NamedTuple):
    """Sizes of one call's launches and the arguments that all kernels share."""

    groups: list[_Group]
    paths: Tensor
    block: int
    segments: int
    segment_tiles: int
    lanes: int
    sizes: tuple[int, ...]  # n_lanes to n_routes of every kernel's arguments
    meta: dict[str, object]

    @property
    def lane_programs(self) -> int:
        return triton.cdiv(self.lanes, _LANES)

    @property
    def two_level(self) -> bool:
        return self.segments > 1

    @property
    def tiles(self) -> int:
        return self.segments * self.segment_tiles

    def batches(self) -> Iterator[list[_Group]]:
        """Groups whose states are computed in one launch: two with the same directions, or one with several states."""
        size = 2 if self.meta["N"] == 1 else 1
        for _, same in itertools.groupby(self.groups, key=lambda group: group.directions):
            members = list(same)
            yield from (members[start : start + size] for start in range(0, len(members), size))


def _pack_routes(groups: list[_Group]) -> int:
    """Route numbers in 7 bits each, as the kernels read them."""
    numbers = [max(k, 0) for group in groups for k in (group.forward, group.reversed)]
    return sum(k << (7 * i) for i, k in enumerate(numbers))


def _plan(call: ScanCall, inputs: _Inputs, config: _Config) -> _Plan:
    batch, height, width, dim = call.x.shape
    state = call.A.shape[-1]
    length = height * width
    chunks = triton.cdiv(length, CHUNK)
    blocks = triton.cdiv(dim, config.block)
    wanted = config.waves * _triton.multiprocessor_count(call.x.device)
    segment_chunks = max(1, min(chunks, round(chunks * blocks * triton.cdiv(batch, _LANES) / wanted)))
    segments = triton.cdiv(chunks, segment_chunks)
    segment_tiles = segment_chunks * _TILES
    lanes = batch * segments
    rank = call.dt.shape[-1] if call.dt_weight is not None else 0
    n_routes = len(call.routes)
    groups = _groups(call.routes)
    # Offsets into x, dt or its gradients for each of up to all channel blocks, and the states.
    largest = max(
        batch * length * dim,
        batch * length * n_routes * max(call.dt.shape[-1], blocks * (rank + 2 * state)),
        batch * n_routes * (chunks + 1) * dim * state,
        2 * batch * segments * segment_tiles * dim * state,
        inputs.dt.extent,
        inputs.rows.extent,
    )
    align = _alignment(inputs.rows)
    strides = (*inputs.dt.strides, *(stride // align for stride in inputs.rows.strides))
    meta = {
        "N": state,
        "BC": config.block,
        "BR": max(16, triton.next_power_of_2(rank + 2 if state == 1 else rank)),
        "BN": max(16, triton.next_power_of_2(2 * state)),
        "RANK": rank,
        "ALIGN": align,
        "TWO_LEVEL": segments > 1,
        "LOW_RANK": call.dt_weight is not None,
        "SOFTPLUS": call.dt_softplus,
        "EVEN": lanes % _LANES == 0 and segments * segment_tiles * _STEPS == length,
        "EVEN_C": dim % config.block == 0,
        "EXACT": call.x.dtype == torch.float32,
        "PRECISION": "ieee" if call.x.dtype == torch.float32 else "tf32",
        "INDEX": tl.int64 if largest >= 2**31 else tl.int32,
        "num_warps": 1,
        "num_stages": config.stages,
    }
    return _Plan(
        groups=groups,
        paths=_paths(call, groups),
        block=config.block,
        segments=segments,
        segment_tiles=segment_tiles,
        lanes=lanes,
        sizes=(lanes, length, segments, segment_tiles, chunks + 1, dim, *strides, n_routes),
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
    plan: _Plan,
    A: Tensor,
    totals: Tensor,
    ends: Tensor,
    given: Tensor | None,
    last: Tensor | None,
    stride: int,
    against: Callable[[_Group], int],
) -> Tensor:
    """States that enter the segments (B, K, segments, N, E), of routes walked from the last segment: ``against``."""
    batch, n_routes, segments, state, dim = ends.shape
    entries = torch.empty_like(ends)
    block = 32
    mask = sum(1 << against(group) for group in plan.groups if against(group) >= 0)
    selective_scan_chain_kernel[(batch * n_routes, triton.cdiv(dim * state, block))](
        totals, A, ends, ends if given is None else given, entries, ends if last is None else last,
        segments, stride, dim, n_routes, mask,
        N=state, BS=32, BJ=block, GIVEN=given is not None, LAST=last is not None, num_warps=1,
    )  # fmt: skip
    return entries


def _by_channel(states: Tensor | None) -> Tensor | None:
    """(B, K, E, N) -> (B, K, N, E), as the kernels exchange states."""
    return None if states is None else states.transpose(-1, -2).contiguous()


class _Between(NamedTuple):
    """What the passes of a call hand to each other, in float32; not there when nothing is handed."""

    tiles: Tensor  # (groups, B, tiles, N, E): state that enters each tile
    sums: Tensor  # (groups, B, tiles, E): steps since the segment's start of the walk
    ends: Tensor  # (B, K, segments, N, E): state that leaves each segment when it starts from zero
    totals: Tensor  # (B, K, segments, E): sum of a segment's steps


def _between(x: Tensor, plan: _Plan, n_routes: int) -> _Between:
    batch, dim, state = x.shape[0], x.shape[-1], int(plan.meta["N"])  # type: ignore[call-overload]
    groups = max(len(groups) for groups in plan.batches())
    tiles = _scratch(x, groups, batch, plan.tiles, state, dim)
    if not plan.two_level:
        return _Between(tiles, tiles, tiles, tiles)
    return _Between(
        tiles,
        _scratch(x, groups, batch, plan.tiles, dim),
        _scratch(x, batch, n_routes, plan.segments, state, dim),
        _scratch(x, batch, n_routes, plan.segments, dim),
    )


def _waiting(x: Tensor, plan: _Plan, programs: int, kinds: int) -> Tensor:
    """Memory for N > 1 states of each program's lanes, or anything where they stay in registers."""
    state = int(plan.meta["N"])  # type: ignore[call-overload]
    return _scratch(x, programs, kinds, state, _LANES, plan.block) if state > 1 else x


def forward(call: ScanCall) -> tuple[Tensor, Tensor]:
    """Merged output and saved states of a canonical call (see call.py)."""
    return _forward(call, _config("forward", call, lambda config: _forward(call, config)))


def _forward(call: ScanCall, config: _Config) -> tuple[Tensor, Tensor]:
    inputs = _inputs(call)
    plan = _plan(call, inputs, config)
    x = inputs.x
    batch, length, dim, n_routes, state = (
        x.shape[0],
        plan.paths.shape[1],
        x.shape[-1],
        len(call.routes),
        call.A.shape[-1],
    )
    grid = (triton.cdiv(dim, plan.block), plan.lane_programs)

    y = torch.empty_like(x, dtype=call.out_dtype)
    partial = y if len(plan.groups) == 1 or y.dtype == torch.float32 else _scratch(x, *x.shape)
    states = _scratch(x, batch, n_routes, triton.cdiv(length, CHUNK) + 1, dim, state)
    between = _between(x, plan, n_routes)
    waiting = _waiting(x, plan, 2 * grid[0] * grid[1], 2)
    given = _by_channel(call.initial_state)
    entries, add = states if given is None else given, False
    shared = (x, inputs.dt.tensor, inputs.rows.tensor, inputs.weight, inputs.bias, inputs.A)

    with torch.cuda.device_of(x):
        for groups in plan.batches():
            is_forward, is_reversed = groups[0].directions
            first = plan.groups.index(groups[0])
            if is_reversed or plan.two_level:
                selective_scan_fwd_kernel_states[(*grid, len(groups))](
                    *shared, plan.paths[first], states if given is None else given, *between, states, waiting,
                    *plan.sizes, _pack_routes(groups), batch,
                    FORWARD=is_forward, REVERSED=is_reversed, ENTRY=given is not None and not plan.two_level,
                    **plan.meta,
                )  # fmt: skip
            if plan.two_level:
                stride = states.stride(1)
                entries = _chain(
                    plan, inputs.A, between.totals, between.ends, given, states[0, 0, -1], stride, lambda g: g.reversed
                )
            for i, group in enumerate(groups):
                selective_scan_fwd_kernel[grid](
                    *shared, inputs.D, plan.paths[first + i], entries, between.tiles[i], between.sums[i], states,
                    partial, y if group is plan.groups[-1] else partial, waiting, *plan.sizes, _pack_routes([group]),
                    FORWARD=is_forward, REVERSED=is_reversed, ENTRY=plan.two_level or given is not None, ADD=add,
                    **plan.meta,
                )  # fmt: skip
                add = True
    return y, states


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
    blocks = triton.cdiv(dim, plan.block)
    wanted = max(1, config.waves // 2 * _triton.multiprocessor_count(x.device) // plan.lane_programs)
    blocks_each = triton.cdiv(blocks, min(blocks, wanted))
    grid = (triton.cdiv(blocks, blocks_each), plan.lane_programs)
    low_rank = call.dt_weight is not None
    rank = call.dt.shape[-1] if low_rank else 0

    grad_x = torch.empty_like(x)
    partial = grad_x if len(plan.groups) == 1 or x.dtype == torch.float32 else _scratch(x, *x.shape)
    grad_dt = x if low_rank else torch.empty(call.dt.shape, dtype=x.dtype, device=x.device)
    rows = _scratch(x, grid[0], batch, height, width, n_routes, rank + 2 * state)
    params = _scratch(x, plan.lane_programs, n_routes, dim, rank + state + 2)
    grad_initial = None if call.initial_state is None else _scratch(x, *call.initial_state.shape)
    between = _between(x, plan, n_routes)
    state_tiles = torch.empty_like(between.tiles)
    waiting = _waiting(x, plan, 2 * blocks * grid[1], 4)
    given = _by_channel(grad_last_state)
    entries, add = states if given is None else given, False
    shared = (grad_y, x, inputs.dt.tensor, inputs.rows.tensor, inputs.weight, inputs.bias, inputs.A)
    initial = states if grad_initial is None else grad_initial

    with torch.cuda.device_of(x):
        for groups in plan.batches():
            is_forward, is_reversed = groups[0].directions
            first = plan.groups.index(groups[0])
            selective_scan_bwd_kernel_states[(blocks, grid[1], len(groups))](
                *shared, plan.paths[first], states, states if given is None else given, state_tiles, *between, initial,
                waiting, *plan.sizes, _pack_routes(groups), batch,
                FORWARD=is_forward, REVERSED=is_reversed, ENTRY=given is not None and not plan.two_level,
                KEEP_INITIAL=grad_initial is not None, **plan.meta,
            )  # fmt: skip
            if plan.two_level:
                entries = _chain(
                    plan, inputs.A, between.totals, between.ends, given, grad_initial, dim * state, lambda g: g.forward
                )
            for i, group in enumerate(groups):
                selective_scan_bwd_kernel[grid](
                    *shared, inputs.D, plan.paths[first + i], states, entries, state_tiles[i], between.tiles[i],
                    between.sums[i], partial, grad_x if group is plan.groups[-1] else partial, grad_dt, rows, params,
                    initial, waiting, *plan.sizes, _pack_routes([group]), blocks_each, batch,
                    FORWARD=is_forward, REVERSED=is_reversed, ENTRY=plan.two_level or given is not None, ADD=add,
                    KEEP_INITIAL=grad_initial is not None, DOT=_dot_dtype(x), **plan.meta,
                )  # fmt: skip
                add = True
    row = rows.sum(0) if grid[0] > 1 else rows[0]
    grad_low, grad_B, grad_C = row.split([rank, state, state], dim=-1)
    grad_weight, grad_A, grad_D, grad_bias = params.sum(0).split([rank, state, 1, 1], dim=-1)
    return (
        grad_x,
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


def _dot_dtype(x: Tensor) -> tl.dtype:
    """Operands of the gradient products: bfloat16 holds any gradient's range; the interpreter cannot multiply it."""
    return tl.float32 if x.dtype == torch.float32 or _triton.interpreting() else tl.bfloat16

"""Selective scan in Triton: forward and backward.

Design. A *tile* is 8 (backward: 4) consecutive steps of a path, a *segment* a run of tiles that one lane walks, a *lane* one segment
of one image. A program is one warp: it walks 4 lanes side by side over BC channels. The [BC, 32] tile has the
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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.ops import _triton
from subquad.ops.selective_scan._triton_backward import (
    selective_scan_bwd_kernel,
    selective_scan_bwd_kernel_rows,
    selective_scan_bwd_kernel_states,
)
from subquad.ops.selective_scan._triton_forward import (
    selective_scan_chain_kernel,
    selective_scan_fwd_kernel,
    selective_scan_fwd_kernel_states,
)
from subquad.ops.selective_scan.call import CHUNK, Gradients, ScanCall
from subquad.ops.selective_scan.routes import COLUMN, REVERSED, TABLE

_MOST_PLANS = 256
_LANES = 4


class _Config(NamedTuple):
    """Launch choices of a pass for a shape class.

    Attributes:
        block: channels of a program, 16 or 32.
        steps: steps of a tile, 4 or 8.
        waves: programs wanted for each multiprocessor; a scan with fewer is cut into segments.
        stages: tiles whose rows are on their way at once.
    """

    block: int
    steps: int
    waves: int
    stages: int


_CONFIGS = {
    ("forward", "one state"): _Config(block=16, steps=8, waves=64, stages=3),
    ("forward", "one state, long rows"): _Config(block=16, steps=8, waves=64, stages=3),
    ("forward", "many states"): _Config(block=16, steps=8, waves=16, stages=1),
    ("backward", "one state"): _Config(block=16, steps=8, waves=64, stages=1),
    ("backward", "one state, long rows"): _Config(block=16, steps=4, waves=64, stages=1),
    ("backward", "many states"): _Config(block=16, steps=4, waves=16, stages=1),
}
"""The one table of launch heuristics; ``SUBQUAD_AUTOTUNE=1`` searches ``_CANDIDATES`` instead."""

_CANDIDATES = [
    _Config(block, steps, waves, stages)
    for block in (16, 32)
    for steps in (4, 8)
    for waves in (16, 32, 64)
    for stages in (1, 3)
]


def _config(which: str, call: ScanCall, run: Callable[[_Config], object]) -> _Config:
    rank = 0 if call.dt_weight is None else call.dt.shape[-1]
    if call.A.shape[-1] > 1:
        kind = "many states"
    else:
        kind = "one state" if rank + 2 <= 16 else "one state, long rows"
    default = _CONFIGS[which, kind]
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
    """What all calls of one shape class share."""

    groups: list[_Group]
    batches: list[list[_Group]]
    paths: Tensor
    block: int
    segments: int
    tiles: int
    grid: tuple[int, int]
    packed: bool
    sizes: tuple[int, ...]  # n_lanes to n_routes of every kernel's arguments
    meta: dict[str, Any]
    launch: _triton.Launcher

    @property
    def two_level(self) -> bool:
        return self.segments > 1


_plans: dict[object, _Plan] = {}


def _plan(which: str, call: ScanCall, inputs: _Inputs, config: _Config, *more: Tensor | None) -> _Plan:
    """The plan of a call's shape class: made once, with all that the kernels are compiled for."""
    key = (
        which, config, call.x.device, tuple(call.routes), call.dt_softplus, call.out_dtype, inputs.packed,
        *map(_triton.facts, (*inputs.tensors, call.initial_state, *more)),
    )  # fmt: skip
    if call.table is not None:
        return _make_plan(call, inputs, config)
    plan = _plans.get(key)
    if plan is None:
        plan = _make_plan(call, inputs, config)
        # A table of pixels that a graph capture fills is not filled outside of the graph.
        if not (call.x.is_cuda and torch.cuda.is_current_stream_capturing()):
            if len(_plans) >= _MOST_PLANS:
                _plans.clear()
            if call.x.is_cuda:
                torch.cuda.current_stream(call.x.device).synchronize()  # other streams may read the table from now on
            _plans[key] = plan
    return plan


def _make_plan(call: ScanCall, inputs: _Inputs, config: _Config) -> _Plan:
    batch, height, width, dim = call.x.shape
    state, n_routes = call.A.shape[-1], len(call.routes)
    length = height * width
    chunks = triton.cdiv(length, CHUNK)
    blocks = triton.cdiv(dim, config.block)
    wanted = config.waves * _triton.multiprocessor_count(call.x.device)
    segment_chunks = max(1, min(chunks, round(chunks * blocks * triton.cdiv(batch, _LANES) / wanted)))
    segments = triton.cdiv(chunks, segment_chunks)
    segment_tiles = segment_chunks * CHUNK // config.steps
    lanes = batch * segments
    lane_programs = triton.cdiv(lanes, _LANES)
    rank = call.dt.shape[-1] if call.dt_weight is not None else 0
    # Offsets into x, dt or its gradients for each of up to all channel blocks, and the states.
    largest = max(
        batch * length * dim,
        batch * length * n_routes * max(call.dt.shape[-1], blocks * (rank + 2 * state)),
        batch * n_routes * (chunks + 1) * dim * state,
        2 * batch * segments * segment_tiles * dim * state,
        *map(_extent, inputs.tensors),
    )
    align = _alignment(inputs)
    meta = {
        "N": state,
        "BC": config.block,
        "BR": max(16, triton.next_power_of_2(rank + 2 if state == 1 else rank)),
        "BN": max(16, triton.next_power_of_2(2 * state)),
        "RANK": rank,
        "ALIGN": align,
        "STEPS": config.steps,
        "CHUNK": CHUNK,
        "TWO_LEVEL": segments > 1,
        "LOW_RANK": call.dt_weight is not None,
        "SOFTPLUS": call.dt_softplus,
        "EVEN": lanes % _LANES == 0 and segments * segment_chunks * CHUNK == length,
        "EVEN_C": dim % config.block == 0,
        "EXACT": call.x.dtype == torch.float32,
        "PRECISION": "ieee" if call.x.dtype == torch.float32 else "tf32",
        "INDEX": tl.int64 if largest >= 2**31 else tl.int32,
        "num_warps": 1,
        "num_stages": config.stages,
    }
    groups = _groups(call.routes)
    row_strides = (stride // align for stride in _strides(inputs.rows))
    return _Plan(
        groups=groups,
        batches=_batches(groups, 2 if state == 1 else 1),
        paths=_paths(call, groups),
        block=config.block,
        segments=segments,
        tiles=segments * segment_tiles,
        grid=(blocks, lane_programs),
        packed=inputs.packed,
        sizes=(
            lanes,
            length,
            segments,
            segment_tiles,
            chunks + 1,
            dim,
            *_strides(inputs.dt),
            *row_strides,
            n_routes,
        ),
        meta=meta,
        launch=_triton.Launcher(),
    )


def _batches(groups: list[_Group], size: int) -> list[list[_Group]]:
    """Groups whose states are computed in one launch: up to ``size`` with the same directions."""
    batches = []
    for _, same in itertools.groupby(groups, key=lambda group: group.directions):
        members = list(same)
        batches += [members[start : start + size] for start in range(0, len(members), size)]
    return batches


def _pack_routes(groups: list[_Group]) -> int:
    """Route numbers in 7 bits each, as the kernels read them."""
    numbers = [max(k, 0) for group in groups for k in (group.forward, group.reversed)]
    return sum(k << (7 * i) for i, k in enumerate(numbers))


class _Inputs(NamedTuple):
    """Inputs as the kernels take them: contiguous maps and parameters, zeros for absent vectors.

    ``rows`` holds dt (if low-rank), B and C of a pixel and route as one row; with ``packed`` it is a copy.
    """

    x: Tensor
    dt: Tensor
    rows: Tensor
    A: Tensor
    D: Tensor
    weight: Tensor
    bias: Tensor
    packed: bool

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.x, self.dt, self.rows, self.A, self.D, self.weight, self.bias


def _inputs(call: ScanCall) -> _Inputs:
    A = call.A.contiguous()
    zeros = A.new_zeros(A.shape[:2]) if call.D is None or call.dt_bias is None else A
    parts = (call.B, call.C) if call.dt_weight is None else (call.dt, call.B, call.C)
    rows, packed = parts[0], not _are_rows(parts)
    if packed:
        rows = torch.cat([part.flatten(4) for part in parts], dim=-1)
    return _Inputs(
        x=call.x.contiguous(),
        dt=rows if call.dt_weight is not None else _with_rows(call.dt),
        rows=rows,
        A=A,
        D=zeros if call.D is None else call.D.contiguous(),
        weight=A if call.dt_weight is None else call.dt_weight.contiguous(),
        bias=zeros if call.dt_bias is None else call.dt_bias.contiguous(),
        packed=packed,
    )


def _are_rows(parts: Sequence[Tensor]) -> bool:
    """Whether (B, H, W, K, ...) tensors are neighbouring columns of one tensor: the views of one projection."""
    first = parts[0]
    end = first.data_ptr()
    for part in parts:
        if part.stride(-1) != 1 or part.data_ptr() != end or part.stride()[:4] != first.stride()[:4]:
            return False
        end += part[0, 0, 0, 0].numel() * part.element_size()
    return end - first.data_ptr() <= first.stride(3) * first.element_size() and _with_rows(first) is first


def _with_rows(tensor: Tensor) -> Tensor:
    """``tensor`` (B, H, W, K, ...), copied if a pixel's number does not lead to its address by one stride."""
    if tensor.stride(-1) != 1 or (tensor.shape[1] > 1 and tensor.stride(1) != tensor.shape[2] * tensor.stride(2)):
        return tensor.contiguous()
    return tensor


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """Strides of an image, a pixel and a route of (B, H, W, K, ...)."""
    return tensor.stride(0), tensor.stride(2) if tensor.shape[2] > 1 else tensor.stride(1), tensor.stride(3)


def _extent(tensor: Tensor) -> int:
    """One past the largest offset; more than the number of elements for a strided view."""
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _alignment(inputs: _Inputs) -> int:
    """Elements (1, 2, 4 or 8) that every row's address is a multiple of, for wide loads."""
    rows, align = inputs.rows, 8
    while rows.data_ptr() % (align * rows.element_size()) or any(stride % align for stride in _strides(rows)):
        align //= 2
    return align


def _chain(
    plan: _Plan, A: Tensor, between: _Between, given: Tensor | None, last: Tensor | None, stride: int, against: str
) -> Tensor:
    """States that enter the segments (B, K, segments, N, E).

    Args:
        given: states (B, K, N, E) that enter the first segments.
        last: where the states that leave the last segments go, [E, N] at every ``stride`` numbers.
        against: "forward" or "reversed": which routes of the groups are walked from the last segment.
    """
    ends = between.ends
    batch, n_routes, segments, state, dim = ends.shape
    entries = torch.empty_like(ends)
    block = 32
    walked = [getattr(group, against) for group in plan.groups]
    plan.launch(
        "chain",
        selective_scan_chain_kernel,
        (batch * n_routes, triton.cdiv(dim * state, block), 1),
        (
            between.totals, A, ends, ends if given is None else given, entries, ends if last is None else last,
            segments, stride, dim, n_routes, sum(1 << k for k in walked if k >= 0),
        ),
        {"N": state, "BS": 32, "BJ": block, "GIVEN": given is not None, "LAST": last is not None, "num_warps": 1},
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


def _between(x: Tensor, plan: _Plan, n_routes: int, state: int) -> _Between:
    batch, dim = x.shape[0], x.shape[-1]
    groups = len(plan.batches[0])
    tiles = _scratch(x, groups, batch, plan.tiles, state, dim)
    if not plan.two_level:
        return _Between(tiles, tiles, tiles, tiles)
    return _Between(
        tiles,
        _scratch(x, groups, batch, plan.tiles, dim),
        _scratch(x, batch, n_routes, plan.segments, state, dim),
        _scratch(x, batch, n_routes, plan.segments, dim),
    )


def forward(call: ScanCall) -> tuple[Tensor, Tensor]:
    """Merged output and saved states of a canonical call (see call.py)."""
    return _forward(call, _config("forward", call, lambda config: _forward(call, config)))


def _forward(call: ScanCall, config: _Config) -> tuple[Tensor, Tensor]:
    inputs = _inputs(call)
    plan = _plan("forward", call, inputs, config)
    x, meta = inputs.x, plan.meta
    batch, dim, n_routes, state = x.shape[0], x.shape[-1], len(call.routes), meta["N"]

    y = torch.empty_like(x, dtype=call.out_dtype)
    partial = y if len(plan.groups) == 1 or y.dtype == torch.float32 else _scratch(x, *x.shape)
    states = _scratch(x, batch, n_routes, plan.sizes[4], dim, state)
    between = _between(x, plan, n_routes, state)
    waiting = _scratch(x, 4 * plan.grid[0] * plan.grid[1], state, _LANES, plan.block) if state > 1 else x
    given = _by_channel(call.initial_state)
    has_given = given is not None
    given = states if given is None else given
    entries, before = given, None
    shared = (x, inputs.dt, inputs.rows, inputs.weight, inputs.bias, inputs.A)

    with torch.cuda.device_of(x):
        for number, groups in enumerate(plan.batches):
            is_forward, is_reversed = groups[0].directions
            directions = {"FORWARD": is_forward, "REVERSED": is_reversed}
            first = plan.groups.index(groups[0])
            if is_reversed or plan.two_level:
                plan.launch(
                    f"states {number}",
                    selective_scan_fwd_kernel_states,
                    (*plan.grid, len(groups)),
                    (
                        *shared, plan.paths[first], given, *between, states, waiting,
                        *plan.sizes, _pack_routes(groups), batch,
                    ),
                    {**meta, **directions, "ENTRY": has_given and not plan.two_level},
                )  # fmt: skip
            if plan.two_level:
                last = states[0, 0, -1]
                entries = _chain(
                    plan, inputs.A, between, given if has_given else None, last, states.stride(1), "reversed"
                )
            for i, group in enumerate(groups):
                target = y if group is plan.groups[-1] else partial
                plan.launch(
                    f"output {first + i}",
                    selective_scan_fwd_kernel,
                    (*plan.grid, 1),
                    (
                        *shared, inputs.D, plan.paths[first + i], entries, between.tiles[i], between.sums[i], states,
                        target if before is None else before, target, waiting, *plan.sizes, _pack_routes([group]),
                    ),
                    {**meta, **directions, "ENTRY": plan.two_level or has_given, "ADD": before is not None},
                )  # fmt: skip
                before = target
    return y, states


def backward(call: ScanCall, states: Tensor, grad_y: Tensor, grad_last_state: Tensor | None) -> Gradients:
    """Gradients of a canonical call from its saved states, each in its input's dtype."""

    def run(config: _Config) -> Gradients:
        return _backward(call, states.contiguous(), grad_y.contiguous(), grad_last_state, config)

    return run(_config("backward", call, run))


def _backward(
    call: ScanCall, states: Tensor, grad_y: Tensor, grad_last_state: Tensor | None, config: _Config
) -> Gradients:
    inputs = _inputs(call)
    plan = _plan("backward", call, inputs, config, states, grad_y, grad_last_state)
    x, meta = inputs.x, plan.meta
    batch, height, width, dim = x.shape
    n_routes, state, rank = len(call.routes), meta["N"], meta["RANK"]
    blocks, lane_programs = plan.grid
    low_rank = call.dt_weight is not None

    grad_x = torch.empty_like(x)
    partial = grad_x if len(plan.groups) == 1 or x.dtype == torch.float32 else _scratch(x, *x.shape)
    grad_dt, grad_B, grad_C = (x.new_empty(value.shape) for value in (call.dt, call.B, call.C))
    row = 8 * triton.cdiv(rank + 2 * state, 8)  # rows that can be written 16 bytes wide
    # One partial sum a channel block. bfloat16 where the sum becomes 16 bits wide anyway: half the bytes.
    rows_dtype = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    rows = x.new_empty((blocks, batch * height * width * n_routes, row), dtype=rows_dtype)
    params = _scratch(x, lane_programs, n_routes, dim, state + 2)
    weights = _scratch(x, lane_programs, n_routes, dim, meta["BR"]) if low_rank else x
    grad_initial = None if call.initial_state is None else _scratch(x, *call.initial_state.shape)
    keep = grad_initial is not None
    between = _between(x, plan, n_routes, state)
    state_tiles = torch.empty_like(between.tiles)
    waiting = _scratch(x, 6 * blocks * lane_programs, state, _LANES, plan.block) if state > 1 else x
    given = _by_channel(grad_last_state)
    has_given = given is not None
    given = states if given is None else given
    entries, before = given, None
    shared = (grad_y, x, inputs.dt, inputs.rows, inputs.weight, inputs.bias, inputs.A)
    initial = states if grad_initial is None else grad_initial

    with torch.cuda.device_of(x):
        for number, groups in enumerate(plan.batches):
            is_forward, is_reversed = groups[0].directions
            directions = {"FORWARD": is_forward, "REVERSED": is_reversed, "KEEP_INITIAL": keep}
            first = plan.groups.index(groups[0])
            plan.launch(
                f"states {number}",
                selective_scan_bwd_kernel_states,
                (*plan.grid, len(groups)),
                (
                    *shared, plan.paths[first], states, given, state_tiles, *between, initial, waiting,
                    *plan.sizes, _pack_routes(groups), batch,
                ),
                {**meta, **directions, "ENTRY": has_given and not plan.two_level},
            )  # fmt: skip
            if plan.two_level:
                entries = _chain(
                    plan, inputs.A, between, given if has_given else None, grad_initial, dim * state, "forward"
                )
            for i, group in enumerate(groups):
                target = grad_x if group is plan.groups[-1] else partial
                plan.launch(
                    f"gradients {first + i}",
                    selective_scan_bwd_kernel,
                    (*plan.grid, 1),
                    (
                        *shared, inputs.D, plan.paths[first + i], states, entries, state_tiles[i], between.tiles[i],
                        between.sums[i], target if before is None else before, target, grad_dt, rows, weights, params,
                        initial, waiting, *plan.sizes, _pack_routes([group]), batch,
                    ),
                    {
                        **meta, **directions, "ENTRY": plan.two_level or has_given, "ADD": before is not None,
                        "DOT": _dot_dtype(x), "ROW": row,
                    },
                )  # fmt: skip
                before = target
        plan.launch(
            "rows",
            selective_scan_bwd_kernel_rows,
            (triton.cdiv(rows.shape[1], 32), 1, 1),
            (rows, grad_dt, grad_B, grad_C, rows.shape[1], blocks),
            {"N": state, "RANK": rank, "ROW": row, "BT": 32, "BW": triton.next_power_of_2(row), "num_warps": 4},
        )
    grad_A, grad_D, grad_bias = params.sum(0).split([state, 1, 1], dim=-1)
    return (
        grad_x,
        grad_dt,
        grad_A.contiguous(),
        grad_B,
        grad_C,
        None if call.D is None else grad_D.squeeze(-1).clone(),
        weights.sum(0)[..., :rank].contiguous() if low_rank else None,
        None if call.dt_bias is None else grad_bias.squeeze(-1).clone(),
        grad_initial,
    )


def _scratch(x: Tensor, *shape: int) -> Tensor:
    """Unfilled float32 memory beside x."""
    return x.new_empty(shape, dtype=torch.float32)


def _dot_dtype(x: Tensor) -> tl.dtype:
    """Operands of the gradient products: bfloat16 holds any gradient's range; the interpreter cannot multiply it."""
    return tl.float32 if x.dtype == torch.float32 or _triton.interpreting() else tl.bfloat16

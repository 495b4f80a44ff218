"""How a scan is laid out for the Triton kernels: groups of routes, segments, launch choices, and inputs as read.

See triton_impl.py for the design.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.ops import _triton
from subquad.ops.selective_scan._triton_chain import selective_scan_chain_kernel
from subquad.ops.selective_scan._triton_sums import selective_scan_bwd_kernel_parameters
from subquad.ops.selective_scan.call import CHUNK, ScanCall
from subquad.ops.selective_scan.routes import COLUMN, REVERSED, TABLE

LANES = 4


class Config(NamedTuple):
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
    ("forward", "one state"): Config(block=16, steps=8, waves=64, stages=3),
    ("forward", "one state, long rows"): Config(block=16, steps=8, waves=64, stages=3),
    ("forward", "several states"): Config(block=16, steps=8, waves=8, stages=1),
    ("backward", "one state"): Config(block=16, steps=8, waves=64, stages=1),
    ("backward", "one state, long rows"): Config(block=16, steps=4, waves=64, stages=1),
    ("backward", "several states"): Config(block=16, steps=8, waves=8, stages=1),
}
"""The one table of launch heuristics; ``SUBQUAD_AUTOTUNE=1`` searches ``_CANDIDATES`` instead."""

_CANDIDATES = [
    Config(block, steps, waves, stages)
    for block in (16, 32)
    for steps in (4, 8)
    for waves in (16, 32, 64)
    for stages in (1, 3)
]


def rank_of(call: ScanCall) -> int:
    """R of low-rank steps, 0 for full-rank ones."""
    return 0 if call.dt_weight is None else call.dt.shape[-1]


def default_config(which: str, call: ScanCall) -> Config:
    """The table's launch choices for the ``"forward"`` or ``"backward"`` pass of a call."""
    if call.A.shape[-1] > 1:
        return _CONFIGS[which, "several states"]
    return _CONFIGS[which, "one state" if rank_of(call) + 2 <= 16 else "one state, long rows"]


def config_for(which: str, call: ScanCall, run: Callable[[Config], object]) -> Config:
    """The same, or with ``SUBQUAD_AUTOTUNE=1`` what was fastest when ``run`` did the pass with each candidate."""
    key = ("selective_scan", which, *call.x.shape, len(call.routes), call.A.shape[-1], rank_of(call), call.x.dtype)
    return _triton.tuned(key, call.x, _CANDIDATES, default_config(which, call), run)


class Group(NamedTuple):
    """Routes that visit the same pixels in opposite directions; -1 for an absent one."""

    forward: int
    reversed: int
    code: int

    @property
    def directions(self) -> tuple[bool, bool]:
        return self.forward >= 0, self.reversed >= 0


def _groups(codes: list[int]) -> list[Group]:
    """Pair each route with a later one that walks the same path the other way round; tables stay alone."""
    groups: list[Group] = []
    for k, code in enumerate(codes):
        path, field = code & ~REVERSED, "reversed" if code & REVERSED else "forward"
        for i, group in enumerate(groups):
            if code != TABLE and group.code == path and getattr(group, field) < 0:
                groups[i] = group._replace(**{field: k})
                break
        else:
            groups.append(Group(-1, -1, path)._replace(**{field: k}))
    return groups


def division(divisor: int) -> tuple[int, int]:
    """(m, s) with t // divisor == (t * m) >> s for 0 <= t < 2**30, and m < 2**31 (Granlund and Montgomery, 1994)."""
    shift = 30 + (divisor - 1).bit_length()
    return -(-(1 << shift) // divisor), shift


class Plan(NamedTuple):
    """What all calls of one shape class share."""

    groups: list[Group]
    batches: list[list[Group]]
    block: int
    segments: int
    tiles: int
    grid: tuple[int, int]
    sizes: tuple[int, ...]  # n_lanes to n_routes of every kernel's arguments
    meta: dict[str, Any]
    launch: _triton.Launcher

    @property
    def two_level(self) -> bool:
        return self.segments > 1

    @property
    def groups_at_once(self) -> int:
        return max(map(len, self.batches))

    def routes(self, direction: str) -> int:
        """Bit mask of the groups' "forward" or "reversed" routes."""
        return sum(1 << k for k in (getattr(group, direction) for group in self.groups) if k >= 0)


_plans: _triton.Plans[Plan] = _triton.Plans()


def plan_for(
    which: str,
    call: ScanCall,
    inputs: Inputs,
    config: Config,
    *more: Tensor | None,
    on_new: Callable[[], None] | None = None,
) -> Plan:
    """The plan of a call's shape class: all that the kernels are compiled for.

    Args:
        which: "forward" or "backward".
        more: tensors besides ``inputs`` that the kernels see.
        on_new: see ``Plans.get``.
    """
    key = plan_key(which, call, inputs, config, *more)
    return _plans.get(key, call.x, lambda: _make_plan(call, inputs, config), on_new)


def plan_key(which: str, call: ScanCall, inputs: Inputs, config: Config, *more: Tensor | None) -> object:
    """All that tells shape classes apart."""
    return (
        which, config, tuple(call.routes), call.dt_softplus, call.out_dtype,
        *map(_triton.facts, (*inputs.tensors, call.initial_state, call.table, *more)),
    )  # fmt: skip


def common_meta(call: ScanCall, config: Config, lanes: int, padded: int, largest: int) -> dict[str, Any]:
    """What every kernel is compiled for.

    Args:
        lanes: images times segments.
        padded: steps of the segments of an image.
        largest: bound of the offsets.
    """
    single = call.x.dtype == torch.float32
    return {
        "BC": config.block,
        "RANK": rank_of(call),
        "STEPS": config.steps,
        "CHUNK": CHUNK,
        "LOW_RANK": call.dt_weight is not None,
        "SOFTPLUS": call.dt_softplus,
        "EVEN": lanes % LANES == 0 and padded == call.x.shape[1] * call.x.shape[2],
        "EVEN_C": call.x.shape[-1] % config.block == 0,
        "EXACT": single,
        "PRECISION": "ieee" if single else "tf32",
        "INDEX": tl.int64 if largest >= 2**31 else tl.int32,
        "TABLE": call.table is not None,
        "num_warps": 1,
        "num_stages": config.stages,
    }


def _make_plan(call: ScanCall, inputs: Inputs, config: Config) -> Plan:
    batch, height, width, dim = call.x.shape
    n_routes = len(call.routes)
    length = height * width
    chunks = triton.cdiv(length, CHUNK)
    blocks = triton.cdiv(dim, config.block)
    wanted = config.waves * _triton.multiprocessor_count(call.x.device)
    segment_chunks = max(1, min(chunks, round(chunks * blocks * triton.cdiv(batch, LANES) / wanted)))
    segments = triton.cdiv(chunks, segment_chunks)
    segment_tiles = segment_chunks * CHUNK // config.steps
    lanes = batch * segments
    lane_programs = triton.cdiv(lanes, LANES)
    rank = rank_of(call)
    row = 8 * triton.cdiv(rank + 2, 8)  # packed gradients, in rows that can be written 16 bytes wide
    # Offsets into x, dt, packed rows of gradients for each channel block, and states.
    largest = max(
        batch * length * dim,
        batch * length * n_routes * max(call.dt.shape[-1], blocks * row),
        batch * n_routes * (chunks + 1) * dim,
        2 * batch * segments * segment_tiles * dim,
        *map(extent, inputs.tensors),
    )
    align = alignment(inputs.rows)
    meta = common_meta(call, config, lanes, segments * segment_chunks * CHUNK, largest) | {
        "BR": max(16, triton.next_power_of_2(rank + 2)),
        "ROW": row,
        "ALIGN": align,
        "TWO_LEVEL": segments > 1,
    }
    groups = _groups(call.routes)
    row_strides = (stride // align for stride in strides_of(inputs.rows))
    return Plan(
        groups=groups,
        batches=_batches(groups),
        block=config.block,
        segments=segments,
        tiles=segments * segment_tiles,
        grid=(blocks, lane_programs),
        sizes=(
            lanes,
            length,
            segments,
            segment_tiles,
            chunks + 1,
            dim,
            *strides_of(inputs.dt),
            *row_strides,
            height,
            width,
            *division(height),
            n_routes,
        ),
        meta=meta,
        launch=_triton.Launcher(),
    )


def _batches(groups: list[Group]) -> list[list[Group]]:
    """Groups whose states are computed in one launch: up to two with the same directions."""
    batches = []
    for _, same in itertools.groupby(groups, key=lambda group: group.directions):
        members = list(same)
        batches += [members[start : start + 2] for start in range(0, len(members), 2)]
    return batches


def pack_routes(groups: list[Group]) -> int:
    """Route numbers of up to two groups in 7 bits each, then a bit for a path along columns: what kernels read."""
    numbers = [max(k, 0) for group in groups for k in (group.forward, group.reversed)]
    columns = [group.code != TABLE and bool(group.code & COLUMN) for group in groups]
    return sum(k << (7 * i) for i, k in enumerate(numbers)) | sum(c << (28 + i) for i, c in enumerate(columns))


def next_stages(call: ScanCall) -> list[ScanCall]:
    """Calls on meta tensors that a pyramid's other stages will make after ``call``, its first, also on meta tensors.

    None for a sequence, as models without stages scan, nor after calls whose tables or states say more about the map.
    """
    if min(call.x.shape[1:3]) == 1 or call.table is not None or call.initial_state is not None:
        return []
    return [_stage(call, factor) for factor in (2, 4, 8)]


def _stage(call: ScanCall, factor: int) -> ScanCall:
    """The call on a map with so many times fewer rows and columns, and more channels and ranks."""

    def wide(tensor: Tensor, *axes: int) -> Tensor:
        return tensor.new_empty([size * factor if i in axes else size for i, size in enumerate(tensor.shape)])

    def small(tensor: Tensor) -> Tensor:
        return tensor[:, ::factor, ::factor]

    return call._replace(
        x=wide(small(call.x), 3),
        dt=wide(small(call.dt), 4),
        A=wide(call.A, 1),
        B=wide(small(call.B)),
        C=wide(small(call.C)),
        D=None if call.D is None else wide(call.D, 1),
        dt_weight=None if call.dt_weight is None else wide(call.dt_weight, 1, 2),
        dt_bias=None if call.dt_bias is None else wide(call.dt_bias, 1),
    )


class Inputs(NamedTuple):
    """Inputs as the kernels take them: contiguous maps and parameters, zeros for absent vectors.

    ``rows`` holds dt (if low-rank), B and C of a pixel and route as one row.
    """

    x: Tensor
    dt: Tensor
    rows: Tensor
    A: Tensor
    D: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.x, self.dt, self.rows, self.A, self.D, self.weight, self.bias


def kernel_inputs(call: ScanCall) -> Inputs:
    """A call's inputs as the kernels read them; only what is not laid out that way is copied."""
    A = call.A.contiguous()
    zeros = A.new_zeros(A.shape[:2]) if call.D is None or call.dt_bias is None else A
    parts = (call.B, call.C) if call.dt_weight is None else (call.dt, call.B, call.C)
    rows = parts[0] if _are_rows(parts) else torch.cat([part.flatten(4) for part in parts], dim=-1)
    return Inputs(
        x=call.x.contiguous(),
        dt=rows if call.dt_weight is not None else _with_rows(call.dt),
        rows=rows,
        A=A,
        D=zeros if call.D is None else call.D.contiguous(),
        weight=A if call.dt_weight is None else call.dt_weight.contiguous(),
        bias=zeros if call.dt_bias is None else call.dt_bias.contiguous(),
    )


def _are_rows(parts: Sequence[Tensor]) -> bool:
    """Whether (B, H, W, K, ...) tensors are neighbouring columns of one tensor: the views of one projection."""
    first = parts[0]
    end = first.data_ptr()
    for part in parts:
        if part.stride(-1) != 1 or part.data_ptr() != end or part.stride()[:4] != first.stride()[:4]:
            return False
        end += math.prod(part.shape[4:]) * part.element_size()
    return end - first.data_ptr() <= first.stride(3) * first.element_size() and _with_rows(first) is first


def _with_rows(tensor: Tensor) -> Tensor:
    """``tensor`` (B, H, W, K, ...), copied if a pixel's number does not lead to its address by one stride."""
    if tensor.stride(-1) != 1 or (tensor.shape[1] > 1 and tensor.stride(1) != tensor.shape[2] * tensor.stride(2)):
        return tensor.contiguous()
    return tensor


def strides_of(tensor: Tensor) -> tuple[int, int, int]:
    """Strides of an image, a pixel and a route of (B, H, W, K, ...)."""
    return tensor.stride(0), tensor.stride(2) if tensor.shape[2] > 1 else tensor.stride(1), tensor.stride(3)


def extent(tensor: Tensor) -> int:
    """One past the largest offset; more than the number of elements for a strided view."""
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def alignment(tensor: Tensor) -> int:
    """Elements (1, 2, 4 or 8) that every row's address in (B, H, W, K, ...) is a multiple of, for wide loads."""
    align = 8
    while tensor.data_ptr() % (align * tensor.element_size()) or any(step % align for step in strides_of(tensor)):
        align //= 2
    return align


def by_channel(states: Tensor | None) -> Tensor | None:
    """(B, K, E, N) -> (B, K, N, E), as the kernels exchange states."""
    return None if states is None else states.transpose(-1, -2).contiguous()


def scratch(x: Tensor, *shape: int) -> Tensor:
    """Unfilled float32 memory beside x."""
    return x.new_empty(shape, dtype=torch.float32)


def dot_dtype(x: Tensor) -> tl.dtype:
    """Operands of the gradient products: bfloat16 holds any gradient's range; the interpreter cannot multiply it."""
    return tl.float32 if x.dtype == torch.float32 or _triton.interpreting() else tl.bfloat16


def chain(
    launch: _triton.Launcher,
    A: Tensor,
    ends: Tensor,
    totals: Tensor,
    given: Tensor | None,
    last: Tensor | None,
    stride: int,
    reversed_routes: int,
) -> Tensor:
    """States that enter the segments (B, K, segments, N, E).

    Args:
        ends: (B, K, segments, N, E), state that leaves each segment when it starts from zero.
        totals: (B, K, segments, E), sum of a segment's steps times log2(e).
        given: (B, K, N, E), states that enter the first segments.
        last: where the states that leave the last segments go, [E, N] at every ``stride`` numbers.
        reversed_routes: bit mask of the routes walked from the last segment to the first.
    """
    batch, n_routes, segments, state, dim = ends.shape
    entries = torch.empty_like(ends)
    block = 32
    launch(
        "chain",
        selective_scan_chain_kernel,
        (batch * n_routes, triton.cdiv(dim * state, block), 1),
        (
            totals, A, ends, ends if given is None else given, entries, ends if last is None else last,
            segments, stride, dim, n_routes, reversed_routes,
        ),
        {"N": state, "BS": 32, "BJ": block, "GIVEN": given is not None, "LAST": last is not None, "num_warps": 1},
    )  # fmt: skip
    return entries


def sum_parameters(
    launch: _triton.Launcher, params: Tensor, weights: Tensor, grads: tuple[Tensor, ...], meta: dict[str, Any]
) -> None:
    """Add up what the programs of a gradient pass leave for A, D, the bias and, with low-rank steps, the weight.

    Args:
        params: (programs, K, E, N + 2).
        weights: (programs, K, E, BR), or anything.
        grads: of these four, as the kernels take them.
    """
    programs, n_routes, dim, columns = params.shape
    channels, block = n_routes * dim, 32
    widest = max(columns, meta["BR"]) if meta["LOW_RANK"] else columns
    launch(
        "parameters",
        selective_scan_bwd_kernel_parameters,
        (triton.cdiv(channels * widest, block), 1 + meta["LOW_RANK"], 1),
        (params, weights, *grads, programs, channels),
        {"N": columns - 2, "RANK": meta["RANK"], "BR": meta["BR"], "BP": 32, "BJ": block, "num_warps": 4},
    )

"""How neighborhood attention is laid out for the Triton kernels: axes, tiles, slabs and launch choices.

See triton_impl.py for the design.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.ops import _triton
from subquad.ops.neighborhood_attention.call import NeighborhoodCall


class Config(NamedTuple):
    """Launch choices of a kernel for a shape class.

    Attributes:
        rows, columns: tokens of a tile; one of a sequence has as many in its only row.
        slab: tokens of a slab.
        warps, stages: of a program.
    """

    rows: int
    columns: int
    slab: int
    warps: int
    stages: int


_CONFIGS = {
    ("forward", "half"): Config(rows=8, columns=8, slab=64, warps=4, stages=2),
    ("queries", "half"): Config(rows=8, columns=8, slab=64, warps=4, stages=2),
    ("keys", "half"): Config(rows=8, columns=8, slab=64, warps=4, stages=2),
    ("forward", "half, many channels"): Config(rows=8, columns=8, slab=32, warps=4, stages=2),
    ("queries", "half, many channels"): Config(rows=8, columns=8, slab=32, warps=4, stages=2),
    ("keys", "half, many channels"): Config(rows=8, columns=8, slab=32, warps=4, stages=2),
    ("forward", "single"): Config(rows=8, columns=8, slab=32, warps=4, stages=2),
    ("queries", "single"): Config(rows=8, columns=8, slab=32, warps=4, stages=2),
    ("keys", "single"): Config(rows=8, columns=8, slab=32, warps=4, stages=2),
    ("forward", "single, many channels"): Config(rows=8, columns=8, slab=32, warps=4, stages=1),
    ("queries", "single, many channels"): Config(rows=8, columns=8, slab=32, warps=4, stages=1),
    ("keys", "single, many channels"): Config(rows=8, columns=8, slab=32, warps=4, stages=1),
}
"""The one table of launch heuristics; ``SUBQUAD_AUTOTUNE=1`` searches ``_CANDIDATES`` instead."""

_EXTRA_WAVES = 4
"""Programs for each multiprocessor that the gradients of additional keys are cut into, at least."""

_CANDIDATES = [
    Config(rows, 8, slab, warps, stages)
    for rows, warps in ((8, 4), (4, 2), (4, 4))
    for slab in (32, 64)
    for stages in (1, 2, 3)
]


def default_config(which: str, call: NeighborhoodCall) -> Config:
    """The table's launch choices for the ``"forward"``, ``"queries"`` or ``"keys"`` kernel of a call."""
    size = call.q.element_size()
    many = max(call.q.shape[-1], call.v.shape[-1]) * size > 128
    return _CONFIGS[which, ("half" if size == 2 else "single") + (", many channels" if many else "")]


def config_for(which: str, call: NeighborhoodCall, run: Callable[[Config], object]) -> Config:
    """The same, or with ``SUBQUAD_AUTOTUNE=1`` what was fastest when ``run`` launched each candidate."""
    options = (*call[6:10], call.rpb is not None, call.extra)
    key = ("neighborhood_attention", which, *call.q.shape, *call.v.shape[-2:], *options, call.q.dtype)
    return _triton.tuned(key, call.q, _CANDIDATES, default_config(which, call), run)


def with_axes(call: NeighborhoodCall, axes: int) -> NeighborhoodCall:
    """The call with further axes in front, if it has fewer, and with the channels of a token side by side."""
    if not call.q.stride(-1) == call.k.stride(-1) == call.v.stride(-1) == 1:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in call[:3])
        call = call._replace(q=q, k=k, v=v)
    for _ in range(axes - len(call.size)):
        call = call._replace(
            q=call.q.unsqueeze(1),
            k=call.k.unsqueeze(1),
            v=call.v.unsqueeze(1),
            rpb=None if call.rpb is None else call.rpb.unsqueeze(1),
            kernel_size=[1, *call.kernel_size],
            dilation=[1, *call.dilation],
            stride=[1, *call.stride],
            is_causal=[False, *call.is_causal],
        )
    return call


class Plan(NamedTuple):
    """What all launches of a kernel for one shape class share."""

    grid: tuple[int, int, int]
    sizes: tuple[int, ...]  # the kernel's arguments from stride_qb on, up to p_extrak
    meta: dict[str, Any]
    launch: _triton.Launcher


_plans: _triton.Plans[Plan] = _triton.Plans()


def plan_for(
    which: str, call: NeighborhoodCall, config: Config, *more: Tensor, on_new: Callable[[], None] | None = None
) -> Plan:
    """The plan of a call's shape class: all that the kernel is compiled for.

    Args:
        which: "forward", "queries", "keys" or "extra".
        call: with two or three axes.
        more: tensors besides the call's that the kernel sees.
        on_new: see ``Plans.get``.
    """
    options = (*call.kernel_size, *call.dilation, *call.stride, *call.is_causal)
    key = (which, config, options, *map(_triton.facts, (*call[:6], *more)))
    return _plans.get(key, call.q, lambda: _make_plan(which, call, config), on_new)


def _make_plan(which: str, call: NeighborhoodCall, config: Config) -> Plan:
    call = with_axes(call, 3)
    if which == "extra":
        return _make_extra_plan(call, config)
    batch, depth, height, width, heads, _ = call.q.shape
    owners = call.k.shape[-2] if which == "keys" else heads
    tile_y, tile_x = config.rows, config.columns
    if height == 1 and call.rpb is None:  # the sums of a bias' gradient need the rows
        tile_y, tile_x = 1, tile_y * tile_x
    groups = [triton.cdiv(length, dilation) for length, dilation in zip(call.size, call.dilation, strict=True)][1:]
    tiles = [triton.cdiv(tokens, tile) for tokens, tile in zip(groups, (tile_y, tile_x), strict=True)]
    extents = [_extent(which, call, axis, tile) for axis, tile in ((1, tile_y), (2, tile_x))]
    slab_y, slab_x, wide = _slab(config.slab, *extents, least_rows=1 if call.rpb is None else triton.cdiv(16, tile_y))
    meta = _common(call, config) | {
        "DEEP": depth > 1,
        "TY": tile_y,
        "TX": tile_x,
        "BY": slab_y,
        "BX": slab_x,
        "WIDE": wide,
        "BIAS": call.rpb is not None,
    }
    for axis, name in enumerate("ZYX"):
        meta |= {
            f"K{name}": call.kernel_size[axis],
            f"STRIDE_{name}": call.stride[axis],
            f"CAUSAL_{name}": call.is_causal[axis],
            f"N{name}": max(16, triton.next_power_of_2(2 * call.kernel_size[axis] - 1)),
        }
    strides = [[stride // meta["ALIGN"] for stride in _strides(x)] for x in (call.q, call.k, call.v)]
    return Plan(
        grid=(batch * owners * depth * call.dilation[1] * call.dilation[2] * tiles[0] * tiles[1], 1, 1),
        sizes=(  # what volumes alone have comes last
            *(stride for image, _, *others in strides for stride in (image, *others)),
            *(owners, height, width, *call.dilation[1:], *tiles),
            *(plane for _, plane, *_ in strides),
            *(depth, call.dilation[0]),
        ),
        meta=meta,
        launch=_triton.Launcher(),
    )


def _make_extra_plan(call: NeighborhoodCall, config: Config) -> Plan:
    batch, *size, _, _ = call.q.shape
    shared = call.k.shape[-2]
    meta = _common(call, config) | {"BT": config.slab}
    owners, blocks = batch * shared, triton.cdiv(call.extra, meta["BM"])
    slabs = triton.cdiv(math.prod(size), config.slab) * meta["REPEATS"]
    wanted = triton.cdiv(_EXTRA_WAVES * _triton.multiprocessor_count(call.q.device), max(1, owners * blocks))
    return Plan(
        grid=(owners, blocks, min(slabs, wanted)),
        sizes=(*(stride // meta["ALIGN"] for stride in _strides(call.q)), shared, *size),
        meta=meta,
        launch=_triton.Launcher(),
    )


def _common(call: NeighborhoodCall, config: Config) -> dict[str, Any]:
    """What every kernel of a call with three axes is compiled for."""
    dim, values = call.q.shape[-1], call.v.shape[-1]
    return {
        "REPEATS": call.q.shape[-2] // call.k.shape[-2],
        "D": dim,
        "E": values,
        "BD": max(16, triton.next_power_of_2(dim)),
        "BE": max(16, triton.next_power_of_2(values)),
        "BM": min(config.slab, max(16, triton.next_power_of_2(call.extra))) if call.extra else 0,
        "ALIGN": _alignment(call.q, call.k, call.v),
        "PRECISION": "tf32x3" if call.q.dtype == torch.float32 else "tf32",  # says nothing of 16-bit operands
        "INDEX": tl.int64 if _image_extent(call) >= 2**31 else tl.int32,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def _extent(which: str, call: NeighborhoodCall, axis: int, tile: int) -> int:
    """Most tokens along an axis that a tile of the kernel walks over; ``_keys`` and ``_queries`` of the kernels."""
    kernel, stride, causal = call.kernel_size[axis], call.stride[axis], call.is_causal[axis]
    length, dilation = call.size[axis], call.dilation[axis]

    def first(p: int, tokens: int) -> int:
        leader = min(p // stride * stride + (stride - 1 if causal else stride // 2), tokens - 1)
        return max(leader - kernel + 1, 0) if causal else min(max(leader - kernel // 2, 0), tokens - kernel)

    def walked(start: int, tokens: int) -> int:
        last = min(start + tile, tokens) - 1
        if which != "keys":
            return (last + 1 if causal else first(last, tokens) + kernel) - first(start, tokens)
        if causal and stride == 1:
            return min(last + kernel, tokens) - start
        if causal or stride > 1:
            return min(last + kernel, tokens) - max(start - kernel + 1, 0)
        begin = 0 if start < kernel else start - (kernel - 1 - kernel // 2)
        return (tokens if last >= tokens - kernel else last + kernel // 2 + 1) - begin

    sizes = {length // dilation, -(-length // dilation)}
    return max(walked(start, tokens) for tokens in sizes for start in range(0, tokens, tile))


def _slab(tokens: int, rows: int, columns: int, *, least_rows: int) -> tuple[int, int, bool]:
    """Rows and columns of the slabs that cover a region with the fewest, and whether a row of them has several."""
    shapes = [(tokens // width, width) for width in (8, 16, 32, 64) if width * least_rows <= tokens]

    def count(shape: tuple[int, int]) -> tuple[int, bool]:
        across = triton.cdiv(columns, shape[1])
        return triton.cdiv(rows, shape[0]) * across, across > 1

    best = min(shapes, key=count)
    return *best, count(best)[1]


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of all but the channels; that of an axis of one may be any number, and is not used."""
    return tuple(step if size > 1 else 0 for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True))


def _image_extent(call: NeighborhoodCall) -> int:
    """One past the largest offset inside an image, of the inputs and of the results."""
    strided = (
        1 + sum((size - 1) * step for size, step in zip(x.shape[1:], x.stride()[1:], strict=True))
        for x in (call.q, call.k, call.v)
    )
    rows = math.prod(call.q.shape[1:-1])
    return max(*strided, rows * max(call.q.shape[-1], call.v.shape[-1]))


def _alignment(*tensors: Tensor) -> int:
    """Elements (16 bytes at most) that the offset of every row of the tensors is a multiple of, for wide loads."""
    align = 16 // tensors[0].element_size()
    while any(stride % align for x in tensors for stride in _strides(x)):
        align //= 2
    return align

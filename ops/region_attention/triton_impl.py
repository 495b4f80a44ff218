"""Region attention in Triton: forward and backward.

Design. A region's tokens are rows that index arithmetic finds on the map, and the chosen regions of keys are a list of
such rows, as if they lay side by side: a program takes a tile of a region's queries in one head and walks over the list
in blocks, with an online softmax. Of small regions a block takes several at once; nothing is gathered in memory. Sizes
of regions, which follow the image, are no compile-time constants.

The backward pass has no atomics. One kernel walks as the forward pass does and makes dq. For dk and dv the choice is
turned round: a sort of the entries (region of queries, slot) by the region of keys that they name, and a search for
where each of these starts, give every region of keys the list of queries that look at it, of any length; another kernel
walks over that. Shapes do not depend on the choice and nothing waits for the device, so graphs capture it. Gradients of
weights leave the first kernel as sums over a tile's queries for each key.

Limits: at most 128 channels a head (64 in float32), 2^20 regions, entries and tokens of a region.
Bytes, floors and measurements: tools/benchmarks/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from subquad.ops import _compile, _triton
from subquad.ops._compile import Turn
from subquad.ops._triton_attention import pad_gradient, strides_of, with_rows
from subquad.ops.region_attention._triton_kernels import (
    region_attention_bwd_kernel_keys,
    region_attention_bwd_kernel_queries,
    region_attention_fwd_kernel,
)
from subquad.ops.region_attention.call import Gradients, RegionCall


class Config(NamedTuple):
    """Launch choices of a kernel for a shape class.

    Attributes:
        tile: tokens of a region that a program owns.
        block: tokens of other regions that it meets at a time.
        warps, stages: of a program.
    """

    tile: int
    block: int
    warps: int
    stages: int


_CONFIGS = {
    "half": (Config(16, 64, 1, 1), Config(32, 64, 2, 1), Config(64, 64, 4, 2)),
    "half, many channels": (Config(16, 32, 2, 1), Config(32, 32, 4, 1), Config(64, 32, 8, 1)),
    "single": (Config(16, 32, 2, 1), Config(64, 32, 4, 1)),
    "single, many channels": (Config(16, 32, 4, 1), Config(64, 32, 8, 1)),
}
"""The one table of launch heuristics, by bits of a number and channels of a head (up to 32, or more): the first of a
row whose tile holds a region, or the last. ``SUBQUAD_AUTOTUNE=1`` searches ``_CANDIDATES`` instead."""

_CANDIDATES = [
    Config(tile, block, warps, stages)
    for tile, most in ((16, 2), (32, 4), (64, 8))
    for block in (32, 64)
    for warps in (most // 2, most)
    for stages in (1, 2)
]


def default_config(which: str, call: RegionCall) -> Config:
    """The table's launch choices for the ``"forward"``, ``"queries"`` or ``"keys"`` kernel of a call."""
    many = ", many channels" if max(call.q.shape[-1], call.v.shape[-1]) > 32 else ""
    own = call.kv_region_size if which == "keys" else call.region_size
    row = _CONFIGS[("half" if call.q.element_size() == 2 else "single") + many]
    return next((config for config in row if own[0] * own[1] <= config.tile), row[-1])


def _config_for(which: str, call: RegionCall, run: Callable[[Config], object]) -> Config:
    shapes = (*call.q.shape, *call.v.shape[1:3], call.v.shape[-1], *call.regions.shape)
    key = ("region_attention", which, *shapes, *call.region_size, *call.kv_region_size, call.q.dtype)
    return _triton.tuned(key, call.q, _CANDIDATES, default_config(which, call), run)


class _Inputs(NamedTuple):
    """Inputs as the kernels take them: one stride from pixel to pixel; q for what is absent."""

    q: Tensor
    k: Tensor
    v: Tensor
    regions: Tensor
    weights: Tensor
    pad_k: Tensor
    pad_v: Tensor


def _inputs(call: RegionCall) -> _Inputs:
    q, k, v = (with_rows(x) for x in call[:3])
    weights, pad_k, pad_v = (q if x is None else x.contiguous() for x in (call.weights, call.pad_k, call.pad_v))
    return _Inputs(q, k, v, call.regions.contiguous(), weights, pad_k, pad_v)


class _Plan(NamedTuple):
    """What all calls of one shape class share."""

    programs: int
    tiles: int
    sizes: tuple[int, ...]  # stride_qb to tiles of the kernels' arguments
    meta: dict[str, Any]
    launch: _triton.Launcher


_plans: _triton.Plans[_Plan] = _triton.Plans()


def _plan_for(which: str, call: RegionCall, inputs: _Inputs, config: Config, *more: Tensor) -> _Plan:
    """The plan of a call's shape class: all that the kernel is compiled for.

    Args:
        which: "forward", "queries" or "keys".
        more: tensors besides ``inputs`` that the kernel sees.
    """
    options = (tuple(call.region_size), tuple(call.kv_region_size), call.hide_padding)
    absent = call.weights is None, call.pad_k is None, call.pad_v is None
    key = (which, config, options, absent, *map(_triton.facts, (*inputs, *more)))
    on_new = partial(_compile_ahead, call) if which == "forward" else None
    return _plans.get(key, call.q, lambda: _make_plan(which, call, inputs, config), on_new)


def _make_plan(which: str, call: RegionCall, inputs: _Inputs, config: Config) -> _Plan:
    (rows, columns), (kv_rows, kv_columns) = call.counts, call.kv_counts
    owners, own = (kv_rows * kv_columns, call.kv_region_size) if which == "keys" else (rows * columns, call.region_size)
    batch, height, width, heads, dim = call.q.shape
    kv_height, kv_width, values = call.k.shape[1], call.k.shape[2], call.v.shape[-1]
    ragged = kv_rows * call.kv_region_size[0] != kv_height or kv_columns * call.kv_region_size[1] != kv_width
    tiles = triton.cdiv(own[0] * own[1], config.tile)
    walked = call.regions.shape[3] * call.kv_region_size[0] * call.kv_region_size[1]
    meta = {
        "D": dim,
        "E": values,
        "BD": max(16, triton.next_power_of_2(dim)),
        "BE": max(16, triton.next_power_of_2(values)),
        "BM": config.tile,
        "BN": config.block,
        "WEIGHTS": call.weights is not None,
        "PADK": ragged and call.pad_k is not None,
        "PADV": ragged and call.pad_v is not None,
        "HIDE": ragged and call.hide_padding,
        "PRECISION": "tf32x3" if call.q.dtype == torch.float32 else "tf32",  # says nothing of 16-bit operands
        "num_warps": config.warps,
        "num_stages": config.stages if walked > config.block else 1,
    }
    return _Plan(
        programs=batch * heads * owners * tiles,
        tiles=tiles,
        sizes=(
            *(stride for x in inputs[:3] for stride in strides_of(x)),
            *(height, width, columns, *call.region_size, kv_height, kv_width, kv_columns, *call.kv_region_size),
            *(rows * columns, kv_rows * kv_columns, heads, *call.regions.shape[1::2], tiles),
        ),
        meta=meta,
        launch=_triton.Launcher(),
    )


def _compile_ahead(call: RegionCall) -> None:
    """Compile the kernels of a call that is about to run for the first time at once, and those of its gradients."""
    meta = _triton.on_meta(call)
    with _compile.compiling_ahead(call.q.device):
        o, lse = _forward(meta, default_config("forward", call))
    if call.q.requires_grad:
        with _compile.compiling_ahead(call.q.device, Turn.GRADIENTS):
            rows, *_ = _backward_queries(meta, o, o, lse, default_config("queries", call))
            _backward_keys(meta, o, rows, default_config("keys", call))


def forward(call: RegionCall) -> tuple[Tensor, Tensor]:
    """Output (B, H, W, heads, E) in q's dtype and lse (B, H, W, heads) in float32."""
    return _forward(call, _config_for("forward", call, lambda config: _forward(call, config)))


def _forward(call: RegionCall, config: Config) -> tuple[Tensor, Tensor]:
    inputs = _inputs(call)
    plan = _plan_for("forward", call, inputs, config)
    o = call.v.new_empty((*call.q.shape[:-1], call.v.shape[-1]))
    lse = call.q.new_empty(call.q.shape[:-1], dtype=torch.float32)
    with torch.cuda.device_of(call.q):
        plan.launch(
            "forward",
            region_attention_fwd_kernel,
            (plan.programs, 1, 1),
            (*inputs, o, lse, call.scale, *plan.sizes),
            plan.meta,
        )
    return o, lse


def backward(call: RegionCall, grad_o: Tensor, o: Tensor, lse: Tensor) -> Gradients:
    """Gradients of q, k, v, weights, pad_k and pad_v, in their dtypes; None for an absent argument."""
    grad_o = grad_o.contiguous()

    def of_queries(config: Config) -> tuple[Tensor, Tensor, Tensor | None]:
        return _backward_queries(call, grad_o, o, lse, config)

    rows, grad_q, grad_weights = of_queries(_config_for("queries", call, of_queries))

    def of_keys(config: Config) -> tuple[Tensor | None, ...]:
        return _backward_keys(call, grad_o, rows, config)

    grad_k, grad_v, grad_pad_k, grad_pad_v = of_keys(_config_for("keys", call, of_keys))
    return grad_q, grad_k, grad_v, grad_weights, grad_pad_k, grad_pad_v


def _backward_queries(
    call: RegionCall, grad_o: Tensor, o: Tensor, lse: Tensor, config: Config
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the other kernel needs of each query (its lse and <do, o>), and the gradients of q and of the weights."""
    inputs = _inputs(call)
    plan = _plan_for("queries", call, inputs, config, grad_o)
    rows, grad_q = lse.new_empty((*lse.shape, 2)), call.q.new_empty(call.q.shape)
    batch, lists, regions, topk = call.regions.shape
    heads, tokens = call.q.shape[3], call.kv_region_size[0] * call.kv_region_size[1]
    partials = lse.new_empty((batch, regions, plan.tiles, heads, topk, tokens) if plan.meta["WEIGHTS"] else (0,))
    with torch.cuda.device_of(call.q):
        plan.launch(
            "queries",
            region_attention_bwd_kernel_queries,
            (plan.programs, 1, 1),
            (*inputs, o, lse, grad_o, grad_q, partials, rows, call.scale, *plan.sizes),
            plan.meta,
        )
    if call.weights is None:
        return rows, grad_q, None
    found = partials.sum((2, 5)) if lists > 1 else partials.sum((2, 3, 5)).unsqueeze(2)
    return rows, grad_q, found.transpose(1, 2).to(call.weights.dtype, copy=True, memory_format=torch.contiguous_format)


def _backward_keys(call: RegionCall, grad_o: Tensor, rows: Tensor, config: Config) -> tuple[Tensor | None, ...]:
    """Gradients of k, v, pad_k and pad_v."""
    inputs = _inputs(call)
    plan = _plan_for("keys", call, inputs, config, grad_o)
    entries, starts = _turned_round(inputs.regions, call)
    grad_k, grad_v = call.k.new_empty(call.k.shape), call.v.new_empty(call.v.shape)
    heads = call.q.shape[3]
    pad_k, pad_v = (
        rows.new_empty((plan.programs // heads, heads, x.shape[-1]) if plan.meta[name] else (0,))
        for name, x in (("PADK", grad_k), ("PADV", grad_v))
    )
    q, k, v, _, *options = inputs
    with torch.cuda.device_of(call.q):
        plan.launch(
            "keys",
            region_attention_bwd_kernel_keys,
            (plan.programs, 1, 1),
            (q, k, v, entries, starts, *options, rows, grad_o, grad_k, grad_v, pad_k, pad_v, call.scale, *plan.sizes),
            plan.meta,
        )
    pads = ((call.pad_k, pad_k), (call.pad_v, pad_v))
    return grad_k, grad_v, *(None if pad is None else pad_gradient(pad, partials) for pad, partials in pads)


def _turned_round(regions: Tensor, call: RegionCall) -> tuple[Tensor, Tensor]:
    """Who looks at each region of keys: entries region * topk + slot, in the order of the regions that they name.

    Returns entries (B, lists, R topk), and where those of each region of keys start (B, lists, R_k + 1).
    """
    named, entries = regions.flatten(2).sort(dim=-1, stable=True)  # stable: the same sums in every run
    rows, columns = call.kv_counts
    bounds = torch.arange(rows * columns + 1, dtype=named.dtype, device=named.device)
    bounds = bounds.expand(*named.shape[:2], -1).contiguous()
    return entries, torch.searchsorted(named, bounds, out_int32=True)

"""The split forms of neighborhood attention in Triton, forward and backward, of maps and sequences.

Design. Three kernels do all of it, each in two places:

    logits   of each slot the product of a query and a key      qk, and the gradients of av's weights
    sums     over slots of keys, with weights                   av, and the gradients of qk's queries
    turned   sums over the queries that have a key in a slot    the gradients of keys and values

A program takes some tokens of a head and walks over their windows a row at a time. K weights a query are what the
memory is busy with, so products stay off the tensor cores, whose tiles would be mostly pairs that do not see each
other; neighbouring tokens find their keys in the cache. Tokens follow on each other in the map: dilation, strides and
causality are arithmetic of a token's window. No atomics: a fourth kernel sums the bias' gradient over parts of the
tokens, which PyTorch adds up.

Limits: two axes at most, no additional keys, at most 256 channels a head.
Bytes, floors and measurements: tools/benchmarks/NOTES.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from subquad.ops import _triton
from subquad.ops.neighborhood_attention._triton_plan import _alignment, _strides, with_axes
from subquad.ops.neighborhood_attention._triton_split import (
    neighborhood_split_kernel_logits,
    neighborhood_split_kernel_sums,
    neighborhood_split_kernel_table,
    neighborhood_split_kernel_turned,
)
from subquad.ops.neighborhood_attention.call import Gradients, NeighborhoodCall

_NUMBERS = {"logits": 8192, "sums": 8192, "turned": 4096}
"""Of a block (tokens, slots, channels)."""
_MOST_TOKENS = 32
"""Of a block: more take more registers for their windows than small kernels and few channels save."""
_WARPS = 4
_TABLE_NUMBERS = 1024
"""Of a block of the bias' gradient (tokens, places in a row of the table)."""
_TABLE_WAVES = 8
"""Programs wanted for each multiprocessor, there."""


class _Plan(NamedTuple):
    """What all launches of a kernel for one shape class share."""

    grid: tuple[int, int, int]
    sizes: tuple[int, ...]  # the first stride to the last number of the kernel's arguments
    meta: dict[str, Any]
    launch: _triton.Launcher


_plans: _triton.Plans[_Plan] = _triton.Plans()


def _plan_for(which: str, call: NeighborhoodCall, *read: Tensor) -> _Plan:
    """The plan of a kernel's shape class: all that the kernel is compiled for.

    Args:
        which: "logits", "sums", "turned" or "table".
        call: with two axes.
        read: what the kernel reads by token: queries or weights, and behind them the rows that it looks up.
    """
    options = (*call.kernel_size, *call.dilation, *call.stride, *call.is_causal)
    key = (which, options, *map(_triton.facts, (*call[:4], *read)))
    return _plans.get(key, call.q, lambda: _make_plan(which, call, *read))


def _make_plan(which: str, call: NeighborhoodCall, first: Tensor, rows: Tensor | None = None) -> _Plan:
    batch, height, width, heads = call.q.shape[:4]
    meta = {
        f"{name}{axis}": option[i]
        for name, option in (("K", call.kernel_size), ("STRIDE_", call.stride), ("CAUSAL_", call.is_causal))
        for i, axis in enumerate("YX")
    }
    meta |= {"DILATED": max(call.dilation) > 1, "num_warps": _WARPS, "num_stages": 1}
    launch = _triton.Launcher()
    if rows is None:  # the table's
        places, columns = (2 * kernel - 1 for kernel in call.kernel_size)
        block, tokens = triton.next_power_of_2(columns), batch * height * width
        meta |= {"BT": max(1, _TABLE_NUMBERS // block), "NX": block}
        wanted = _TABLE_WAVES * _triton.multiprocessor_count(call.q.device) // (heads * places)
        grid = (heads, places, max(1, min(triton.cdiv(tokens, meta["BT"]), wanted)))
        return _Plan(grid, (*_strides(first), heads, height, width, *call.dilation, tokens), meta, launch)
    shared = max(call.k.shape[-2:-1], call.v.shape[-2:-1])[0]  # one of them is empty
    owners, dim, align = shared if which == "turned" else heads, rows.shape[-1], _alignment(rows)
    block = max(16, triton.next_power_of_2(dim))
    # The fewest idle slots; then the fewest parts of a window's row.
    slots = min((4, 8, 16), key=lambda count: (triton.cdiv(call.kernel_size[1], count) * count, -count))
    tokens = max(1, min(_MOST_TOKENS, _NUMBERS[which] // (block * slots)))
    blocks = triton.cdiv(height * width, tokens)
    meta |= {"D": dim, "BD": block, "BT": tokens, "BS": slots, "ALIGN": align, "REPEATS": heads // shared}
    strides = (*_strides(first), *(stride // align for stride in _strides(rows)))
    sizes = (*strides, owners, height, width, *call.dilation, blocks)
    return _Plan((batch * owners * blocks, 1, 1), sizes, meta, launch)


# What the kernels compute; calls have two axes ---------------------------------------------------------------------


def _logits(call: NeighborhoodCall, q: Tensor, k: Tensor, empty: float) -> Tensor:
    """Products of queries (B, H, W, heads, D) and the keys (B, H, W, G, D) in their windows, as slots."""
    out = q.new_empty((*q.shape[:-1], call.keys))
    plan = _plan_for("logits", call, q, k)
    table = q if call.rpb is None else call.rpb.contiguous()
    _launch(
        plan, neighborhood_split_kernel_logits, (q, k, table, out, call.scale), BIAS=call.rpb is not None, EMPTY=empty
    )
    return out


def _sums(call: NeighborhoodCall, weights: Tensor, k: Tensor) -> Tensor:
    """Sums of keys with the weights of slots, times the scale."""
    out = k.new_empty((*weights.shape[:-1], k.shape[-1]))
    _launch(_plan_for("sums", call, weights, k), neighborhood_split_kernel_sums, (weights, k, out, call.scale))
    return out


def _turned(call: NeighborhoodCall, weights: Tensor, q: Tensor, like: Tensor) -> Tensor:
    """Sums of the queries that have a key in a slot with its weight, times the scale; one for each key of ``like``."""
    out = like.new_empty(like.shape)
    _launch(_plan_for("turned", call, weights, q), neighborhood_split_kernel_turned, (weights, q, out, call.scale))
    return out


def _table(call: NeighborhoodCall, rpb: Tensor, weights: Tensor) -> Tensor:
    """Sums of the gradients of logits over equal relative places, the gradient of the bias."""
    plan = _plan_for("table", call, weights)
    parts = weights.new_empty((plan.grid[2], *rpb.shape), dtype=torch.float32)
    _launch(plan, neighborhood_split_kernel_table, (weights, parts))
    return parts.sum(0).to(rpb.dtype)


def _launch(plan: _Plan, kernel: Any, arguments: tuple[Any, ...], **more: Any) -> None:
    if plan.grid[0] and plan.grid[2]:
        with torch.cuda.device_of(arguments[0]):
            plan.launch(kernel.__name__, kernel, plan.grid, (*arguments, *plan.sizes), plan.meta | more)


# The split forms -------------------------------------------------------------------------------------------------


def qk(call: NeighborhoodCall) -> Tensor:
    """Logits (B, *S, H, slots) in q's dtype."""
    flat = with_axes(call, 2)
    return _logits(flat, flat.q, flat.k, -torch.inf).view(*call.q.shape[:-1], call.keys)


def qk_backward(call: NeighborhoodCall, grad: Tensor) -> Gradients:
    """Gradients of q, k and rpb, in the places that they have in a call."""
    flat = with_axes(call, 2)
    weights = _as_map(grad, flat)
    table = None if flat.rpb is None else _table(flat, flat.rpb, weights)
    return (
        _sums(flat, weights, flat.k).view(call.q.shape),
        _turned(flat, weights, flat.q, flat.k).view(call.k.shape),
        None,
        None if table is None or call.rpb is None else table.view(call.rpb.shape),
        None,
        None,
    )


def av(call: NeighborhoodCall) -> Tensor:
    """Sums (B, *S, H, E) in the weights' dtype."""
    flat = with_axes(call, 2)
    return _sums(flat, flat.q, flat.v).view(*call.q.shape[:-1], call.v.shape[-1])


def av_backward(call: NeighborhoodCall, grad: Tensor) -> Gradients:
    """Gradients of the weights, in q's place, and of v."""
    flat = with_axes(call, 2)
    grad = _as_map(grad, flat)
    weights = _logits(flat, grad, flat.v, 0.0)
    values = _turned(flat, flat.q, grad, flat.v)
    return weights.view(call.q.shape), None, values.view(call.v.shape), None, None, None


def _as_map(grad: Tensor, call: NeighborhoodCall) -> Tensor:
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    return grad if grad.dim() == call.q.dim() else grad.unsqueeze(1)

"""Neighborhood attention as its definition says: every query with its own list of keys, gathered.

Slow and large, of size N K_0 K_1 D, but made of standard operators alone and free of branches on the size of the map:
it is the export form, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.neighborhood_attention.call import NeighborhoodCall


class Windows(NamedTuple):
    """What the queries of one axis see, each (L, K).

    Attributes:
        key: positions of the keys on the axis.
        visible: False for a slot that causality leaves empty.
        relative: entry of the axis of the bias table.
    """

    key: Tensor
    visible: Tensor
    relative: Tensor


def windows(
    length: int, kernel_size: int, dilation: int, stride: int, causal: bool, device: torch.device | None = None
) -> Windows:
    """Windows of one axis; the contract in ``subquad.ops.neighborhood_attention`` has the formulas."""
    position = torch.arange(length, device=device)
    group, p = position % dilation, position // dilation
    last = (length - 1 - group) // dilation  # of the group
    leader = torch.minimum(p // stride * stride + (stride - 1 if causal else stride // 2), last)
    if causal:
        first = (leader - kernel_size + 1).clamp(min=0)
    else:
        first = torch.minimum((leader - kernel_size // 2).clamp(min=0), last - kernel_size + 1)
    slot = first[:, None] + torch.arange(kernel_size, device=device)  # (L, K), counted in the group
    visible = slot <= p[:, None] if causal else slot >= 0
    return Windows(group[:, None] + dilation * slot, visible, slot - p[:, None] + kernel_size - 1)


def attend(call: NeighborhoodCall) -> tuple[Tensor, Tensor]:
    """Output (B, *S, H, E) in q's dtype and lse (B, *S, H) in the working dtype, by automatic differentiation."""
    logits = _scores(call)
    lse = logits.logsumexp(-1)
    o = _average(call, torch.exp(logits - lse.unsqueeze(-1)))
    return o.to(call.q.dtype).unflatten(1, call.size), lse.unflatten(1, call.size)


def qk(call: NeighborhoodCall) -> Tensor:
    """Logits (B, *S, H, slots) in q's dtype; slots of a window are its keys, row by row, then the additional ones."""
    return _scores(call).to(call.q.dtype).unflatten(1, call.size)


def av(call: NeighborhoodCall) -> Tensor:
    """Sums (B, *S, H, E) of values with the weights (B, *S, H, slots) that the call has in the place of q."""
    weights = call.q.flatten(1, -3).to(call.working)
    return _average(call, weights).to(call.q.dtype).unflatten(1, call.size)


def _axes(call: NeighborhoodCall) -> list[Windows]:
    options = zip(call.size, call.kernel_size, call.dilation, call.stride, call.is_causal, strict=True)
    return [windows(*axis, device=call.q.device) for axis in options]


def _visible(axes: list[Windows]) -> Tensor:
    """(N, K)."""
    return _ravel([axis.visible.long() for axis in axes], [1] * len(axes)) == len(axes)


def _scores(call: NeighborhoodCall) -> Tensor:
    """Logits (B, N, H, slots) in the working dtype, minus infinity in slots that causality leaves empty."""
    axes = _axes(call)
    index = _ravel([axis.key for axis in axes], call.size)  # (N, K)
    q = call.q.flatten(1, -3).to(call.working) * call.scale  # (B, N, H, D)
    k = _per_query_head(call, call.k.flatten(1, -3))
    logits = torch.einsum("bnhd,bnkhd->bnhk", q, k[:, index])
    if call.rpb is not None:
        relative = _ravel([axis.relative for axis in axes], [2 * size - 1 for size in call.kernel_size])
        logits = logits + call.rpb.to(call.working).flatten(1)[:, relative].transpose(0, 1)  # (N, H, K)
    if any(call.is_causal):
        logits = logits.masked_fill(~_visible(axes)[:, None], -torch.inf)
    if call.additional_keys is not None:
        further = torch.einsum("bnhd,bmhd->bnhm", q, _per_query_head(call, call.additional_keys))
        logits = torch.cat([logits, further], -1)
    return logits


def _average(call: NeighborhoodCall, weights: Tensor) -> Tensor:
    """Sums (B, N, H, E) with weights (B, N, H, slots) in the working dtype; those of empty slots do not count."""
    axes = _axes(call)
    index = _ravel([axis.key for axis in axes], call.size)  # (N, K)
    v = _per_query_head(call, call.v.flatten(1, -3))
    inside = weights if call.additional_values is None else weights[..., : index.shape[1]]
    if any(call.is_causal):
        inside = inside.masked_fill(~_visible(axes)[:, None], 0.0)
    o = torch.einsum("bnhk,bnkhe->bnhe", inside, v[:, index])
    if call.additional_values is not None:
        further = _per_query_head(call, call.additional_values)
        o = o + torch.einsum("bnhm,bmhe->bnhe", weights[..., index.shape[1] :], further)
    return o


def _per_query_head(call: NeighborhoodCall, x: Tensor) -> Tensor:
    """Keys or values with a copy for each of the query heads that share them."""
    return x.to(call.working).repeat_interleave(call.q.shape[-2] // x.shape[-2], dim=-2)


def _ravel(tables: list[Tensor], sizes: Sequence[int]) -> Tensor:
    """Tables (L_i, K_i) of entries below sizes_i, for each pair of axes to the row-major entry: (prod L, prod K)."""
    total = tables[0]
    for table, size in zip(tables[1:], sizes[1:], strict=True):
        total = (total[:, None, :, None] * size + table[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    return total

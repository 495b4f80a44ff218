"""Region attention as it is written: every region's keys and values side by side, then softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.region_attention.call import RegionCall, cut, join, padding_of


def attend(call: RegionCall) -> tuple[Tensor, Tensor]:
    """Output (B, H, W, heads, E) in q's dtype and lse (B, H, W, heads) in the working dtype."""
    q = cut(call.q.to(call.working), call.region_size)  # (B, heads, R, tokens, D)
    k, v = (cut(x.to(call.working), call.kv_region_size) for x in (call.k, call.v))
    padding = padding_of(call.k, call.kv_region_size)
    if call.pad_k is not None:
        k = torch.where(padding[..., None], call.pad_k.to(call.working)[:, None, None], k)
    if call.pad_v is not None:
        v = torch.where(padding[..., None], call.pad_v.to(call.working)[:, None, None], v)
    regions = call.regions.long().expand(-1, q.shape[1], -1, -1)
    k, v = (_side_by_side(x, regions) for x in (k, v))  # (B, heads, R, topk, tokens, channels)
    if call.weights is not None:
        weights = call.weights.to(call.working)[..., None, None]
        k, v = k * weights, v * weights
    logits = call.scale * q @ k.flatten(3, 4).mT
    if call.hide_padding:
        logits = logits.masked_fill(padding[regions].flatten(3)[..., None, :], -torch.inf)
    lse = logits.logsumexp(-1, keepdim=True)
    o = torch.exp(logits - lse) @ v.flatten(3, 4)
    o, lse = (join(x, call.region_size, *call.q.shape[1:3]) for x in (o, lse))
    return o.to(call.q.dtype), lse.squeeze(-1)


def _side_by_side(x: Tensor, regions: Tensor) -> Tensor:
    """Of (B, heads, regions, tokens, C) the regions (B, heads, R, topk), (B, heads, R, topk, tokens, C)."""
    chosen = regions.flatten(2)[..., None, None].expand(-1, -1, -1, x.shape[3], x.shape[4])
    return x.gather(2, chosen).unflatten(2, (regions.shape[2], regions.shape[3]))


def route(q: Tensor, k: Tensor, region_size: list[int], kv_region_size: list[int], topk: int) -> Tensor:
    """See ``route_regions``."""
    working = torch.float64 if q.dtype == torch.float64 else torch.float32
    means = []
    for x, size in ((q, region_size), (k, kv_region_size)):
        tokens = (~padding_of(x, size)).sum(1)[:, None]
        means.append(cut(x.to(working), size).sum(3) / tokens)  # (B, heads, regions, D)
    scores = means[0].transpose(1, 2).flatten(2) @ means[1].transpose(1, 2).flatten(2).mT  # (B, R, R_k)
    return scores.topk(topk, sorted=False).indices

"""Region attention in plain PyTorch.

The map is cut into regions once; then some regions of queries at a time meet the regions that they look at, so that no
more keys are gathered at once than there are logits to be computed with them. The backward pass gathers them again:
with P = exp(logits - lse), the weights w and the gradient G of o

    dS = P (G (w v)^T - <G, o>)    dq = s dS (w k)    d(w k) = s dS^T q    d(w v) = P^T G

and what comes back to a region of keys from all regions of queries that look at it is added up.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from subquad.ops.region_attention.call import Gradients, RegionCall, cut, join, padding_of

_WORKING_SET_CPU = 2**20
"""Logits that are taken together: small enough for a CPU's caches."""
_WORKING_SET = 2**26
"""Likewise on any other device, where a launch must be long to be worth its overhead."""


def forward(call: RegionCall) -> tuple[Tensor, Tensor]:
    """Output (B, H, W, heads, E) in q's dtype and lse (B, H, W, heads) in the working dtype."""
    height, width, heads = call.q.shape[1:4]
    o = call.v.new_empty((*call.q.shape[:-1], call.v.shape[-1]))
    lse = call.q.new_empty((*call.q.shape[:-1], 1), dtype=call.working)
    padding = padding_of(call.k, call.kv_region_size)
    for images in _images(call):
        q, k, v = _cut(call, images, padding)
        parts = []
        for regions in _regions(call):
            chosen = _Chosen(call, images, regions, heads)
            logits = _logits(call, q[:, :, regions] * call.scale, chosen.take(k), chosen, padding)
            top = logits.logsumexp(-1, keepdim=True)
            parts.append((logits.sub_(top).exp_() @ chosen.take(v).flatten(3, 4), top))
        for target, found in zip((o, lse), zip(*parts, strict=True), strict=True):
            target[images] = join(torch.cat(found, dim=2), call.region_size, height, width).to(target.dtype)
    return o, lse.squeeze(-1)


def backward(call: RegionCall, grad_o: Tensor, o: Tensor, lse: Tensor) -> Gradients:
    """Gradients of q, k, v, weights, pad_k and pad_v, in their dtypes; None for an absent argument."""
    heads = call.q.shape[3]
    grads = [x.new_empty(x.shape) for x in (call.q, call.k, call.v)]
    weights = None if call.weights is None else torch.zeros_like(call.weights, dtype=call.working)
    pads = [None if pad is None else pad.new_zeros(pad.shape, dtype=call.working) for pad in (call.pad_k, call.pad_v)]
    padding = padding_of(call.k, call.kv_region_size)
    for images in _images(call):
        q, k, v = _cut(call, images, padding)
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grad, top = (cut(x[images].to(call.working), call.region_size) for x in (grad_o, lse.unsqueeze(-1)))
        delta = (grad * cut(o[images].to(call.working), call.region_size)).sum(-1, keepdim=True)
        for regions in _regions(call):
            chosen = _Chosen(call, images, regions, heads)
            part_q, part_k, part_v = q[:, :, regions], chosen.take(k), chosen.take(v)
            p = _logits(call, part_q * call.scale, part_k, chosen, padding).sub_(top[:, :, regions]).exp_()
            part_grad = grad[:, :, regions]
            d_logits = (part_grad @ part_v.flatten(3, 4).mT).sub_(delta[:, :, regions]).mul_(p)
            d_q[:, :, regions] = (d_logits @ part_k.flatten(3, 4)).mul_(call.scale)
            found_k = (d_logits.mT @ part_q).mul_(call.scale).view_as(part_k)
            found_v = (p.mT @ part_grad).view_as(part_v)
            if weights is not None:
                # part_k and part_v carry the weights already; the gradient is that of the bare ones.
                bare_k, bare_v = chosen.take(k, weighted=False), chosen.take(v, weighted=False)
                d_weights = (found_k * bare_k).sum((-2, -1)) + (found_v * bare_v).sum((-2, -1))
                shared = weights.shape[1] == 1
                weights[images, :, regions] += d_weights.sum(1, keepdim=True) if shared else d_weights
            chosen.add(d_k, found_k)
            chosen.add(d_v, found_v)
        grads[0][images] = join(d_q, call.region_size, *call.q.shape[1:3]).to(call.q.dtype)
        for target, pad, found in ((grads[1], pads[0], d_k), (grads[2], pads[1], d_v)):
            target[images] = join(found, call.kv_region_size, *call.k.shape[1:3]).to(target.dtype)
            if pad is not None:
                pad += found[:, :, padding].sum((0, 2))
    others = zip((weights, *pads), (call.weights, call.pad_k, call.pad_v), strict=True)
    return *grads, *(None if total is None or x is None else total.to(x.dtype) for total, x in others)


class _Chosen:
    """For some regions of queries of some images the regions of keys that they look at, (b, heads, r, topk)."""

    def __init__(self, call: RegionCall, images: slice, regions: slice, heads: int) -> None:
        self.regions = call.regions[images, :, regions].long().expand(-1, heads, -1, -1)
        self.weights: Tensor | None = None
        if call.weights is not None:
            self.weights = call.weights[images, :, regions].to(call.working)[..., None, None]
        rows, columns = call.kv_counts
        batch = self.regions.shape[0]
        first = torch.arange(batch * heads, device=self.regions.device).view(batch, heads, 1, 1) * (rows * columns)
        self._flat = (self.regions + first).flatten()

    def take(self, x: Tensor, weighted: bool = True) -> Tensor:
        """Of (b, heads, regions, tokens, C) the chosen regions times their weights, (b, heads, r, topk, tokens, C)."""
        found = x.flatten(0, 2).index_select(0, self._flat).view(*self.regions.shape, *x.shape[3:])
        return found if self.weights is None or not weighted else found * self.weights

    def add(self, total: Tensor, found: Tensor) -> None:
        """Add (b, heads, r, topk, tokens, C), times the weights, to the regions that they came from."""
        if self.weights is not None:
            found = found * self.weights
        total.view(-1, *total.shape[3:]).index_add_(0, self._flat, found.flatten(0, 3))


def _cut(call: RegionCall, images: slice, padding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of some images in regions, in the working dtype; with what padding has."""
    q = cut(call.q[images].to(call.working), call.region_size)
    k, v = (cut(x[images].to(call.working), call.kv_region_size) for x in (call.k, call.v))
    if call.pad_k is not None:
        k = torch.where(padding[..., None], call.pad_k.to(k.dtype)[:, None, None], k)
    if call.pad_v is not None:
        v = torch.where(padding[..., None], call.pad_v.to(v.dtype)[:, None, None], v)
    return q, k.contiguous(), v.contiguous()


def _logits(call: RegionCall, q: Tensor, k: Tensor, chosen: _Chosen, padding: Tensor) -> Tensor:
    """(b, heads, r, tokens, topk * tokens)."""
    logits = q @ k.flatten(3, 4).mT
    if call.hide_padding:
        logits.masked_fill_(padding[chosen.regions].flatten(3).unsqueeze(-2), -torch.inf)
    return logits


def _per_region(call: RegionCall) -> int:
    """Logits of one region of queries in all heads of an image."""
    size, kv_size = call.region_size, call.kv_region_size
    return call.q.shape[3] * size[0] * size[1] * call.regions.shape[3] * kv_size[0] * kv_size[1]


def _working_set(call: RegionCall) -> int:
    return _WORKING_SET_CPU if call.q.device.type == "cpu" else _WORKING_SET


def _images(call: RegionCall) -> Iterator[slice]:
    rows, columns = call.counts
    step = max(1, _working_set(call) // (_per_region(call) * rows * columns))
    for start in range(0, call.q.shape[0], step):
        yield slice(start, start + step)


def _regions(call: RegionCall) -> Iterator[slice]:
    rows, columns = call.counts
    step = max(1, _working_set(call) // _per_region(call))
    for start in range(0, rows * columns, step):
        yield slice(start, start + step)

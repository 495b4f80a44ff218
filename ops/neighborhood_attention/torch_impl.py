"""Neighborhood attention in plain PyTorch: the path of CPUs, MPS and float64.

It walks over tiles (``tiles.py``): a few neighbouring queries, and the strided slices of the map that hold the keys of
any of them. In a tile the attention is dense, with minus infinity at the pairs that do not see each other. Windows that
cover the map, or their dilation group, or stand side by side give tiles without a masked pair: no work to spare.

The backward pass walks the same tiles. With P = exp(logits - lse) and the gradients G of o and g of lse:

    dS = P (G v^T - <G, o> + g)    dq = s dS k    dk = s dS^T q    dv = P^T G    drpb = sum of dS over images and pairs

The split forms are halves of it. Logits of a tile are dense; those of the slots of a window are gathered from them, and
weights of slots are spread over the keys of a tile, by tables of the tile's pattern.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.neighborhood_attention.call import Gradients, NeighborhoodCall
from subquad.ops.neighborhood_attention.tiles import Mask, Pattern, SlotTables, Tile, get, parts, put, relative


def forward(call: NeighborhoodCall) -> tuple[Tensor, Tensor]:
    """Output (B, *S, H, E) in q's dtype and lse (B, *S, H) in the working dtype."""
    o = call.q.new_empty((*call.q.shape[:-1], call.v.shape[-1]))
    lse = call.q.new_empty(call.q.shape[:-1], dtype=call.working)
    mask = Mask(call)
    for images, tile in parts(call):
        k, v = _keys(call, images, tile), _values(call, images, tile)
        logits = _logits(_queries(call, images, tile), k, mask.of(tile.pattern))
        top = logits.amax(-1, keepdim=True)
        weights = logits.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        put(o, images, tile.queries, _by_head(_rows(weights, v) @ v, weights).div_(total))
        put(lse, images, tile.queries, (top + total.log()).squeeze(-1))
    return o, lse


def backward(call: NeighborhoodCall, grad_o: Tensor, grad_lse: Tensor, o: Tensor, lse: Tensor) -> Gradients:
    """Gradients of q, k, v, rpb and additional keys and values, in their dtypes; None for an absent argument."""
    sums = _Sums(call)
    mask = Mask(call)
    for images, tile in parts(call):
        q, k, v = _queries(call, images, tile), _keys(call, images, tile), _values(call, images, tile)
        weights = torch.exp(_logits(q, k, mask.of(tile.pattern)) - get(lse, images, tile.queries).unsqueeze(-1))
        grad = get(grad_o, images, tile.queries).to(call.working)  # (b, H, T, E)
        shift = get(grad_lse, images, tile.queries) - (grad * get(o, images, tile.queries)).sum(-1)
        grad_rows = _rows(grad, v)
        d_logits = _by_head(grad_rows @ v.mT, weights).add_(shift.unsqueeze(-1)).mul_(weights)
        sums.add_logits(images, tile, d_logits, q, k)
        sums.add_values(images, tile, _rows(weights, v).mT @ grad_rows)
    return sums.gradients()


def qk(call: NeighborhoodCall) -> Tensor:
    """Logits (B, *S, H, slots) in q's dtype; the call's values are its keys."""
    logits = call.q.new_empty((*call.q.shape[:-1], call.keys))
    mask, tables = Mask(call), SlotTables(call)
    for images, tile in parts(call):
        biased = mask.of(tile.pattern) if call.rpb is not None else None
        dense = _logits(_queries(call, images, tile), _keys(call, images, tile), biased)
        put(logits, images, tile.queries, _take(dense, tables.of(tile.pattern)[0], -torch.inf))
    return logits


def qk_backward(call: NeighborhoodCall, grad: Tensor) -> Gradients:
    """Gradients as ``backward`` gives them, without those of the values."""
    sums = _Sums(call)
    tables = SlotTables(call)
    for images, tile in parts(call):
        q, k = _queries(call, images, tile), _keys(call, images, tile)
        d_logits = _take(get(grad, images, tile.queries).to(call.working), tables.of(tile.pattern)[1], 0.0)
        sums.add_logits(images, tile, d_logits, q, k)
    return sums.gradients()


def av(call: NeighborhoodCall) -> Tensor:
    """Sums (B, *S, H, E) in the values' dtype; the call's queries are the weights (B, *S, H, slots)."""
    o = call.q.new_empty((*call.q.shape[:-1], call.v.shape[-1]))
    tables = SlotTables(call)
    for images, tile in parts(call):
        v = _values(call, images, tile)
        weights = _take(get(call.q, images, tile.queries).to(call.working), tables.of(tile.pattern)[1], 0.0)
        put(o, images, tile.queries, _by_head(_rows(weights, v) @ v, weights))
    return o


def av_backward(call: NeighborhoodCall, grad: Tensor) -> Gradients:
    """Gradients as ``backward`` gives them, that of the weights in the place of q's."""
    sums = _Sums(call)
    tables = SlotTables(call)
    for images, tile in parts(call):
        v = _values(call, images, tile)
        keys, slots = tables.of(tile.pattern)
        weights = _take(get(call.q, images, tile.queries).to(call.working), slots, 0.0)
        grad_rows = _rows(get(grad, images, tile.queries).to(call.working), v)
        put(sums.q, images, tile.queries, _take(_by_head(grad_rows @ v.mT, weights), keys, 0.0))
        sums.add_values(images, tile, _rows(weights, v).mT @ grad_rows)
    return sums.gradients()


# Of a tile: q (b, H, T, D), k (b, G, keys, D), v (b, G, keys, E), in the working dtype, with the additional tokens ---


def _queries(call: NeighborhoodCall, images: slice, tile: Tile) -> Tensor:
    """Times the scale."""
    return get(call.q, images, tile.queries).to(call.working) * call.scale


def _keys(call: NeighborhoodCall, images: slice, tile: Tile) -> Tensor:
    return _tokens(call.k, call.additional_keys, images, tile).to(call.working)


def _values(call: NeighborhoodCall, images: slice, tile: Tile) -> Tensor:
    return _tokens(call.v, call.additional_values, images, tile).to(call.working)


def _tokens(x: Tensor, additional: Tensor | None, images: slice, tile: Tile) -> Tensor:
    tokens = get(x, images, tile.keys)
    return tokens if additional is None else torch.cat([tokens, additional[images].transpose(1, 2)], dim=2)


def _rows(x: Tensor, tokens: Tensor) -> Tensor:
    """(b, H, T, ...) as (b, G, H / G T, ...), the rows that a head of tokens (b, G, ...) serves."""
    return x.unflatten(1, (tokens.shape[1], -1)).flatten(2, 3)


def _by_head(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``_rows``, with the heads and queries of ``like``."""
    return rows.unflatten(2, (-1, like.shape[2])).flatten(1, 2)


def _logits(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """(b, H, T, keys)."""
    logits = _by_head(_rows(q, k) @ k.mT, q)
    return logits if mask is None else logits.add_(mask)


def _take(x: Tensor, table: Tensor, missing: float) -> Tensor:
    """x (b, H, T, m) at the entries of a table (T, n), ``missing`` where the entry is m: (b, H, T, n)."""
    return F.pad(x, (0, 1), value=missing).gather(-1, table.expand(*x.shape[:2], -1, -1))


class _Sums:
    """Gradients of a call, summed tile by tile in the working dtype.

    Those of the bias are kept for each pattern, summed over images, and go to the table at the end.
    """

    def __init__(self, call: NeighborhoodCall) -> None:
        self._call = call
        self._sums = [None if x is None else x.new_zeros(x.shape, dtype=call.working) for x in call[:6]]
        self._pairs: dict[Pattern, Tensor] = {}

    @property
    def q(self) -> Tensor:
        assert self._sums[0] is not None
        return self._sums[0]

    def add_logits(self, images: slice, tile: Tile, d_logits: Tensor, q: Tensor, k: Tensor) -> None:
        """What gradients (b, H, T, keys) of the logits mean for q, k and the bias; the tile's q has the scale."""
        d_rows = _rows(d_logits, k)
        put(self.q, images, tile.queries, _by_head((d_rows @ k).mul_(self._call.scale), q))
        self._add_tokens(1, images, tile, d_rows.mT @ _rows(q, k))
        if self._call.rpb is not None:
            summed = d_logits[..., : math.prod(tile.key_size)].sum(0)
            earlier = self._pairs.get(tile.pattern)
            self._pairs[tile.pattern] = summed if earlier is None else earlier.add_(summed)

    def add_values(self, images: slice, tile: Tile, d_values: Tensor) -> None:
        """Gradients (b, G, keys, E) of a tile's values."""
        self._add_tokens(2, images, tile, d_values)

    def _add_tokens(self, which: int, images: slice, tile: Tile, grad: Tensor) -> None:
        grad = grad.transpose(1, 2)  # (b, keys, G, D or E)
        window = math.prod(tile.key_size)
        total, extra = self._sums[which], self._sums[which + 3]
        assert total is not None
        total[(images, *tile.keys)] += grad[:, :window].unflatten(1, tile.key_size)
        if extra is not None:
            extra[images] += grad[:, window:]

    def gradients(self) -> Gradients:
        """In the dtypes of the arguments, None for an absent one."""
        rpb = self._sums[3]
        if rpb is not None:
            for pattern, summed in self._pairs.items():
                rpb.flatten(1).index_add_(1, relative(self._call, pattern).flatten(), summed.flatten(1))
        return tuple(
            None if total is None or x is None else total.to(x.dtype)
            for total, x in zip(self._sums, self._call[:6], strict=True)
        )

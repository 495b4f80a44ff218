"""Neighborhood attention in plain PyTorch: the path of CPUs, MPS and float64.

Tiles of neighbouring queries, each with the keys that any of them sees: both are strided slices of the map, so that
nothing is gathered and no copy of the keys is larger than a tile. In a tile the attention is dense, with minus infinity
at the pairs that do not see each other. Axes are cut into tiles on their own, every dilation group apart:

    queries   p = a, .., b - 1 of a group       b - a close to K and a multiple of the stride
    keys      first(a), .., last(b - 1)         contiguous in the group, because windows move forwards with p

A window that covers the map, one that covers its dilation group and windows side by side (stride K) give tiles without
a masked pair: they are full, grid and window attention with no work to spare.

The backward pass walks the same tiles. With P = exp(logits - lse) and the gradients G of o and g of lse:

    dS = P (G v^T - <G, o> + g)    dq = s dS k    dk = s dS^T q    dv = P^T G    drpb = sum of dS over images and pairs

Sums of dS over images are kept for each pattern of relative positions, of which a map has few, and go to the table at
the end. Tiles of a pattern share their mask and bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.neighborhood_attention.call import Gradients, NeighborhoodCall

_WORKING_SET_CPU = 2**20
"""Logits of a tile in all images that are taken together: small enough for a CPU's caches."""
_WORKING_SET = 2**26
"""Likewise on any other device, where a launch must be long to be worth its overhead."""
_TILE = {1: 64, 2: 8, 3: 4}
"""Queries of a tile along an axis, unless the kernel asks for others: enough for a matrix product to be one."""


def forward(call: NeighborhoodCall) -> tuple[Tensor, Tensor]:
    """Output (B, *S, H, E) in q's dtype and lse (B, *S, H) in the working dtype."""
    o = call.q.new_empty((*call.q.shape[:-1], call.v.shape[-1]))
    lse = call.q.new_empty(call.q.shape[:-1], dtype=call.working)
    masks: dict[_Pattern, Tensor | None] = {}
    for images, tile in _parts(call):
        part = _Part.take(call, images, tile)
        logits = _logits(call, part, _mask(call, tile, masks))
        top = logits.logsumexp(-1, keepdim=True)
        values = torch.exp(logits - top).unflatten(1, (part.groups, -1)).flatten(2, 3) @ part.v
        _put(o, images, tile.queries, values.unflatten(2, (-1, top.shape[2])).flatten(1, 2))
        _put(lse, images, tile.queries, top.squeeze(-1))
    return o, lse


def backward(call: NeighborhoodCall, grad_o: Tensor, grad_lse: Tensor, o: Tensor, lse: Tensor) -> Gradients:
    """Gradients of q, k, v, rpb and additional keys and values, in their dtypes; None for an absent argument."""
    sums = [None if x is None else x.new_zeros(x.shape, dtype=call.working) for x in call[:6]]
    q, k, v, rpb, additional_keys, additional_values = sums
    assert q is not None and k is not None and v is not None
    masks: dict[_Pattern, Tensor | None] = {}
    pairs: dict[_Pattern, Tensor] = {}
    for images, tile in _parts(call):
        part = _Part.take(call, images, tile)
        weights = torch.exp(
            _logits(call, part, _mask(call, tile, masks)) - _get(lse, images, tile.queries).unsqueeze(-1)
        )
        grad = _get(grad_o, images, tile.queries).to(call.working)  # (b, H, T, E)
        shift = _get(grad_lse, images, tile.queries) - (grad * _get(o, images, tile.queries)).sum(-1)
        grad_rows = grad.unflatten(1, (part.groups, -1)).flatten(2, 3)  # (b, G, H / G T, E)
        d_logits = (grad_rows @ part.v.mT).view_as(weights).add_(shift.unsqueeze(-1)).mul_(weights)
        d_rows, weights = (x.unflatten(1, (part.groups, -1)).flatten(2, 3) for x in (d_logits, weights))
        d_q = (d_rows @ part.k).mul_(call.scale)
        _put(q, images, tile.queries, d_q.unflatten(2, (-1, grad.shape[2])).flatten(1, 2))
        window = math.prod(tile.key_size)
        for total, extra, d_keys in (
            (k, additional_keys, d_rows.mT @ part.q),  # part.q has the scale
            (v, additional_values, weights.mT @ grad_rows),
        ):
            d_keys = d_keys.transpose(1, 2)  # (b, keys, G, D or E)
            total[(images, *tile.keys)] += d_keys[:, :window].unflatten(1, tile.key_size)
            if extra is not None:
                extra[images] += d_keys[:, window:]
        if rpb is not None:
            summed = d_logits[..., :window].sum(0)
            pairs[tile.pattern] = pairs[tile.pattern].add_(summed) if tile.pattern in pairs else summed
    if rpb is not None:
        for pattern, summed in pairs.items():
            rpb.flatten(1).index_add_(1, _relative(call, pattern, rpb.device).flatten(), summed.flatten(1))
    return tuple(
        None if total is None or x is None else total.to(x.dtype) for total, x in zip(sums, call[:6], strict=True)
    )


class _Part(NamedTuple):
    """A tile of some images in the working dtype: q times the scale (b, G, H / G T, D), k and v (b, G, keys, D or E).

    The additional keys and values come behind those of the map.
    """

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def take(cls, call: NeighborhoodCall, images: slice, tile: _Tile) -> _Part:
        q = _get(call.q, images, tile.queries).to(call.working) * call.scale
        k, v = (_get(x, images, tile.keys) for x in (call.k, call.v))
        if call.additional_keys is not None and call.additional_values is not None:
            k = torch.cat([k, call.additional_keys[images].transpose(1, 2)], dim=2)
            v = torch.cat([v, call.additional_values[images].transpose(1, 2)], dim=2)
        return cls(q.unflatten(1, (k.shape[1], -1)).flatten(2, 3), k.to(call.working), v.to(call.working))

    @property
    def groups(self) -> int:
        return self.k.shape[1]


def _logits(call: NeighborhoodCall, part: _Part, mask: Tensor | None) -> Tensor:
    """(b, H, T, keys)."""
    heads = call.q.shape[-2]
    logits = (part.q @ part.k.mT).unflatten(2, (heads // part.groups, -1)).flatten(1, 2)
    return logits if mask is None else logits.add_(mask)


def _get(x: Tensor, images: slice, where: tuple[slice, ...]) -> Tensor:
    """A tile of (B, *S, H, ...) as (b, H, tokens, ...)."""
    axes = len(where)
    return x[(images, *where)].flatten(1, axes).transpose(1, 2)


def _put(x: Tensor, images: slice, where: tuple[slice, ...], value: Tensor) -> None:
    """The inverse of ``_get``."""
    target = x[(images, *where)]
    target.copy_(value.transpose(1, 2).reshape(target.shape))


# Tiles -----------------------------------------------------------------------------------------------------------


class _Span(NamedTuple):
    """Queries and keys of a tile on one axis.

    Attributes:
        queries, keys: positions on the axis; the step is the dilation.
        ahead: place of the first query among the keys, in steps.
        windows: for each query the first key that it sees and the one behind the last.
    """

    queries: slice
    keys: slice
    ahead: int
    windows: tuple[tuple[int, int], ...]
    key_count: int


_Pattern = tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]


class _Tile(NamedTuple):
    """Spans of all axes; tiles of one ``pattern`` have the same mask and bias."""

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]
    key_size: tuple[int, ...]
    pattern: _Pattern

    @classmethod
    def of(cls, spans: Sequence[_Span]) -> _Tile:
        queries, keys, ahead, windows, key_size = zip(*spans, strict=True)
        return cls(queries, keys, key_size, tuple(zip(ahead, key_size, windows, strict=True)))


def _parts(call: NeighborhoodCall) -> Iterator[tuple[slice, _Tile]]:
    """Every tile of every image, some images at a time."""
    axes = zip(call.size, call.kernel_size, call.dilation, call.stride, call.is_causal, strict=True)
    spans = [_spans(*axis, _TILE[len(call.size)]) for axis in axes]
    working_set = _WORKING_SET_CPU if call.q.device.type == "cpu" else _WORKING_SET
    batch, heads = call.q.shape[0], call.q.shape[-2]
    for tile in map(_Tile.of, product(*spans)):
        queries = math.prod(len(windows) for _, _, windows in tile.pattern)
        keys = math.prod(tile.key_size) + call.keys - math.prod(call.kernel_size)
        images = max(1, working_set // (heads * queries * keys))
        for start in range(0, batch, images):
            yield slice(start, min(start + images, batch)), tile


@lru_cache(maxsize=256)
def _spans(length: int, kernel_size: int, dilation: int, stride: int, causal: bool, target: int) -> tuple[_Span, ...]:
    """The tiles of one axis."""
    wanted = kernel_size if 2 * kernel_size >= target else target
    spans = []
    for group in range(dilation):
        tokens = (length - group + dilation - 1) // dilation
        tiles = max(1, round(tokens / wanted))
        step = -(-tokens // tiles)
        step += -step % stride
        for a in range(0, tokens, step):
            b = min(a + step, tokens)
            seen = [_window(p, tokens, kernel_size, stride, causal) for p in range(a, b)]
            begin, end = seen[0][0], seen[-1][1]
            spans.append(
                _Span(
                    slice(group + dilation * a, group + dilation * (b - 1) + 1, dilation),
                    slice(group + dilation * begin, group + dilation * (end - 1) + 1, dilation),
                    a - begin,
                    tuple((first - begin, behind - begin) for first, behind in seen),
                    end - begin,
                )
            )
    return tuple(spans)


def _window(p: int, tokens: int, kernel_size: int, stride: int, causal: bool) -> tuple[int, int]:
    """First key that token p of a group sees, and the one behind the last."""
    leader = min(p // stride * stride + (stride - 1 if causal else stride // 2), tokens - 1)
    if causal:
        return max(leader - kernel_size + 1, 0), p + 1
    first = min(max(leader - kernel_size // 2, 0), tokens - kernel_size)
    return first, first + kernel_size


def _mask(call: NeighborhoodCall, tile: _Tile, masks: dict[_Pattern, Tensor | None]) -> Tensor | None:
    """What the tile's logits get added, (H or 1, T, keys): the bias and minus infinity; None for nothing."""
    if tile.pattern not in masks:
        masks[tile.pattern] = _new_mask(call, tile.pattern)
    return masks[tile.pattern]


def _new_mask(call: NeighborhoodCall, pattern: _Pattern) -> Tensor | None:
    device = call.q.device
    hidden: Tensor | None = None
    for axis, (_, keys, windows) in enumerate(pattern):
        first, behind = torch.tensor(windows, device=device).unsqueeze(-1).unbind(1)  # each (t, 1)
        place = torch.arange(keys, device=device)
        outside = _spread((place < first) | (place >= behind), axis, len(pattern))
        hidden = outside if hidden is None else hidden | outside
    assert hidden is not None
    if call.rpb is None and not hidden.any():
        return None
    hidden = _fold(hidden)
    if call.rpb is None:
        mask = torch.zeros((1, *hidden.shape), dtype=call.working, device=device)
    else:
        mask = call.rpb.to(call.working).flatten(1)[:, _relative(call, pattern, device)]
    mask = mask.masked_fill(hidden, -torch.inf)
    if call.additional_keys is not None:
        mask = torch.cat([mask, mask.new_zeros((*mask.shape[:2], call.additional_keys.shape[1]))], dim=2)
    return mask


def _relative(call: NeighborhoodCall, pattern: _Pattern, device: torch.device) -> Tensor:
    """Entry of the flattened bias table for each pair of a pattern, (T, keys); any entry for a pair that is masked."""
    total: Tensor | None = None
    for axis, ((ahead, keys, windows), kernel_size) in enumerate(zip(pattern, call.kernel_size, strict=True)):
        p = torch.arange(ahead, ahead + len(windows), device=device)
        entry = (torch.arange(keys, device=device) - p[:, None] + kernel_size - 1).clamp(0, 2 * kernel_size - 2)
        entry = _spread(entry, axis, len(pattern))
        total = entry if total is None else total * (2 * kernel_size - 1) + entry
    assert total is not None
    return _fold(total)


def _spread(table: Tensor, axis: int, axes: int) -> Tensor:
    """A table (t, keys) of one axis for broadcasting to (t_0, t_1, .., keys_0, keys_1, ..)."""
    shape = [1] * (2 * axes)
    shape[axis], shape[axes + axis] = table.shape
    return table.view(shape)


def _fold(table: Tensor) -> Tensor:
    """(t_0, t_1, .., keys_0, keys_1, ..) to (T, keys)."""
    axes = table.dim() // 2
    return table.flatten(axes).flatten(0, axes - 1)

"""Tiles of a map for the PyTorch paths: neighbouring queries and the keys that any of them sees.

Both are strided slices of the map, so that nothing is gathered and no copy of the keys is larger than a tile. Axes are
cut into tiles on their own, every dilation group apart:

    queries   p = a, .., b - 1 of a group       b - a close to K and a multiple of the stride
    keys      first(a), .., last(b - 1)         contiguous in the group, because windows move forwards with p

Tiles with the same relative positions of queries, keys and windows are of one pattern, of which a map has few: they
share their mask, their bias and their tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.neighborhood_attention.call import NeighborhoodCall

_WORKING_SET_CPU = 2**20
"""Logits of a tile in all images that are taken together: small enough for a CPU's caches."""
_WORKING_SET = 2**26
"""Likewise on any other device, where a launch must be long to be worth its overhead."""
_TILE = {1: 64, 2: 8, 3: 4}
"""Queries of a tile along an axis, unless the kernel asks for others: enough for a matrix product to be one."""


class Span(NamedTuple):
    """Queries and keys of a tile on one axis.

    Attributes:
        queries, keys: positions on the axis; the step is the dilation.
        ahead: place of the first query among the keys, in steps.
        windows: for each query the first key that it sees and the one behind the last.
        key_count: number of keys.
    """

    queries: slice
    keys: slice
    ahead: int
    windows: tuple[tuple[int, int], ...]
    key_count: int


Pattern = tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]
"""For each axis ``ahead``, ``key_count`` and ``windows`` of a span."""


class Tile(NamedTuple):
    """Spans of all axes; tiles of one ``pattern`` have the same mask and bias."""

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]
    key_size: tuple[int, ...]
    pattern: Pattern

    @classmethod
    def of(cls, spans: Sequence[Span]) -> Tile:
        """The tile of one span an axis."""
        queries, keys, ahead, windows, key_size = zip(*spans, strict=True)
        return cls(queries, keys, key_size, tuple(zip(ahead, key_size, windows, strict=True)))


def parts(call: NeighborhoodCall) -> Iterator[tuple[slice, Tile]]:
    """Every tile of every image, some images at a time."""
    axes = zip(call.size, call.kernel_size, call.dilation, call.stride, call.is_causal, strict=True)
    spans = [_spans(*axis, _TILE[len(call.size)]) for axis in axes]
    working_set = _WORKING_SET_CPU if call.q.device.type == "cpu" else _WORKING_SET
    batch, heads = call.q.shape[0], call.q.shape[-2]
    for tile in map(Tile.of, product(*spans)):
        queries = math.prod(len(windows) for _, _, windows in tile.pattern)
        keys = math.prod(tile.key_size) + call.extra
        images = max(1, working_set // (heads * queries * keys))
        for start in range(0, batch, images):
            yield slice(start, min(start + images, batch)), tile


def get(x: Tensor, images: slice, where: tuple[slice, ...]) -> Tensor:
    """A tile of (B, *S, H, ...) as (b, H, tokens, ...)."""
    axes = len(where)
    return x[(images, *where)].flatten(1, axes).transpose(1, 2)


def put(x: Tensor, images: slice, where: tuple[slice, ...], value: Tensor) -> None:
    """The inverse of ``get``."""
    target = x[(images, *where)]
    target.copy_(value.transpose(1, 2).reshape(target.shape))


@lru_cache(maxsize=256)
def _spans(length: int, kernel_size: int, dilation: int, stride: int, causal: bool, target: int) -> tuple[Span, ...]:
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
                Span(
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


# Tables of a pattern ---------------------------------------------------------------------------------------------


class Mask:
    """What the logits of a call's tiles get added, made once a pattern."""

    def __init__(self, call: NeighborhoodCall) -> None:
        self._call = call
        self._made: dict[Pattern, Tensor | None] = {}

    def of(self, pattern: Pattern) -> Tensor | None:
        """(H or 1, T, keys and additional ones): the bias, and minus infinity out of sight; None for nothing."""
        if pattern not in self._made:
            self._made[pattern] = _mask(self._call, pattern)
        return self._made[pattern]


def _mask(call: NeighborhoodCall, pattern: Pattern) -> Tensor | None:
    device = call.q.device
    hidden: Tensor | None = None
    for axis, (_, keys, windows) in enumerate(pattern):
        slot = _slot_of_key(keys, windows, device)
        outside = _spread(slot < 0, axis, len(pattern))
        hidden = outside if hidden is None else hidden | outside
    assert hidden is not None
    if call.rpb is None and not hidden.any():
        return None
    hidden = _fold(hidden)
    if call.rpb is None:
        mask = torch.zeros((1, *hidden.shape), dtype=call.working, device=device)
    else:
        mask = call.rpb.to(call.working).flatten(1)[:, relative(call, pattern)]
    mask = mask.masked_fill(hidden, -torch.inf)
    if call.extra:
        mask = torch.cat([mask, mask.new_zeros((*mask.shape[:2], call.extra))], dim=2)
    return mask


def relative(call: NeighborhoodCall, pattern: Pattern) -> Tensor:
    """Entry of the flattened bias table for each pair of a pattern, (T, keys); any entry for a pair that is masked."""
    entries = []
    for (ahead, keys, windows), kernel_size in zip(pattern, call.kernel_size, strict=True):
        p = torch.arange(ahead, ahead + len(windows), device=call.q.device)
        entry = torch.arange(keys, device=call.q.device) - p[:, None] + kernel_size - 1
        entries.append(entry.clamp(0, 2 * kernel_size - 2))
    return _ravel(entries, [2 * kernel_size - 1 for kernel_size in call.kernel_size])


class SlotTables:
    """Where keys of a call's tiles stand in the windows, and the converse, made once a pattern.

    A window has slots for its keys, row by row, and behind them for the additional ones: of these, as of the keys of a
    tile, there are ``extra``. Entries without a counterpart say one more than there are.
    """

    def __init__(self, call: NeighborhoodCall) -> None:
        self._call = call
        self._made: dict[Pattern, tuple[Tensor, Tensor]] = {}

    def of(self, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """For each query of a tile the key in each slot, (T, slots), and the slot of each key, (T, keys)."""
        if pattern not in self._made:
            self._made[pattern] = self._make(pattern)
        return self._made[pattern]

    def _make(self, pattern: Pattern) -> tuple[Tensor, Tensor]:
        device = self._call.q.device
        kernel_size, key_size = self._call.kernel_size, [keys for _, keys, _ in pattern]
        keys = [_key_of_slot(size, windows, device) for size, (_, _, windows) in zip(kernel_size, pattern, strict=True)]
        slots = [_slot_of_key(keys, windows, device) for _, keys, windows in pattern]
        return self._complete(keys, key_size), self._complete(slots, kernel_size)

    def _complete(self, entries: list[Tensor], sizes: Sequence[int]) -> Tensor:
        """The table of a map from those of its axes, in which -1 is nothing."""
        extra, count = self._call.extra, math.prod(sizes)
        missing = _ravel([(entry < 0).long() for entry in entries], [2] * len(entries)) > 0
        table = _ravel(entries, sizes).masked_fill(missing, count + extra)
        behind = torch.arange(count, count + extra, device=table.device)
        return torch.cat([table, behind.expand(len(table), -1)], dim=1)


def _slot_of_key(keys: int, windows: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Place of each key in each query's window on an axis, (t, keys); -1 for a key out of sight."""
    first, behind = torch.tensor(windows, device=device).unsqueeze(-1).unbind(1)  # each (t, 1)
    place = torch.arange(keys, device=device)
    return torch.where((place < first) | (place >= behind), -1, place - first)


def _key_of_slot(kernel_size: int, windows: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Key in each slot of each query's window on an axis, (t, K); -1 for a slot that causality leaves empty."""
    first, behind = torch.tensor(windows, device=device).unsqueeze(-1).unbind(1)  # each (t, 1)
    key = first + torch.arange(kernel_size, device=device)
    return torch.where(key >= behind, -1, key)


def _ravel(tables: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Tables (t_i, n_i) of entries below sizes_i to one of row-major entries, (T, N), for each pair of axes."""
    total = _spread(tables[0], 0, len(tables))
    for axis, (table, size) in enumerate(zip(tables[1:], sizes[1:], strict=True), start=1):
        total = total * size + _spread(table, axis, len(tables))
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

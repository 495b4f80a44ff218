"""Window attention in plain PyTorch: the path of CPUs, MPS and float64.

Rows of windows, some at a time, are gathered from where their tokens lie on the map: an index table takes the place of
roll, padding and partition. The backward pass gathers them again: with P = exp(logits - lse) and the gradient G of o

    dS = P (G v^T - <G, o>)    dq = s dS k    dk = s dS^T q    dv = P^T G    dtable = sum of dS over images and windows

so that nothing of the size of the logits is kept. Every token lies in one window: gradients are written, not added.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.window_attention.call import Gradients, WindowCall, relative_positions

_WORKING_SET_CPU = 2**20
"""Logits that are taken together: small enough for a CPU's caches."""
_WORKING_SET = 2**26
"""Likewise on any other device, where a launch must be long to be worth its overhead."""


def forward(call: WindowCall) -> tuple[Tensor, Tensor]:
    """Output (B, H, W, heads, E) in q's dtype and lse (B, H, W, heads) in the working dtype."""
    q, k, v = call.parts
    o = v.new_empty(v.shape)
    lse = q.new_empty(q.shape[:-1], dtype=call.working)
    bias = _bias(call)
    for images, windows in _windows(call):
        logits = _logits(call, windows, _get(call, q, images, windows), _keys(call, k, images, windows), bias)
        top = logits.logsumexp(-1, keepdim=True)
        _put(o, images, windows, _exp_(logits.sub_(top)) @ _values(call, v, images, windows))
        _put(lse.unsqueeze(-1), images, windows, top)
    return o, lse


def backward(call: WindowCall, grad_o: Tensor, o: Tensor, lse: Tensor) -> Gradients:
    """Gradients of q, k, v, table, pad_k and pad_v, in their dtypes; None for an absent argument."""
    q, k, v = call.parts
    grad = call._replace(
        q=torch.empty_like(call.q, memory_format=torch.contiguous_format),
        k=None if call.k is None else torch.empty_like(call.k, memory_format=torch.contiguous_format),
        v=None if call.v is None else torch.empty_like(call.v, memory_format=torch.contiguous_format),
    )
    grad_q, grad_k, grad_v = grad.parts
    pad_k, pad_v = (
        None if pad is None else pad.new_zeros(pad.shape, dtype=call.working) for pad in (call.pad_k, call.pad_v)
    )
    bias = _bias(call)
    pairs = None if bias is None else torch.zeros_like(bias)
    for images, windows in _windows(call):
        part_q = _get(call, q, images, windows)
        part_k, part_v = _keys(call, k, images, windows), _values(call, v, images, windows)
        part_grad = _get(call, grad_o, images, windows)
        delta = (part_grad * _get(call, o, images, windows)).sum(-1, keepdim=True)
        top = _get(call, lse.unsqueeze(-1), images, windows)
        weights = _exp_(_logits(call, windows, part_q, part_k, bias).sub_(top))
        if windows.any_padding:  # queries of padding have no lse nor gradient of their own
            weights.masked_fill_(windows.padding[:, None, :, None], 0.0)
        d_logits = (part_grad @ part_v.mT).sub_(delta).mul_(weights)
        _put(grad_q, images, windows, (d_logits @ part_k).mul_(call.scale))
        for target, total, found in (
            (grad_k, pad_k, (d_logits.mT @ part_q).mul_(call.scale)),
            (grad_v, pad_v, weights.mT @ part_grad),
        ):
            _put(target, images, windows, found)
            if total is not None and windows.any_padding:
                total += found.transpose(2, 3)[:, windows.padding].sum((0, 1))
        if pairs is not None:
            pairs += d_logits.sum((0, 1))
    table = None
    if call.table is not None and pairs is not None:
        table = pairs.new_zeros(call.table.shape)
        table = table.index_add_(0, relative_positions(call).flatten(), pairs.flatten(1).mT).to(call.table.dtype)
    return (
        grad.q,
        grad.k,
        grad.v,
        table,
        None if pad_k is None or call.pad_k is None else pad_k.to(call.pad_k.dtype),
        None if pad_v is None or call.pad_v is None else pad_v.to(call.pad_v.dtype),
    )


# Windows ---------------------------------------------------------------------------------------------------------


class _Windows(NamedTuple):
    """Some windows of a map.

    Attributes:
        places: where on the flattened map each token lies, (windows, tokens); 0 for padding.
        padding, any_padding: whether a token is padding, (windows, tokens), and whether one is.
        regions: numbers of regions that do not see each other, (windows, tokens), or None if there is one only.
        pixels: of the map.
    """

    places: Tensor
    padding: Tensor
    any_padding: bool
    regions: Tensor | None
    pixels: int

    def rows(self, places: Tensor, images: int) -> Tensor:
        """Places in several images, whose pixels are counted one image after another."""
        first = torch.arange(images, device=places.device) * self.pixels
        return (first[:, None] + places.flatten()).flatten()


def _windows(call: WindowCall) -> Iterator[tuple[slice, _Windows]]:
    """Rows of windows of every image, some at a time."""
    width = call.q.shape[2]
    rows, columns = (_axis(call, axis) for axis in range(2))
    places = rows.source[:, None, :, None] * width + columns.source[None, :, None, :]
    padding = rows.padding[:, None, :, None] | columns.padding[None, :, None, :]
    regions = 3 * rows.region[:, None, :, None] + columns.region[None, :, None, :] if any(call.shift) else None
    working_set = _WORKING_SET_CPU if call.q.device.type == "cpu" else _WORKING_SET
    batch, heads = call.q.shape[0], call.q.shape[-2]
    logits = places.shape[1] * heads * call.tokens**2  # of a row of windows
    step = max(1, working_set // logits)
    images = max(1, working_set // (logits * min(step, len(places))))
    for first in range(0, len(places), step):
        taken = slice(first, first + step)
        outside = padding[taken].flatten(2).flatten(0, 1)
        windows = _Windows(
            places[taken].flatten(2).flatten(0, 1),
            outside,
            bool(outside.any()),
            None if regions is None else regions[taken].flatten(2).flatten(0, 1),
            call.q.shape[1] * width,
        )
        for start in range(0, batch, images):
            yield slice(start, min(start + images, batch)), windows


class _Axis(NamedTuple):
    """For each window of an axis and each of its places: position on the map (0 for padding), padding, region."""

    source: Tensor
    padding: Tensor
    region: Tensor


def _axis(call: WindowCall, axis: int) -> _Axis:
    length, window, shift = call.q.shape[1 + axis], call.window[axis], call.shift[axis]
    count = call.counts[axis]
    size = count * window
    p = torch.arange(size, device=call.q.device)
    p = p.view(window, count).mT if call.grid else p.view(count, window)
    if call.pad_first:
        source = (p + shift) % size
        padding = source >= length
    else:
        source = (p + shift) % length
        padding = p >= length
    region = (p >= size - window).long() + (p >= size - shift) if shift else torch.zeros_like(p)
    return _Axis(source.masked_fill(padding, 0), padding, region)


def _get(call: WindowCall, x: Tensor, images: slice, windows: _Windows) -> Tensor:
    """Tokens of (B, H, W, heads, channels) in the working dtype, (b, windows, heads, tokens, channels)."""
    rows = x[images].flatten(0, 2).flatten(1)  # views, where x is one of a projection
    found = rows.index_select(0, windows.rows(windows.places, len(x[images])))
    return found.view(-1, *windows.places.shape, *x.shape[3:]).transpose(2, 3).to(call.working)


def _keys(call: WindowCall, k: Tensor, images: slice, windows: _Windows) -> Tensor:
    return _with_padding(_get(call, k, images, windows), call.pad_k, windows)


def _values(call: WindowCall, v: Tensor, images: slice, windows: _Windows) -> Tensor:
    return _with_padding(_get(call, v, images, windows), call.pad_v, windows)


def _with_padding(x: Tensor, pad: Tensor | None, windows: _Windows) -> Tensor:
    """(b, windows, heads, tokens, channels) with what padding has, zeros if ``pad`` is None."""
    if not windows.any_padding:
        return x
    value = x.new_zeros(()) if pad is None else pad.to(x.dtype).unsqueeze(1)
    return torch.where(windows.padding[:, None, :, None], value, x)


def _put(x: Tensor, images: slice, windows: _Windows, value: Tensor) -> None:
    """The inverse of ``_get``, without the padding."""
    part, value = x[images], value.transpose(2, 3).to(x.dtype).flatten(3)  # (b, windows, tokens, heads * channels)
    places = windows.places
    if windows.any_padding:
        real = ~windows.padding
        places, value = places[real], value[:, real]
    part.flatten(0, 2).flatten(1).index_copy_(0, windows.rows(places, len(part)), value.reshape(-1, value.shape[-1]))


def _exp_(logits: Tensor) -> Tensor:
    """exp in place, of logits that are not positive."""
    if logits.dtype == torch.float32:
        # What a mask of -100 leaves is a number below float32's normal ones, with which a CPU is ten times as slow.
        torch.threshold_(logits, -87.0, -torch.inf)
    return logits.exp_()


def _bias(call: WindowCall) -> Tensor | None:
    """(heads, tokens, tokens)."""
    if call.table is None:
        return None
    return call.table.to(call.working)[relative_positions(call)].permute(2, 0, 1).contiguous()


def _logits(call: WindowCall, windows: _Windows, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """(b, windows, heads, tokens, tokens)."""
    logits = (q * call.scale) @ k.mT
    if bias is not None:
        logits += bias
    if windows.regions is not None:
        apart = windows.regions[:, :, None] != windows.regions[:, None, :]
        if apart.any():
            logits += torch.where(apart, call.mask_value, 0.0).to(logits.dtype).unsqueeze(1)
    if call.hide_padding and windows.any_padding:
        hidden = windows.padding[:, None, :] & ~windows.padding[:, :, None]
        logits.masked_fill_(hidden.unsqueeze(1), -torch.inf)
    return logits

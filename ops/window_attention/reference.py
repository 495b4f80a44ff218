"""Window attention step by step: roll, pad, cut into windows, attend in each, and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.window_attention.call import WindowCall, relative_positions


def attend(call: WindowCall) -> tuple[Tensor, Tensor]:
    """Output (B, H, W, heads, E) in q's dtype and lse (B, H, W, heads) in the working dtype."""
    q, k, v = (x.to(call.working) for x in call.parts)
    height, width = q.shape[1:3]
    padding = _roll_and_pad(call, q.new_zeros(1, height, width, 1, 1), 1.0)  # (1, H', W', 1, 1)
    q, k, v = (_roll_and_pad(call, x, 0.0) for x in (q, k, v))
    if call.pad_k is not None:
        k = k + padding * call.pad_k.to(call.working)
    if call.pad_v is not None:
        v = v + padding * call.pad_v.to(call.working)
    q, k, v, padding = (_windows(call, x) for x in (q, k, v, padding))  # (B, windows, heads, tokens, channels)

    logits = call.scale * q @ k.mT
    if call.table is not None:
        logits = logits + call.table.to(call.working)[relative_positions(call)].permute(2, 0, 1)
    if any(call.shift):
        regions = _windows(call, _regions(call, *call.counts).to(logits.dtype))  # (1, windows, 1, tokens, 1)
        logits = torch.where(regions == regions.mT, logits, logits + call.mask_value)
    if call.hide_padding:
        # Queries of padding see it, so that every query has a key; they are cut off below.
        logits = logits.masked_fill((padding.mT > 0) & (padding == 0), -torch.inf)
    lse = logits.logsumexp(-1, keepdim=True)
    o = torch.exp(logits - lse) @ v
    o, lse = (_crop_and_roll(call, _map(call, x), height, width) for x in (o, lse))
    return o.to(call.q.dtype), lse.squeeze(-1)


def _roll_and_pad(call: WindowCall, x: Tensor, value: float) -> Tensor:
    """A map (B, H, W, ...) on the padded grid of windows."""
    bottom, right = (n * w - size for n, w, size in zip(call.counts, call.window, x.shape[1:3], strict=True))
    if not call.pad_first:
        x = _roll_back(call, x)
    x = F.pad(x, (0, 0, 0, 0, 0, right, 0, bottom), value=value)
    return _roll_back(call, x) if call.pad_first else x


def _crop_and_roll(call: WindowCall, x: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``_roll_and_pad``."""
    for axis, (steps, size) in enumerate(zip(call.steps, (height, width), strict=True), start=1):
        # A selection, not a slice: a slice's strides depend on whether there was padding, which an export would keep.
        p = torch.arange(size, device=x.device) - steps
        x = x.index_select(axis, _wrapped(p, x.shape[axis] if call.pad_first else size))
    return x


def _roll_back(call: WindowCall, x: Tensor) -> Tensor:
    """``torch.roll`` over the map's axes, as a selection: exporters know that for every size."""
    for axis, (shift, steps, size) in enumerate(zip(call.shift, call.steps, x.shape[1:3], strict=True), start=1):
        if shift:  # steps may be symbolic
            x = x.index_select(axis, _wrapped(torch.arange(size, device=x.device) + steps, size))
    return x


def _wrapped(p: Tensor, size: int) -> Tensor:
    """Positions modulo a size, as a tensor: by a number that depends on the image ONNX has no remainder."""
    return p.remainder(torch.full((), size, device=p.device))


def _windows(call: WindowCall, x: Tensor) -> Tensor:
    """(B, H', W', heads, channels) to (B, windows, heads, tokens, channels)."""
    (rows, columns), (height, width) = call.counts, call.window
    if call.grid:
        x = x.unflatten(2, (width, columns)).unflatten(1, (height, rows)).permute(0, 2, 4, 5, 1, 3, 6)
    else:
        x = x.unflatten(2, (columns, width)).unflatten(1, (rows, height)).permute(0, 1, 3, 5, 2, 4, 6)
    return x.flatten(4, 5).flatten(1, 2)


def _map(call: WindowCall, x: Tensor) -> Tensor:
    """The inverse of ``_windows``."""
    (rows, columns), (height, width) = call.counts, call.window
    x = x.unflatten(3, (height, width)).unflatten(1, (rows, columns))  # (B, rows, columns, heads, h, w, channels)
    x = x.permute(0, 4, 1, 5, 2, 3, 6) if call.grid else x.permute(0, 1, 4, 2, 5, 3, 6)
    return x.flatten(3, 4).flatten(1, 2)


def _regions(call: WindowCall, rows: int, columns: int) -> Tensor:
    """For each place of the padded map the part of the unrolled map that it comes from, (1, H', W', 1, 1)."""
    total: Tensor | None = None
    axes = zip((rows, columns), call.window, call.shift, call.steps, strict=True)
    for axis, (count, window, shift, steps) in enumerate(axes):
        p = torch.arange(count * window, device=call.q.device)
        size = count * window
        region = (p >= size - window).long() + (p >= size - steps) if shift else torch.zeros_like(p)
        region = region[:, None] if axis == 0 else region
        total = region if total is None else 3 * total + region
    assert total is not None
    return total[None, :, :, None, None]

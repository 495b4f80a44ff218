"""The selective scan in operators that every exporter knows, in place of ``subquad::selective_scan``.

Two levels, no Python loop over pixels and no guard on a size. Routes are cut into spans of ``SPAN`` steps, and three
``scan`` operators (an ONNX ``Scan`` each) follow one another:

1. ``SPAN`` steps through all spans of all routes at once, from a zero state: S, the state with which a span ends;
2. a step for each span hands the states on: a span entered with h ends with exp(A sum_t d_t) h + S;
3. ``SPAN`` steps through all spans again, now from the right states, for y.

No state but those at the ends of spans is stored: decays and inputs of the recurrence are made within a step. A route's
path is padded to whole spans with steps of size 0, which leave a state as it is. Inside, the layout is
(SPAN, K, spans, B, ...), so that a step reads contiguous slices; routes are gathered.

While an export is traced, sizes are symbols with example values, and broadcasting takes a symbol whose example is 1 for
the number 1. So there is always one span more than needed, and examples should have a batch of two or more. Shapes are
written out from the arguments' sizes rather than read from results.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from subquad.ops._loop import scan
from subquad.ops.selective_scan.call import CHUNK, ScanCall
from subquad.ops.selective_scan.gate import gated
from subquad.ops.selective_scan.routes import REVERSED, route_order

SPAN = 32
"""Steps walked at once; a divisor of CHUNK. Longer spans pad small maps more, shorter ones hand over more often."""


def export_form(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Same arguments and results as the operator ``subquad::selective_scan``: merged output (B, H, W, E), states, and
    the kept sum.

    Made for ``ExportedProgram.run_decompositions({torch.ops.subquad.selective_scan.default: export_form})``; batch,
    height and width may be symbolic. Computes in float32 (float64 for float64 inputs).
    """
    call = ScanCall(*args)
    batch, height, width, dim = call.x.shape
    routes = len(call.routes)
    length = height * width
    spans = (length + 2 * SPAN - 1) // SPAN
    layout = (SPAN, routes, spans, batch)
    working = torch.float64 if call.x.dtype == torch.float64 else torch.float32
    walk = _walk(call, length, spans, working)

    x = call.x.reshape(batch, length, dim).transpose(0, 1).to(working)  # (L, B, E)
    u = x.index_select(0, walk.pixels).reshape(*layout, 1, dim)
    delta = _step_sizes(call, walk, layout, working)  # (SPAN, K, spans, B, 1, E)
    A = call.A[:, None, None].transpose(3, 4).to(working)  # (K, 1, 1, N, E)
    B, C = (_per_channel(values, walk, layout, dim).to(working) for values in (call.B, call.C))

    start = call.x.new_zeros(routes, batch, call.A.shape[-1], dim, dtype=working)
    if call.initial_state is not None:
        start = call.initial_state.permute(1, 0, 3, 2).to(working)
    enter, last = _enter(delta, delta * u, B, A, start)  # (K, spans, B, N, E), (K, B, N, E)
    y = _within(delta, delta * u, B, C, A, enter)  # (SPAN, K, spans, B, E)

    y = y.reshape(SPAN * routes * spans, batch, dim).index_select(0, walk.visits)
    y = y.reshape(routes, length, batch, dim).sum(0)  # (L, B, E)
    if call.D is not None:
        y = y + call.D.to(working).sum(0) * x
    y, kept = gated(call, y.transpose(0, 1).reshape(batch, height, width, dim))
    return y, _states(call, enter, last, spans), kept


class _Walk(NamedTuple):
    """Addresses of the routes' steps.

    Attributes:
        pixels: (SPAN * K * spans), the pixel that a step visits; pixel 0 for padding.
        entries: (SPAN * K * spans), pixel * K + route of a step.
        visits: (K * L), the step with which a route visits a pixel.
        mask: (SPAN, K, spans), 1 for a step, 0 for padding.
    """

    pixels: Tensor
    entries: Tensor
    visits: Tensor
    mask: Tensor


def _walk(call: ScanCall, length: int, spans: int, working: torch.dtype) -> _Walk:
    _, height, width, _ = call.x.shape
    device = call.x.device
    routes = len(call.routes)
    k = torch.arange(routes, device=device)[:, None]
    steps = SPAN * routes * spans

    # Position in the padded path, (SPAN, K, spans). A path turns round with its padding: a span keeps its pixels.
    forwards = torch.arange(SPAN, device=device)[:, None, None] + torch.arange(spans, device=device) * SPAN
    backwards = SPAN * spans - 1 - forwards
    position = torch.cat([backwards if code & REVERSED else forwards for code in call.routes], dim=1)
    inside = position < length

    tables = [None] * routes if call.table is None else call.table.unbind()
    paths = [route_order(code & ~REVERSED, height, width, tables[i], device) for i, code in enumerate(call.routes)]
    address = torch.where(inside, position, 0) + k * length
    pixels = torch.cat(paths).index_select(0, address.reshape(steps)).reshape(SPAN, routes, spans)
    # The inverse of pixels; padding goes to a last place that is dropped.
    target = torch.where(inside, pixels + k * length, routes * length).reshape(steps)
    visits = torch.zeros(routes * length + 1, dtype=torch.int64, device=device)
    visits = visits.scatter(0, target, torch.arange(steps, device=device))[: routes * length]
    return _Walk(pixels.reshape(steps), (pixels * routes + k).reshape(steps), visits, inside.to(working))


def _along_routes(values: Tensor, walk: _Walk) -> Tensor:
    """(B, H, W, K, ...) -> (SPAN * K * spans, B, ...): for each step of route k the value of route k at its pixel."""
    batch, height, width, routes, *rest = values.shape
    by_entry = values.reshape(batch, height * width * routes, *rest).transpose(0, 1)
    return by_entry.index_select(0, walk.entries)


def _per_channel(values: Tensor, walk: _Walk, layout: tuple[int, ...], dim: int) -> Tensor:
    """B or C along the routes, (B, H, W, K, G, N) -> (SPAN, K, spans, B, N, E), or 1 in place of E for one group."""
    groups, state = values.shape[4:]
    along = _along_routes(values, walk).reshape(*layout, groups, state).transpose(-1, -2)
    return along if groups == 1 else along.repeat_interleave(dim // groups, dim=-1)


def _step_sizes(call: ScanCall, walk: _Walk, layout: tuple[int, ...], working: torch.dtype) -> Tensor:
    """d_t along the routes, (SPAN, K, spans, B, 1, E); 0 for padding."""
    _, routes, spans, batch = layout
    dim, rank = call.x.shape[-1], call.dt.shape[-1]
    delta = _along_routes(call.dt, walk).to(working)
    if call.dt_weight is not None:
        delta = delta.reshape(SPAN, routes, spans * batch, rank) @ call.dt_weight.to(working).transpose(1, 2)
    delta = delta.reshape(*layout, dim)
    if call.dt_bias is not None:
        delta = delta + call.dt_bias[:, None, None].to(working)
    if call.dt_softplus:
        delta = _softplus(delta)
    return (delta * walk.mask[..., None, None]).unsqueeze(-2)


def _softplus(s: Tensor) -> Tensor:
    """log(1 + exp(s)), in float32 equal to s above 20.

    max(s, 0) + log1p(exp(-|s|)) out of operators that runtimes vectorise; they have no log1p, and one softplus value at
    a time took most of the scan's time. log1p(e) = log(w) e / (w - 1) with w = 1 + e as rounded, or e where w is 1.
    """
    e = torch.exp(-s.abs())
    w = 1 + e
    return s.clamp(min=0) + torch.where(w == 1, e, torch.log(w) * (e / (w - 1)))


def _enter(delta: Tensor, du: Tensor, B: Tensor, A: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """States on entry of every span (K, spans, B, N, E) and after the last (K, B, N, E), which is ``start``'s shape."""

    def walk(h: Tensor, delta: Tensor, du: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, ...]:
        return (torch.exp(delta * A) * h + du * B,)

    def hand_over(h: Tensor, decay: Tensor, inside: Tensor) -> tuple[Tensor, ...]:
        return decay * h + inside, h.clone()

    zero = torch.zeros_like(du[0] * B[0])  # (K, spans, B, N, E)
    (inside,) = scan(walk, (zero,), (delta, du, B), (A,))
    decay = torch.exp(delta.sum(0) * A)
    last, enter = scan(hand_over, (start,), (decay.transpose(0, 1), inside.transpose(0, 1)))
    return enter.transpose(0, 1), last


def _within(delta: Tensor, du: Tensor, B: Tensor, C: Tensor, A: Tensor, enter: Tensor) -> Tensor:
    """sum_n C h along all spans, (SPAN, K, spans, B, E)."""

    def walk(h: Tensor, delta: Tensor, du: Tensor, B: Tensor, C: Tensor, A: Tensor) -> tuple[Tensor, ...]:
        h = torch.exp(delta * A) * h + du * B
        return h, (C * h).sum(-2)

    _, y = scan(walk, (enter,), (delta, du, B, C), (A,))
    return y


def _states(call: ScanCall, enter: Tensor, last: Tensor, spans: int) -> Tensor:
    """The operator's second result (B, K, chunks, E, N) from the states on entry of spans (K, spans, B, N, E)."""
    batch, height, width, dim = call.x.shape
    routes, state = call.A.shape[0], call.A.shape[2]
    chunks, every = (height * width + CHUNK - 1) // CHUNK, CHUNK // SPAN
    # One chunk more than needed, as with the spans.
    more = (height * width + 2 * CHUNK - 1) // CHUNK
    forwards = (torch.arange(more, device=enter.device) * every).clamp(max=spans - 1)
    # A reversed route enters a chunk through its last span; beyond the end of the path is the initial state.
    backwards = (spans - every - forwards).clamp(min=0)
    index = [(backwards if code & REVERSED else forwards) + k * spans for k, code in enumerate(call.routes)]
    states = enter.reshape(routes * spans, batch, state, dim).index_select(0, torch.cat(index))
    states = states.reshape(routes, more, batch, state, dim)[:, :chunks]
    states = torch.cat([states, last.unsqueeze(1)], dim=1)
    return states.permute(2, 0, 1, 4, 3).contiguous()

"""Selective scan in plain PyTorch: the path of CPUs, MPS, float64, channel groups and index tables.

A route is scanned as blocks of consecutive pixels. The position inside a block is a Python loop, vectorised over
images, blocks, channels and states; a chain over the blocks then hands each block the state it starts from:

    1. from a zero state, the last state of every block     h <- a_t h + b_t                one operation a position
    2. the state with which every block starts              e <- h + exp(A sum_t d_t) e     one operation a block
    3. from that state, every state                         h <- a_t h + b_t                one operation a position

with a_t = exp(d_t A) and b_t = d_t B_t x_t: about 2 sqrt(2 L) operations for L steps, none of which divides by a decay
(which may be 0). The backward pass recomputes the states from a saved one and runs the same scan against the route for
the adjoint g_t = C_t dy_t + a_{t+1} g_{t+1}, from which every gradient follows.

One route, one segment of pixels and a few images are worked on at a time: the buffers with one entry a state hold
``_WORKING_SET`` elements, whatever the size of the map. Axes inside: images b, pixels s, groups g, states n, and e
channels of a group; (g, n, e) is flattened to m where only the recurrence matters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.selective_scan.call import CHUNK, DIFFERENTIABLE, Gradients, ScanCall
from subquad.ops.selective_scan.gate import gate_gradients, gated
from subquad.ops.selective_scan.routes import COLUMN, REVERSED, ROUTES, TABLE

_WORKING_SET_CPU = 2**18
"""Elements a buffer: small enough for a CPU's caches."""
_WORKING_SET = 2**24
"""Elements a buffer on any other device, where a launch must be long to be worth its overhead."""
_WIDE = 16
"""A step over 1 / _WIDE of the working set is long enough for the pixels of a segment to need no blocks."""


def forward(call: ScanCall) -> tuple[Tensor, Tensor, Tensor]:
    """Merged output (B, H, W, E) in ``out_dtype``, the saved states that ``call.CHUNK`` describes, and the kept sum."""
    if call.z is None:
        return (*_forward(call), call.new_kept())
    merged, states = _forward(call._replace(out_dtype=call.A.dtype))
    y, kept = gated(call, merged)
    return y, states, kept


def _forward(call: ScanCall) -> tuple[Tensor, Tensor]:
    """The same without a gate."""
    batch, height, width, dim = call.x.shape
    working = call.A.dtype
    chunks = math.ceil(height * width / CHUNK)
    y = call.x.new_empty(call.x.shape, dtype=call.out_dtype)
    states = call.x.new_empty((batch, len(call.routes), chunks + 1, dim, call.A.shape[-1]), dtype=working)
    for images in _image_slices(call):
        part = _take_images(call, images)
        x = part.x.to(working)
        merged = y[images] if y.dtype == working else torch.empty_like(x)
        _skip(x, call.D, out=merged)
        for path in _paths(part):
            u = path.gather(x)
            with path.adding_to(merged) as out:
                for k in path.routes:
                    _forward_route(_route(part, path, k, u), out, states[images, k])
        if y.dtype != working:
            y[images] = merged
    return y, states


def _forward_route(route: _Route, out: Tensor, saved: Tensor) -> None:
    """Add a route's output to ``out`` (b, L, E) and fill its ``saved`` states (b, chunks, E, N)."""
    state = route.initial_state
    by_state = _split_channels(saved, route.A)  # (b, chunks, g, n, e)
    y = _split_channels(out.unsqueeze(-1), route.A).squeeze(3)  # (b, L, g, e)
    for pixels in route.segments():
        seg = _Segment(route, pixels, state)
        state = seg.last_state
        first, last = pixels.start // CHUNK, math.ceil(pixels.stop / CHUNK)
        before = seg.states.unflatten(2, route.A.shape)
        if route.reverse:
            by_state[:, first : last - 1] = before[:, CHUNK : seg.length : CHUNK]
            by_state[:, last - 1] = before[:, seg.length]
        else:
            by_state[:, first:last] = before[:, : seg.length : CHUNK]
        _sum_states(y[:, pixels], route.C[:, pixels].unsqueeze(-1), seg.by_pixel(seg.states, seg.neighbour))
    if saved.shape[1] > math.ceil(out.shape[1] / CHUNK):
        by_state[:, -1] = state.unflatten(1, route.A.shape)


def backward(call: ScanCall, states: Tensor, kept: Tensor, grad_y: Tensor, grad_last_state: Tensor | None) -> Gradients:
    """Gradients of a call, each of its field's shape and dtype; None for an absent one, and for z if no sum was kept.

    Args:
        call: as in the forward pass.
        states, kept: what the forward pass of this or another implementation saved.
        grad_y: (B, H, W, E).
        grad_last_state: (B, K, E, N) or None.
    """
    grad_sum, grad_z, grad_addend = gate_gradients(call, kept, grad_y)
    grads = call._replace(
        x=call.x.new_empty(call.x.shape),
        dt=call.dt.new_empty(call.dt.shape),
        A=torch.zeros_like(call.A),
        B=call.B.new_empty(call.B.shape),
        C=call.C.new_empty(call.C.shape),
        D=_zeros_like(call.D),
        dt_weight=_zeros_like(call.dt_weight),
        dt_bias=_zeros_like(call.dt_bias),
        initial_state=_zeros_like(call.initial_state),
        z=grad_z,
        addend=grad_addend,
    )
    for images in _image_slices(call):
        last = None if grad_last_state is None else grad_last_state[images]
        _backward_images(
            _take_images(call, images), _take_images(grads, images), states[images], grad_sum[images], last
        )
    return grads[:DIFFERENTIABLE]


def _backward_images(
    call: ScanCall, grads: ScanCall, states: Tensor, grad_y: Tensor, grad_last_state: Tensor | None
) -> None:
    """Fill the gradients of a few images, and add to those of the parameters."""
    x, dy = call.x.to(states.dtype), grad_y.to(states.dtype)
    dx = grads.x if grads.x.dtype == states.dtype else torch.empty_like(x)
    _skip(dy, call.D, out=dx)
    if grads.D is not None:
        grads.D.add_((dy * x).sum((0, 1, 2)))
    for path in _paths(call):
        u, dy_path = path.gather(x), path.gather(dy)
        with path.adding_to(dx) as du:
            for k in path.routes:
                route = _route(call, path, k, u)
                grad = route.gradients(du)
                if grad_last_state is not None:
                    grad.initial_state.copy_(_split_channels(grad_last_state[:, k], route.A).flatten(1))
                _backward_route(route, grad, dy_path, states[:, k])
                _store(grad, grads, path, k)
    if grads.x.dtype != states.dtype:
        grads.x.copy_(dx)


def _store(grad: _Route, grads: ScanCall, path: _Path, k: int) -> None:
    """Put the gradients of route k where they belong among the call's."""
    for maps, along in ((grads.dt, grad.dt), (grads.B, grad.B), (grads.C, grad.C)):
        maps[:, :, :, k] = path.scatter(along)
    _split_channels(grads.A[k], grad.A).add_(grad.A)
    for total, part in ((grads.dt_weight, grad.dt_weight), (grads.dt_bias, grad.dt_bias)):
        if total is not None and part is not None:
            total[k] += part
    if grads.initial_state is not None:
        _split_channels(grads.initial_state[:, k], grad.A).copy_(grad.initial_state.unflatten(1, grad.A.shape))


def _backward_route(route: _Route, grad: _Route, dy: Tensor, saved: Tensor) -> None:
    """Fill or add to a route's gradients; ``grad.initial_state`` is the last state's on entry."""
    by_state = _split_channels(saved, route.A)  # (b, chunks, g, n, e)
    for pixels in route.segments(against=True):
        chunk = (pixels.stop - 1) // CHUNK if route.reverse else pixels.start // CHUNK
        seg = _Segment(route, pixels, by_state[:, chunk].flatten(1))
        _backward_segment(seg, grad, dy[:, pixels].unflatten(2, (route.A.shape[0], -1)))


def _backward_segment(seg: _Segment, grad: _Route, dy: Tensor) -> None:
    """Gradients of one segment; ``dy`` is (b, s, g, e)."""
    route, pixels = seg.route, seg.pixels
    adjoint = torch.zeros_like(seg.decay[:, seg.own])
    g = adjoint[:, : seg.length].unflatten(2, route.A.shape)  # (b, s, g, n, e)
    torch.mul(dy.unsqueeze(3), route.C[:, pixels].unsqueeze(-1), out=g)
    grad.initial_state.copy_(seg.scan_adjoint(adjoint, grad.initial_state))

    delta = seg.delta.unflatten(2, dy.shape[2:])  # (b, s, g, e)
    u = seg.u.unflatten(2, dy.shape[2:])
    carried = seg.by_pixel(seg.decay, seg.own).mul_(seg.by_pixel(seg.states, seg.own))  # a_t h_{t-1}
    grad.C[:, pixels] = seg.by_pixel(seg.states, seg.neighbour).mul_(dy.unsqueeze(3)).sum(-1)
    carried.mul_(g)
    through_input = _sum_states(torch.zeros_like(dy), route.B[:, pixels].unsqueeze(-1), g)
    grad.u[:, pixels].unflatten(2, dy.shape[2:]).addcmul_(through_input, delta)
    grad.B[:, pixels] = g.mul_(seg.scaled.unsqueeze(3)).sum(-1)
    step = _sum_states(through_input.mul_(u), route.A, carried).flatten(2)
    grad.A.add_(carried.mul_(delta.unsqueeze(3)).sum((0, 1)))

    if route.dt_softplus:
        step = _softplus_backward(step, seg.step)
    if grad.dt_bias is not None:
        grad.dt_bias.add_(step.sum((0, 1)))
    if route.dt_weight is None or grad.dt_weight is None:
        grad.dt[:, pixels] = step
    else:
        grad.dt[:, pixels] = step @ route.dt_weight
        grad.dt_weight.add_(step.flatten(0, 1).T @ route.dt[:, pixels].flatten(0, 1))


def _skip(x: Tensor, D: Tensor | None, *, out: Tensor) -> None:
    """Every route adds D x at every pixel."""
    if D is None:
        out.zero_()
    else:
        torch.mul(x, D.sum(0), out=out)


def _sum_states(out: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """Add sum_n weights_n values_n to ``out`` (b, s, g, e); weights broadcast to values (b, s, g, n, e)."""
    for n in range(values.shape[3]):
        out.addcmul_(weights[..., n, :], values[..., n, :])
    return out


# Paths and routes ------------------------------------------------------------------------------------------------


class _Path(NamedTuple):
    """An order of the map's pixels and the routes that walk it, one way or the other."""

    code: int
    order: Tensor | None
    routes: list[int]
    height: int
    width: int

    def gather(self, maps: Tensor) -> Tensor:
        """(b, H, W, ...) to (b, L, ...) along the path; a view for rows."""
        if self.order is not None:
            return maps.flatten(1, 2).index_select(1, self.order)
        return (maps.transpose(1, 2) if self.code & COLUMN else maps).flatten(1, 2)

    def scatter(self, along: Tensor) -> Tensor:
        """(b, L, ...) along the path to (b, H, W, ...); a view unless the path is a table's."""
        if self.order is not None:
            return along.index_select(1, self.order.argsort()).unflatten(1, (self.height, self.width))
        if self.code & COLUMN:
            return along.unflatten(1, (self.width, self.height)).transpose(1, 2)
        return along.unflatten(1, (self.height, self.width))

    @contextmanager
    def adding_to(self, maps: Tensor) -> Iterator[Tensor]:
        """A buffer (b, L, ...) along the path; what is added to it is added to ``maps`` (b, H, W, ...)."""
        if self.code == ROUTES["row"]:
            yield maps.flatten(1, 2)
            return
        along = maps.new_zeros(maps.shape[0], self.height * self.width, *maps.shape[3:])
        yield along
        maps += self.scatter(along)


def _paths(call: ScanCall) -> list[_Path]:
    _, height, width, _ = call.x.shape
    paths: dict[tuple[int, int], _Path] = {}
    for k, code in enumerate(call.routes):
        table = code == TABLE
        order = call.table[k].long() if table and call.table is not None else None
        key = (code & ~REVERSED, k if table else 0)
        paths.setdefault(key, _Path(key[0], order, [], height, width)).routes.append(k)
    return list(paths.values())


class _Route(NamedTuple):
    """One route's arguments in working precision, maps along its path walked forwards."""

    reverse: bool
    u: Tensor  # (b, L, E)
    dt: Tensor  # (b, L, R) or (b, L, E)
    B: Tensor  # (b, L, g, n)
    C: Tensor  # (b, L, g, n)
    A: Tensor  # (g, n, e)
    dt_weight: Tensor | None  # (E, R)
    dt_bias: Tensor | None  # (E)
    initial_state: Tensor  # (b, m)
    dt_softplus: bool

    def gradients(self, du: Tensor) -> _Route:
        """Buffers for the gradients: unfilled for maps but ``du``, zeros for parameters and states."""
        return self._replace(
            u=du,
            dt=self.dt.new_empty(self.dt.shape),
            B=self.B.new_empty(self.B.shape),
            C=self.C.new_empty(self.C.shape),
            A=torch.zeros_like(self.A),
            dt_weight=_zeros_like(self.dt_weight),
            dt_bias=_zeros_like(self.dt_bias),
            initial_state=torch.zeros_like(self.initial_state),
        )

    def segments(self, against: bool = False) -> Iterator[slice]:
        """Slices of the path whose length is a multiple of CHUNK but for the path's last, in the order of the walk."""
        batch, length, _ = self.u.shape
        pieces = max(1, round(batch * length * self.A.numel() / _working_set(self.u)))
        size = CHUNK * math.ceil(length / (pieces * CHUNK))
        starts = range(0, length, size)
        for start in reversed(starts) if self.reverse != against else starts:
            yield slice(start, min(start + size, length))


def _route(call: ScanCall, path: _Path, k: int, u: Tensor) -> _Route:
    A = call.A[k].unflatten(0, (call.B.shape[-2], -1)).transpose(1, 2).contiguous()  # (E, N) -> (g, n, e)
    if call.initial_state is None:
        state = u.new_zeros(u.shape[0], A.numel())
    else:
        state = _split_channels(call.initial_state[:, k], A).flatten(1)
    dt, B, C = (path.gather(value[:, :, :, k]).to(u.dtype) for value in (call.dt, call.B, call.C))
    weight = None if call.dt_weight is None else call.dt_weight[k]
    bias = None if call.dt_bias is None else call.dt_bias[k]
    return _Route(bool(call.routes[k] & REVERSED), u, dt, B, C, A, weight, bias, state, call.dt_softplus)


def _split_channels(value: Tensor, A: Tensor) -> Tensor:
    """View of (..., E, n) as (..., g, n, e)."""
    return value.unflatten(-2, (A.shape[0], A.shape[2])).transpose(-1, -2)


# Blocked scan ----------------------------------------------------------------------------------------------------


class _Segment:
    """Consecutive pixels of a path, cut into blocks: their steps, decays and states.

    Buffers have one row more than the blocks have pixels, so that two views of equal length, shifted by one row, pair a
    pixel with its neighbour. ``decay[own]`` are the pixels' decays and ``decay[neighbour]`` those of the pixels walked
    next, which the adjoint needs. ``states[neighbour]`` are the states after the pixels and ``states[own]`` those
    before. Rows that belong to no pixel have step 0, so decay 1, and no input: they hand the state on.

    Args:
        route: the route.
        pixels: the pixels, counted along the path.
        state: (b, m), the state before the segment's first step.

    Attributes:
        u: (b, s, E).
        step: (b, s, E), before softplus.
        delta: (b, s, E), after softplus.
        scaled: (b, s, g, e), delta * u.
        decay, states: (b, rows + 1, m).
        last_state: (b, m), the state after the segment's last step.
    """

    def __init__(self, route: _Route, pixels: slice, state: Tensor) -> None:
        self.route, self.pixels = route, pixels
        self.u = route.u[:, pixels]
        batch, self.length, _ = self.u.shape
        self.blocks = 1
        if batch * route.A.numel() * _WIDE < _working_set(self.u):
            self.blocks = max(1, round(math.sqrt(2 * self.length)))
        rows = self.blocks * math.ceil(self.length / self.blocks)
        self.own = slice(1, rows + 1) if route.reverse else slice(0, rows)
        self.neighbour = slice(0, rows) if route.reverse else slice(1, rows + 1)
        self._fill_steps(rows)
        self.decay = self._exp(self._padded_delta)
        self._fill_states(state)

    def _fill_steps(self, rows: int) -> None:
        route, dt = self.route, self.route.dt[:, self.pixels]
        if route.dt_weight is not None:
            flat, weight = dt.flatten(0, 1), route.dt_weight.T
            step = flat @ weight if route.dt_bias is None else torch.addmm(route.dt_bias, flat, weight)
            self.step = step.unflatten(0, dt.shape[:2])
        else:
            self.step = dt if route.dt_bias is None else dt + route.dt_bias
        batch, _, dim = self.u.shape
        first, last = self.own.start, self.own.start + self.length
        self._padded_delta = self.u.new_empty(batch, rows + 1, dim)
        self._padded_delta[:, :first] = 0
        self._padded_delta[:, last:] = 0
        self.delta = self._padded_delta[:, first:last]
        if route.dt_softplus:
            _softplus(self.step, out=self.delta)
        else:
            self.delta.copy_(self.step)

    def _fill_states(self, state: Tensor) -> None:
        route = self.route
        self.scaled = (self.delta * self.u).unflatten(2, (route.A.shape[0], -1))
        self.states = torch.empty_like(self.decay)
        inputs = self.by_pixel(self.states, self.neighbour)
        torch.mul(self.scaled.unsqueeze(3), route.B[:, self.pixels].unsqueeze(-1), out=inputs)
        self.states[:, self.neighbour.start + self.length : self.neighbour.stop] = 0
        self.states[:, -1 if route.reverse else 0] = state
        self.last_state = self._scan(self.states[:, self.neighbour], self.own, state, route.reverse)

    def scan_adjoint(self, adjoint: Tensor, after: Tensor) -> Tensor:
        """Turn ``adjoint`` (b, rows, m) from C dy into dL/dh, given the gradient ``after`` (b, m) of ``last_state``.

        Returns the gradient of the state before the segment's first step.
        """
        self._scan(adjoint, self.neighbour, after, not self.route.reverse)
        first = -1 if self.route.reverse else 0
        return self.decay[:, self.own][:, first] * adjoint[:, first]

    def by_pixel(self, buffer: Tensor, rows: slice) -> Tensor:
        """The rows of a buffer that belong to pixels, (b, s, g, n, e)."""
        return buffer[:, rows.start : rows.start + self.length].unflatten(2, self.route.A.shape)

    def _scan(self, terms: Tensor, decays: slice, state: Tensor, reverse: bool) -> Tensor:
        """In place h <- a h + b over ``terms`` (b, rows, m), with the given rows of the decays; returns the last h."""
        shape = (self.blocks, -1)
        a = self.decay[:, decays].unflatten(1, shape).unbind(2)  # each (b, blocks, m)
        b = terms.unflatten(1, shape).unbind(2)
        walk = list(zip(a, b, strict=True))
        if reverse:
            walk.reverse()
        if self.blocks == 1:
            h = state.unsqueeze(1)
        else:
            local = walk[0][1].clone()
            for decay, term in walk[1:]:
                torch.addcmul(term, decay, local, out=local)
            total = self._exp(self._padded_delta[:, decays].unflatten(1, shape).sum(2))
            h = _chain(local, total, state, reverse)
        for decay, term in walk:
            torch.addcmul(term, decay, h, out=term)
            h = term
        return h[:, 0 if reverse else -1]

    def _exp(self, delta: Tensor) -> Tensor:
        """exp(A delta): (..., E) to (..., m)."""
        A = self.route.A
        return (delta.unflatten(-1, (A.shape[0], 1, A.shape[2])) * (A * math.log2(math.e))).exp2_().flatten(-3)


def _chain(local: Tensor, total: Tensor, state: Tensor, reverse: bool) -> Tensor:
    """The state with which each block starts, (b, blocks, m), from each block's own last state and total decay.

    ``local`` is overwritten.
    """
    blocks = list(zip(local.unbind(1), total.unbind(1), strict=True))
    if reverse:
        blocks.reverse()
    h = state
    for end, decay in blocks[:-1]:
        h = torch.addcmul(end, decay, h, out=end)
    first = state.unsqueeze(1)
    return torch.cat([local[:, 1:], first] if reverse else [first, local[:, :-1]], dim=1)


# Softplus is the identity above 20. In float32 that makes no difference to the last bit, and the functions without a
# threshold are several times faster on some CPUs.


def _softplus(step: Tensor, *, out: Tensor) -> None:
    if step.dtype == torch.float64:
        torch.ops.aten.softplus.out(step, 1.0, 20.0, out=out)
    else:
        torch.logaddexp(step, step.new_zeros(()), out=out)


def _softplus_backward(grad: Tensor, step: Tensor) -> Tensor:
    if step.dtype == torch.float64:
        return torch.ops.aten.softplus_backward(grad, step, 1.0, 20.0)
    return grad * torch.sigmoid(step)


def _zeros_like(value: Tensor | None) -> Tensor | None:
    return None if value is None else torch.zeros_like(value)


def _working_set(x: Tensor) -> int:
    return _WORKING_SET_CPU if x.device.type == "cpu" else _WORKING_SET


def _image_slices(call: ScanCall) -> Iterator[slice]:
    """Slices of the batch of which one segment fits into the working set."""
    batch, height, width, _ = call.x.shape
    size = max(1, _working_set(call.x) // (min(CHUNK, height * width) * call.A[0].numel()))
    for start in range(0, batch, size):
        yield slice(start, min(start + size, batch))


def _take_images(call: ScanCall, images: slice) -> ScanCall:
    state = call.initial_state
    return call._replace(
        x=call.x[images],
        dt=call.dt[images],
        B=call.B[images],
        C=call.C[images],
        initial_state=None if state is None else state[images],
    )

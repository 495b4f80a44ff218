"""Gated linear attention in plain PyTorch: the path of CPUs, MPS, float64 and unusual head sizes.

Tokens are cut into chunks of about ``CHUNK``. With S the state that enters a chunk (of either direction), in a chunk

    o_t = q_t exp(sum of g up to t) S  +  sum_s A_ts v_s        A_ts = sum_c q_tc k_sc exp(sum of g between s and t)
    S'  = exp(sum of all g) S  +  sum_s k_s exp(sum of g behind s) v_s

Every exponent is a sum of log decays and so at most 0, formed by one product with a matrix of zeros and ones: no
difference of cumulative sums, which would lose digits, and no exponential of a positive number, which would overflow.
The two directions meet in A: pairs s < t belong to the one, s > t to the other, s = t to both. The gradients of the
gates come out of the transposed product, again as sums without cancellation.

A few heads' chunks, a segment, are worked on at a time, so that the buffers hold ``_WORKING_SET`` elements whatever
the length. Axes inside: rows c (or t, s) of a chunk, m images and heads, n chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.gated_linear_attention.call import GatedCall, Gradients, log_decays
from subquad.ops.gated_linear_attention.exponents import CHUNK, exponent_sums

_cached_sums = cache(exponent_sums)

_WORKING_SET_CPU = 2**19
"""Elements of the largest buffer: small enough for a CPU's caches."""
_WORKING_SET = 2**26
"""The same on any other device, where a launch must be long to be worth its overhead."""


def forward(call: GatedCall) -> Tensor:
    """Output (B, N, H, d_v) in ``out_dtype``."""
    out = call.q.new_empty(call.v.shape, dtype=call.out_dtype)
    for images in _image_slices(call):
        spans = _spans(call, images)
        starts = [_zero_state(call, images)]
        for span in spans[:-1]:
            segment = _Segment(call, images, span)
            starts.append(_chain(segment.added(0), segment.total(0), starts[-1], reverse=False))
        state = _zero_state(call, images)
        for span in reversed(spans):
            segment = _Segment(call, images, span)
            states = [segment.added(0), segment.added(1)]
            _chain(states[0], segment.total(0), starts.pop(), reverse=False)
            state = _chain(states[1], segment.total(1), state, reverse=True)
            out[images, span] = segment.unfold(segment.output(states)).to(call.out_dtype)
    return out


def backward(call: GatedCall, grad: Tensor) -> Gradients:
    """Gradients of q, k, v and gates for the gradient (B, N, H, d_v) of the output."""
    grads = tuple(value.new_empty(value.shape) for value in call[:4])
    for images in _image_slices(call):
        spans = _spans(call, images)
        # From the left come the states of the forward direction and the adjoints of the backward one.
        starts = [(_zero_state(call, images), _zero_state(call, images))]
        for span in spans[:-1]:
            segment = _Segment(call, images, span, grad)
            state = _chain(segment.added(0), segment.total(0), starts[-1][0], reverse=False)
            adjoint = _chain(segment.read(1), segment.total(1), starts[-1][1], reverse=False)
            starts.append((state, adjoint))
        state, adjoint = _zero_state(call, images), _zero_state(call, images)
        for span in reversed(spans):
            segment = _Segment(call, images, span, grad)
            states, adjoints = ([part(0), part(1)] for part in (segment.added, segment.read))
            from_left = starts.pop()
            _chain(states[0], segment.total(0), from_left[0], reverse=False)
            _chain(adjoints[1], segment.total(1), from_left[1], reverse=False)
            state = _chain(states[1], segment.total(1), state, reverse=True)
            adjoint = _chain(adjoints[0], segment.total(0), adjoint, reverse=True)
            for value, part in zip(grads, segment.gradients(states, adjoints), strict=True):
                value[images, span] = part
    return grads  # type: ignore[return-value]


class _Segment:
    """Some chunks of some images: the arguments in working precision and their decays.

    Rows beyond the last token are zero with decay 1: they add nothing to a state and hand it on.

    Args:
        call: the call.
        images, span: images and tokens of the segment.
        grad: gradient of the output, for the backward pass.

    Attributes:
        q, k: (c, m, n, d_k).
        v, grad: (m, n, c, d_v), the gradient times the output's factor.
        inner: (2, c, m, n, d_k), for each direction the decay of the entering state at a row.
        outer: (2, c, m, n, d_k), the decay of a row's contribution until the chunk is left.
    """

    def __init__(self, call: GatedCall, images: slice, span: slice, grad: Tensor | None = None) -> None:
        self.call, self.length = call, span.stop - span.start
        self.rows, self.chunks = _chunking(self.length)
        q, k, v, logits = (value[images, span] for value in call[:4])
        factor = 0.5 * call.scale
        self.q, self.k = self._by_row(q), self._by_row(k)
        self.v = self._fold(v)
        if grad is None:
            self.q = self.q * factor
        else:
            self.grad = self._fold(grad[images, span]) * factor
        self._logits = logits
        decays = log_decays(logits, call.gate_normalizer, call.working_dtype)
        self.gates = torch.cat([self._by_row(part) for part in decays.unbind(2)])  # (2 c, m, n, d_k)
        self.sums = _cached_sums(self.rows, call.working_dtype, call.q.device)
        self.inner, self.outer = self._exp(slice(0, 4 * self.rows)).unflatten(0, (2, 2, self.rows)).unbind()

    def _fold(self, value: Tensor) -> Tensor:
        """(b, length, H, d) to (m, n, c, d) in working precision."""
        value = value.to(self.call.working_dtype).transpose(1, 2)
        value = F.pad(value, (0, 0, 0, self.rows * self.chunks - value.shape[2]))
        return value.unflatten(2, (self.chunks, self.rows)).flatten(0, 1)

    def _by_row(self, value: Tensor) -> Tensor:
        """(b, length, H, d) to (c, m, n, d) in working precision."""
        return self._fold(value).movedim(2, 0).contiguous()

    def unfold(self, value: Tensor) -> Tensor:
        """(m, n, c, d) to (b, length, H, d)."""
        heads = self.call.q.shape[2]
        value = value.flatten(1, 2).unflatten(0, (-1, heads)).transpose(1, 2)
        return value[:, : self.length]

    def _exp(self, rows: slice) -> Tensor:
        """exp of some of the sums of log decays, (rows, m, n, d_k)."""
        return (self.sums[rows] @ self.gates.flatten(1)).exp_().unflatten(1, self.gates.shape[1:])

    def total(self, direction: int) -> Tensor:
        """(m, n, d_k), the decay of a state that passes a chunk."""
        return self.inner[direction, 0 if direction else -1]

    def added(self, direction: int) -> Tensor:
        """(m, n, d_k, d_v), what a chunk adds to the state."""
        return _by_chunk(self.k * self.outer[direction]).mT @ self.v

    def read(self, direction: int) -> Tensor:
        """(m, n, d_k, d_v), the gradient of the state that enters a chunk through what the chunk reads of it."""
        return _by_chunk(self.q * self.inner[direction]).mT @ self.grad

    def output(self, states: list[Tensor]) -> Tensor:
        """(m, n, c, d_v) from the entering states of both directions."""
        pairs = self.pairs().mul_(self.q[:, None]).mul_(self.k)
        out = self._weights(pairs.sum(-1)) @ self.v
        for direction, state in enumerate(states):
            out += _by_chunk(self.q * self.inner[direction]) @ state
        return out

    def pairs(self) -> Tensor:
        """(t, s, m, n, d_k), the decay from row s to row t in the direction that leads from s to t."""
        return self._exp(slice(4 * self.rows, None)).unflatten(0, (self.rows, self.rows))

    def _weights(self, sums: Tensor) -> Tensor:
        """A or its gradient, (t, s, m, n) to (m, n, t, s), with the pairs t = s counted for both directions."""
        return sums.movedim((2, 3), (0, 1)) * (1 + torch.eye(self.rows, dtype=sums.dtype, device=sums.device))

    def gradients(self, states: list[Tensor], adjoints: list[Tensor]) -> Iterator[Tensor]:
        """Of q, k, v and gates, from the entering states and the gradients of the leaving ones; by token."""
        decay = self.pairs()
        with_q = decay * self.q[:, None]
        with_both = with_q * self.k
        weights = self._weights(with_both.sum(-1))
        grad_weights = self._weights((self.grad @ self.v.mT).movedim((2, 3), (0, 1)))  # (m, n, t, s)
        by_pair = grad_weights.movedim((0, 1), (2, 3)).unsqueeze(-1)

        grad_v = weights.mT @ self.grad
        grad_q = decay.mul_(by_pair).mul_(self.k).sum(1)
        grad_k = with_q.mul_(by_pair).sum(0)
        grad_inner, grad_outer = torch.empty_like(self.inner), torch.empty_like(self.outer)
        for direction, (state, adjoint) in enumerate(zip(states, adjoints, strict=True)):
            inner, outer = self.inner[direction], self.outer[direction]
            grad_v += _by_chunk(self.k * outer) @ adjoint
            through = (self.grad @ state.mT).movedim(2, 0) * inner
            grad_q += through
            torch.mul(through, self.q, out=grad_inner[direction])
            through = (self.v @ adjoint.mT).movedim(2, 0) * outer
            grad_k += through
            torch.mul(through, self.k, out=grad_outer[direction])
            passed = self.total(direction) * (state * adjoint).sum(-1)
            grad_inner[direction, 0 if direction else -1] += passed
        sums = [grad_inner.flatten(0, 1), grad_outer.flatten(0, 1), with_both.mul_(by_pair).flatten(0, 1)]
        grad_gates = (self.sums.mT @ torch.cat(sums).flatten(1)).unflatten(1, self.gates.shape[1:])

        yield self.unfold(_by_chunk(grad_q))
        yield self.unfold(_by_chunk(grad_k))
        yield self.unfold(grad_v)
        yield self._of_gates(torch.stack([self.unfold(_by_chunk(part)) for part in grad_gates.chunk(2)], dim=2))

    def _of_gates(self, grad: Tensor) -> Tensor:
        """Gradient of the gates from that of the log decays, (b, length, 2, H, d_k)."""
        if self.call.gate_normalizer is None:
            return grad
        return grad * torch.sigmoid(-self._logits.to(grad.dtype)) / self.call.gate_normalizer


def _by_chunk(value: Tensor) -> Tensor:
    """(c, m, n, d) to (m, n, c, d)."""
    return value.movedim(0, 2)


def _chain(parts: Tensor, total: Tensor, start: Tensor, reverse: bool) -> Tensor:
    """Replace each chunk's part (m, n, d_k, d_v) by h on entry, with h <- total h + part; returns the last h."""
    h = start
    order = range(parts.shape[1])
    for i in reversed(order) if reverse else order:
        part = parts[:, i]
        following = torch.addcmul(part, total[:, i, :, None], h)
        part.copy_(h)
        h = following
    return h


# Cutting ---------------------------------------------------------------------------------------------------------


def _chunking(length: int) -> tuple[int, int]:
    """Rows and number of chunks, of equal size so that little is padded."""
    chunks = math.ceil(length / CHUNK)
    return math.ceil(length / chunks), chunks


def _elements(call: GatedCall) -> int:
    """Elements that one chunk of one image puts into the largest buffer."""
    return (4 * CHUNK + CHUNK**2) * call.q.shape[2] * call.q.shape[3]


def _working_set(call: GatedCall) -> int:
    return _WORKING_SET_CPU if call.q.device.type == "cpu" else _WORKING_SET


def _image_slices(call: GatedCall) -> Iterator[slice]:
    batch, length = call.q.shape[:2]
    size = max(1, _working_set(call) // (_elements(call) * math.ceil(length / CHUNK)))
    for start in range(0, batch, size):
        yield slice(start, min(start + size, batch))


def _spans(call: GatedCall, images: slice) -> list[slice]:
    """Tokens of each segment."""
    length = call.q.shape[1]
    size = CHUNK * max(1, _working_set(call) // (_elements(call) * (images.stop - images.start)))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _zero_state(call: GatedCall, images: slice) -> Tensor:
    heads = (images.stop - images.start) * call.q.shape[2]
    return call.q.new_zeros(heads, call.q.shape[3], call.v.shape[3], dtype=call.working_dtype)

"""Triton kernel of the selective scan: states from segment to segment, between the passes. See triton_impl.py."""

import triton
import triton.language as tl

from subquad.ops.selective_scan._triton_tiles import _kernel


@triton.jit
def _after(a1, b1, a2, b2):
    """Compose the affine maps h -> a1 h + b1 and then h -> a2 h + b2."""
    return a1 * a2, a2 * b1 + b2


@_kernel
def selective_scan_chain_kernel(
    p_totals, p_A, p_ends, p_given, p_entries, p_last,
    segments, last, dim, n_routes, reversed_routes,
    N: tl.constexpr, BS: tl.constexpr, BJ: tl.constexpr, GIVEN: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """entry[s + 1] = exp(A * sum of segment s's steps) * entry[s] + (end of segment s from zero), along each route.

    Grid (B * K, E * N / BJ). ``p_ends``, ``p_given`` and ``p_entries`` are (B, K, segments, N, E), the state after the
    last segment goes to ``p_last``, [E, N] at every ``last`` numbers (LAST). ``reversed_routes`` is a bit mask of the
    routes walked from the last segment to the first. Sums of steps arrive times log2(e).
    """
    o_path = tl.program_id(0).to(tl.int64)
    k = tl.program_id(0) % n_routes
    is_reversed = (reversed_routes >> k) & 1
    o_j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    m_j = o_j < dim * N
    o_s = tl.arange(0, BS)
    b_A = tl.load(p_A + k * dim * N + o_j % dim * N + o_j // dim, mask=m_j, other=0.0)
    b_h = tl.zeros((BJ,), dtype=tl.float32)
    if GIVEN:
        b_h = tl.load(p_given + o_path * dim * N + o_j, mask=m_j, other=0.0)
    p_entry = p_entries + o_path * segments * dim * N + o_j
    tl.store(p_entry + (segments - 1) * is_reversed * (dim * N), b_h, mask=m_j)
    for start in range(0, segments, BS):
        o_walk = start + o_s
        m_walk = o_walk < segments
        o_segment = o_walk + is_reversed * (segments - 1 - 2 * o_walk)
        m_tile = m_walk[:, None] & m_j[None, :]
        o_end = (o_path * segments + o_segment) * dim
        b_sum = tl.load(p_totals + o_end[:, None] + (o_j % dim)[None, :], mask=m_tile, other=0.0)  # [BS, BJ]
        b_end = tl.load(p_ends + o_end[:, None] * N + o_j[None, :], mask=m_tile, other=0.0)
        b_a, b_b = tl.associative_scan((tl.exp2(b_sum * b_A[None, :]), b_end), 0, _after)
        b_after = b_a * b_h[None, :] + b_b
        o_next = o_segment + 1 - 2 * is_reversed
        m_next = (o_walk + 1 < segments)[:, None] & m_j[None, :]
        tl.store(p_entry[None, :] + (o_next.to(tl.int64) * dim * N)[:, None], b_after, mask=m_next)
        b_h = tl.sum(tl.where((o_s == BS - 1)[:, None], b_after, 0.0), 0)
    if LAST:
        tl.store(p_last + o_path * last + o_j % dim * N + o_j // dim, b_h, mask=m_j)

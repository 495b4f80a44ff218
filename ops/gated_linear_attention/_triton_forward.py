"""Triton kernels of gated linear attention: states and outputs. See triton_impl.py for the design."""

import triton
import triton.language as tl

from subquad.ops.gated_linear_attention._triton_tiles import (
    _dot,
    _double,
    _kernel,
    _load_log_decays,
    _load_rows,
    _load_state,
    _may_invert,
    _ones_where,
    _sums,
)


@_kernel
def gated_linear_attention_states_kernel(
    p_q, p_k, p_v, p_g, p_do, p_tiles, p_sums, p_ends, p_totals,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gd, stride_gh, stride_dob, stride_don, stride_doh,
    length, heads, chunks, segments, segment_chunks, groups, kinds,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GRAD: tl.constexpr,
    TWO_LEVEL: tl.constexpr, LOGITS: tl.constexpr, INVERSE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The states that enter each chunk of a segment when zero enters the segment.

    Kinds: 0 S and 1 P, the states of the forward and the backward direction, and with GRAD the gradients 2 dS and 3 dP
    of what leaves a chunk. A chunk hands on

        S' = exp(sum of gf) S + sum_s k_s sf_s v_s^T            dS' = exp(sum of gf) dS + sum_t q_t pf_t do_t^T

    and P, dP the same with the backward decays (pf to sb as in ``_double``). All four are one walk: S and dP from the
    first chunk, P and dS from the last.

    Grid (B * H * segments * kinds, V / BV), neighbours share tokens. On chip: one state [K, BV] in float32. Reads k, v
    (q, do) and one direction's gates, writes a state for every C tokens; with TWO_LEVEL also the sum of log decays
    since the walk's start for each chunk, and what leaves the segment.
    """
    kind = tl.program_id(0) % kinds
    i_segment = tl.program_id(0) // kinds % segments
    i_group = tl.program_id(0) // kinds // segments
    i_b = (i_group // heads).to(tl.int64)
    i_h = (i_group % heads).to(tl.int64)
    is_adjoint = kind // 2
    backwards = kind % 2
    from_last = backwards ^ is_adjoint  # P, dS
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    stride_xn = stride_kn
    if GRAD:
        p_q += i_b * stride_qb + i_h * stride_qh
        p_do += i_b * stride_dob + i_h * stride_doh
        if is_adjoint == 1:
            p_k = p_q
            stride_xn = stride_qn
    p_g += i_b * stride_gb + i_h * stride_gh + backwards * stride_gd
    o_t = tl.arange(0, C)
    o_c = tl.arange(0, K)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    o_state = o_c[:, None] * V + o_v[None, :]
    # The rows whose decays make up the factor of a row: r < t for P, r <= t for dS, r > t for S, r >= t for dP.
    o_before = (o_t[:, None] - o_t[None, :]) * (2 * from_last - 1)
    b_rows = _ones_where(o_before >= 1 - is_adjoint, DOT)
    i_row = (kind * groups + i_group).to(tl.int64)
    b_h = tl.zeros((K, BV), dtype=tl.float32)
    b_sum = tl.zeros((K,), dtype=tl.float32)
    first = i_segment * segment_chunks
    count = tl.minimum(segment_chunks, chunks - first)
    for step in range(count):
        chunk = first + step + from_last * (count - 1 - 2 * step)
        i_chunk = i_row * chunks + chunk
        tl.store(p_tiles + i_chunk * (K * V) + o_state, b_h.to(p_tiles.dtype.element_ty))
        if TWO_LEVEL:
            tl.store(p_sums + i_chunk * K + o_c, b_sum)
        o_n = chunk * C + o_t
        m_n = o_n < length
        b_x = _load_rows(p_k, o_n, m_n, o_c, stride_xn).to(tl.float32)  # [C, K]
        b_g = _load_log_decays(p_g, o_n, m_n, o_c, stride_gn, INVERSE, LOGITS)  # [C, K]
        b_total = tl.sum(b_g, 0)
        b_x *= tl.exp2(_sums(b_rows, b_g, DOT))
        if GRAD:
            if is_adjoint == 1:
                b_y = _load_rows(p_do, o_n, m_n, o_v, stride_don).to(DOT)  # [C, BV]
            else:
                b_y = _load_rows(p_v, o_n, m_n, o_v, stride_vn).to(DOT)
        else:
            b_y = _load_rows(p_v, o_n, m_n, o_v, stride_vn).to(DOT)
        b_h = b_h * tl.exp2(b_total)[:, None] + _dot(tl.trans(b_x), b_y, DOT, PRECISION)
        b_sum += b_total
    if TWO_LEVEL:
        i_end = i_row * segments + i_segment
        tl.store(p_ends + i_end * (K * V) + o_state, b_h)
        tl.store(p_totals + i_end * K + o_c, b_sum)


@triton.jit
def _after(a1, b1, a2, b2):
    """Compose the affine maps h -> a1 h + b1 and then h -> a2 h + b2."""
    return a1 * a2, a2 * b1 + b2


@_kernel
def gated_linear_attention_chain_kernel(
    p_ends, p_totals, p_entries,
    segments, groups,
    K: tl.constexpr, V: tl.constexpr, BS: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """entry of the next segment = decay of the segment * its entry + what leaves it when it starts from zero.

    Grid (B * H, K * V / BJ, kinds), kinds as in the states kernel. ``p_ends`` and ``p_entries`` are (kinds, B * H,
    segments, K, V), ``p_totals`` (kinds, B * H, segments, K) has base-2 logarithms.
    """
    kind = tl.program_id(2)
    from_last = kind % 2 ^ kind // 2
    i_row = (kind * groups + tl.program_id(0)).to(tl.int64) * segments
    o_j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    o_s = tl.arange(0, BS)
    b_h = tl.zeros((BJ,), dtype=tl.float32)
    p_entry = p_entries + i_row * (K * V) + o_j
    tl.store(p_entry + (segments - 1) * from_last * (K * V), b_h)
    for start in range(0, segments, BS):
        o_walk = start + o_s
        m_walk = (o_walk < segments)[:, None]
        o_segment = (o_walk + from_last * (segments - 1 - 2 * o_walk)).to(tl.int64)
        b_total = tl.load(p_totals + (i_row + o_segment)[:, None] * K + (o_j // V)[None, :], mask=m_walk, other=0.0)
        b_end = tl.load(p_ends + (i_row + o_segment)[:, None] * (K * V) + o_j[None, :], mask=m_walk, other=0.0)
        b_a, b_b = tl.associative_scan((tl.exp2(b_total), b_end), 0, _after)  # [BS, BJ]
        b_after = b_a * b_h[None, :] + b_b
        o_next = o_segment + 1 - 2 * from_last
        m_next = (o_walk + 1 < segments)[:, None]
        tl.store(p_entry[None, :] + o_next[:, None] * (K * V), b_after, mask=m_next)
        b_h = tl.sum(tl.where((o_s == BS - 1)[:, None], b_after, 0.0), 0)


@_kernel
def gated_linear_attention_fwd_kernel(
    p_q, p_k, p_v, p_g, p_o, p_tiles, p_sums, p_entries,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gd, stride_gh,
    length, heads, chunks, segments, segment_chunks, groups,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    TWO_LEVEL: tl.constexpr, LOGITS: tl.constexpr, INVERSE: tl.constexpr, SCALE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o_t = SCALE * (q_t pf_t S + q_t pb_t P + sum_s A_ts v_s), with S and P the states that enter t's chunk.

    A_ts = sum_c q_tc k_sc times the decay between s and t in the direction that leads from s to t; A_tt counts twice.
    Where the chunk's decays are near, the decay is pf_t / pf_s for s < t and pb_t / pb_s for s > t: a product of
    [C, BK] with [BK, C] for each direction. Otherwise pairs are taken by the highest bit in which t and s differ: both
    then lie in neighbouring blocks of 2 ** level rows, and the decay between them is a factor of t in its block times a
    factor of s in its (``_double``): one product for a level and both directions.

    Grid (B * H * chunks, V / BV). On chip: A and o in float32, BK key channels at a time. Reads q, k, v and the gates
    once, S and P, writes o.
    """
    i_group = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    i_b = (i_group // heads).to(tl.int64)
    i_h = (i_group % heads).to(tl.int64)
    o_t = tl.arange(0, C)
    o_n = chunk * C + o_t
    m_n = o_n < length
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_g += i_b * stride_gb + i_h * stride_gh
    b_A = tl.zeros((C, C), dtype=tl.float32)
    b_o = tl.zeros((C, BV), dtype=tl.float32)
    b_up_to = _ones_where(o_t[:, None] >= o_t[None, :], DOT)
    b_from = _ones_where(o_t[:, None] <= o_t[None, :], DOT)
    b_one = tl.full((C, BK), 1.0, tl.float32)
    for i_k in range(K // BK):
        o_c = i_k * BK + tl.arange(0, BK)
        b_q = _load_rows(p_q, o_n, m_n, o_c, stride_qn).to(tl.float32)  # [C, BK]
        b_k = _load_rows(p_k, o_n, m_n, o_c, stride_kn).to(tl.float32)
        b_gf = _load_log_decays(p_g, o_n, m_n, o_c, stride_gn, INVERSE, LOGITS)
        b_gb = _load_log_decays(p_g + stride_gd, o_n, m_n, o_c, stride_gn, INVERSE, LOGITS)
        b_f = _sums(b_up_to, b_gf, DOT)
        b_b = _sums(b_from, b_gb, DOT)
        b_pf, b_pb = tl.exp2(b_f), tl.exp2(b_b)
        b_s = _load_state(
            p_tiles, p_sums, p_entries, 0, i_group, chunk, o_c, o_v, chunks, segments, segment_chunks, groups,
            K, V, TWO_LEVEL,
        )  # fmt: skip
        b_o += _dot(b_q * b_pf, b_s, DOT, PRECISION)
        b_p = _load_state(
            p_tiles, p_sums, p_entries, 1, i_group, chunk, o_c, o_v, chunks, segments, segment_chunks, groups,
            K, V, TWO_LEVEL,
        )  # fmt: skip
        b_o += _dot(b_q * b_pb, b_p, DOT, PRECISION)
        if _may_invert(b_f, b_b):
            b_pairs = _dot(b_q * b_pf, tl.trans(b_k * tl.exp2(-b_f)), DOT, PRECISION)
            b_A += tl.where(o_t[:, None] >= o_t[None, :], b_pairs, 0.0)
            b_pairs = _dot(b_q * b_pb, tl.trans(b_k * tl.exp2(-b_b)), DOT, PRECISION)
            b_A += tl.where(o_t[:, None] <= o_t[None, :], b_pairs, 0.0)
        else:
            # Gates are read once more: what the levels do to the layout of a tile must not slow down the other branch.
            b_gf = _load_log_decays(p_g, o_n, m_n, o_c, stride_gn, INVERSE, LOGITS)
            b_gb = _load_log_decays(p_g + stride_gd, o_n, m_n, o_c, stride_gn, INVERSE, LOGITS)
            b_A += tl.where(o_t[:, None] == o_t[None, :], 2.0 * tl.sum(b_q * b_k, 1)[:, None], 0.0)
            b_pf, b_pb = tl.exp2(b_gf), tl.exp2(b_gb)
            b_sf, b_sb = b_one, b_one
            for level in range(LEVELS):
                m_upper = ((o_t >> level) & 1 == 1)[:, None]
                m_pair = (o_t >> level)[:, None] ^ (o_t >> level)[None, :] == 1
                b_ql = b_q * tl.where(m_upper, b_pf, b_pb)
                b_kl = b_k * tl.where(m_upper, b_sb, b_sf)
                b_A += tl.where(m_pair, _dot(b_ql, tl.trans(b_kl), DOT, PRECISION), 0.0)
                b_pf, b_sf, b_pb, b_sb = _double(b_pf, b_sf, b_pb, b_sb, o_t, level)
    b_o += _dot(b_A, _load_rows(p_v, o_n, m_n, o_v, stride_vn), DOT, PRECISION)
    p_o += i_b * length * heads * V + i_h * V + o_n.to(tl.int64)[:, None] * (heads * V) + o_v[None, :]
    tl.store(p_o, (b_o * SCALE).to(p_o.dtype.element_ty), mask=m_n[:, None])

"""Triton kernel of gated linear attention: the gradients. See triton_impl.py for the design."""

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
    _sigmoid_of_negative,
    _sums,
)


@triton.jit
def _through_states(
    b_dq, b_dk, b_dv, b_n, b_q, b_k, b_v, b_do, b_inner, b_outer, b_total, b_rows,
    p_tiles, p_sums, p_entries, direction, i_group, chunk, o_c, o_v, chunks, segments, segment_chunks, groups,
    K: tl.constexpr, V: tl.constexpr, TWO_LEVEL: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what goes through a direction's state and its adjoint to dq, dk and dv; and the gradient of the log decays.

    ``b_n`` is q dq - k dk of the pairs within the chunk, ``b_rows`` sums it over the rows that a decay leads to.
    """
    b_s = _load_state(
        p_tiles, p_sums, p_entries, direction, i_group, chunk, o_c, o_v, chunks, segments, segment_chunks, groups,
        K, V, TWO_LEVEL,
    )  # fmt: skip
    b_ds = _load_state(
        p_tiles, p_sums, p_entries, direction + 2, i_group, chunk, o_c, o_v, chunks, segments, segment_chunks, groups,
        K, V, TWO_LEVEL,
    )  # fmt: skip
    b_through = _dot(b_do, tl.trans(b_s), DOT, PRECISION) * b_inner
    b_dq += b_through
    b_n += b_q * b_through
    b_through = _dot(b_v, tl.trans(b_ds), DOT, PRECISION) * b_outer
    b_dk += b_through
    b_through *= b_k
    b_passed = b_total * tl.sum(b_s * b_ds, 1) + tl.sum(b_through, 0)
    b_dv += _dot(b_k * b_outer, b_ds, DOT, PRECISION)
    return b_dq, b_dk, b_dv, _sums(b_rows, b_n - b_through, DOT) + b_passed[None, :]


@_kernel
def gated_linear_attention_bwd_kernel(
    p_q, p_k, p_v, p_g, p_do, p_dq, p_dk, p_dv, p_dg, p_tiles, p_sums, p_entries,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gd, stride_gh, stride_dob, stride_don, stride_doh,
    length, heads, chunks, segments, segment_chunks, groups,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    TWO_LEVEL: tl.constexpr, LOGITS: tl.constexpr, INVERSE: tl.constexpr, SCALE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k, v and the gates, recomputing what the forward pass had on chip.

    With S and P the states that enter the chunk, dS and dP the gradients of those that leave it, dA_ts = do_t . v_s:

        dq_t = pf_t S do_t + pb_t P do_t + sum_s dA_ts k_s decay(t, s)
        dk_s = sf_s dS v_s + sb_s dP v_s + sum_t dA_ts q_t decay(t, s)
        dv_s = sum_t A_ts do_t + dS^T k_s sf_s + dP^T k_s sb_s

    The pairs are taken level by level as in the forward pass. The gradient of a log decay is the sum of those of all
    exponents that it is part of: q dq of the rows that it leads to, k dk of the rows that it comes from, and
    exp(total) S dS for what passes. Pairs that lie on one side of it cancel, within the chunk: to float32 rounding,
    because q dq and k dk are made of the same rounded operands.

    Grid (B * H * chunks, V / BV). On chip: A^T, dA and dv, BK key channels at a time. Reads q, k, v, do, the gates and
    four states once; each V block writes its part of dq, dk and dg.
    """
    i_group = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    i_b = (i_group // heads).to(tl.int64)
    i_h = (i_group % heads).to(tl.int64)
    o_t = tl.arange(0, C)
    o_n = chunk * C + o_t
    m_n = o_n < length
    m_row = m_n[:, None]
    o_row = o_n.to(tl.int64)[:, None]
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    i_part = tl.program_id(1).to(tl.int64) * (groups // heads) + i_b
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_g += i_b * stride_gb + i_h * stride_gh
    p_do += i_b * stride_dob + i_h * stride_doh
    b_v = _load_rows(p_v, o_n, m_n, o_v, stride_vn).to(DOT)  # [C, BV]
    b_do = _load_rows(p_do, o_n, m_n, o_v, stride_don).to(DOT)
    b_dA = _dot(b_do, tl.trans(b_v), DOT, PRECISION).to(DOT)  # [t, s]
    b_own = 2.0 * tl.sum(b_do.to(tl.float32) * b_v.to(tl.float32), 1)[:, None]
    b_AT = tl.zeros((C, C), dtype=tl.float32)  # [s, t]
    b_dv = tl.zeros((C, BV), dtype=tl.float32)
    m_after = o_t[:, None] > o_t[None, :]
    m_before = o_t[:, None] < o_t[None, :]
    b_up_to = _ones_where(o_t[:, None] >= o_t[None, :], DOT)
    b_from = _ones_where(o_t[:, None] <= o_t[None, :], DOT)
    b_behind = _ones_where(o_t[:, None] < o_t[None, :], DOT)
    b_ahead = _ones_where(o_t[:, None] > o_t[None, :], DOT)
    b_one = tl.full((C, BK), 1.0, tl.float32)
    b_zero = tl.zeros((C, BK), dtype=tl.float32)
    for i_k in range(K // BK):
        o_c = i_k * BK + tl.arange(0, BK)
        b_q = _load_rows(p_q, o_n, m_n, o_c, stride_qn).to(tl.float32)  # [C, BK]
        b_k = _load_rows(p_k, o_n, m_n, o_c, stride_kn).to(tl.float32)
        b_gf = _load_log_decays(p_g, o_n, m_n, o_c, stride_gn, INVERSE, LOGITS)
        b_gb = _load_log_decays(p_g + stride_gd, o_n, m_n, o_c, stride_gn, INVERSE, LOGITS)
        b_totalf = tl.exp2(tl.sum(b_gf, 0))
        b_totalb = tl.exp2(tl.sum(b_gb, 0))
        b_f = _sums(b_up_to, b_gf, DOT)
        b_b = _sums(b_from, b_gb, DOT)
        if _may_invert(b_f, b_b):
            b_pf, b_rf = tl.exp2(b_f), tl.exp2(-b_f)
            b_ql = (b_q * b_pf).to(DOT)
            b_kl = (b_k * b_rf).to(DOT)
            b_AT += tl.where(m_after, 0.0, _dot(b_kl, tl.trans(b_ql), DOT, PRECISION))  # [s, t], s <= t
            b_dAl = tl.where(m_after, b_dA, 0.0)  # [t, s], s < t
            b_dql = _dot(b_dAl, b_kl, DOT, PRECISION)
            b_dkl = _dot(tl.trans(b_dAl), b_ql, DOT, PRECISION)
            b_dq, b_dk = b_dql * b_pf, b_dkl * b_rf
            b_nf = b_ql.to(tl.float32) * b_dql - b_kl.to(tl.float32) * b_dkl
            b_pb, b_rb = tl.exp2(b_b), tl.exp2(-b_b)
            b_ql = (b_q * b_pb).to(DOT)
            b_kl = (b_k * b_rb).to(DOT)
            b_AT += tl.where(m_before, 0.0, _dot(b_kl, tl.trans(b_ql), DOT, PRECISION))  # s >= t
            b_dAl = tl.where(m_before, b_dA, 0.0)  # s > t
            b_dql = _dot(b_dAl, b_kl, DOT, PRECISION)
            b_dkl = _dot(tl.trans(b_dAl), b_ql, DOT, PRECISION)
            b_dq += b_dql * b_pb
            b_dk += b_dkl * b_rb
            b_nb = b_ql.to(tl.float32) * b_dql - b_kl.to(tl.float32) * b_dkl
        else:
            # Gates are read once more: what the levels do to the layout of a tile must not slow down the other branch.
            b_gf = _load_log_decays(p_g, o_n, m_n, o_c, stride_gn, INVERSE, LOGITS)
            b_gb = _load_log_decays(p_g + stride_gd, o_n, m_n, o_c, stride_gn, INVERSE, LOGITS)
            b_pf, b_pb = tl.exp2(b_gf), tl.exp2(b_gb)
            b_sf, b_sb = b_one, b_one
            b_dq, b_dk, b_nf, b_nb = b_zero, b_zero, b_zero, b_zero
            b_AT += tl.where(o_t[:, None] == o_t[None, :], 2.0 * tl.sum(b_q * b_k, 1)[:, None], 0.0)
            for level in range(LEVELS):
                m_upper = ((o_t >> level) & 1 == 1)[:, None]
                m_pair = (o_t >> level)[:, None] ^ (o_t >> level)[None, :] == 1
                b_fq = tl.where(m_upper, b_pf, b_pb)
                b_fk = tl.where(m_upper, b_sb, b_sf)
                b_ql = (b_q * b_fq).to(DOT)
                b_kl = (b_k * b_fk).to(DOT)
                b_AT += tl.where(m_pair, _dot(b_kl, tl.trans(b_ql), DOT, PRECISION), 0.0)
                b_dAl = tl.where(m_pair, b_dA, 0.0)
                b_dql = _dot(b_dAl, b_kl, DOT, PRECISION)
                b_dkl = _dot(tl.trans(b_dAl), b_ql, DOT, PRECISION)
                b_dq += b_dql * b_fq
                b_dk += b_dkl * b_fk
                b_nq = b_ql.to(tl.float32) * b_dql
                b_nk = -b_kl.to(tl.float32) * b_dkl
                b_nf += tl.where(m_upper, b_nq, b_nk)
                b_nb += tl.where(m_upper, b_nk, b_nq)
                b_pf, b_sf, b_pb, b_sb = _double(b_pf, b_sf, b_pb, b_sb, o_t, level)
        b_dq, b_dk, b_dv, b_dgf = _through_states(
            b_dq, b_dk, b_dv, b_nf, b_q, b_k, b_v, b_do, tl.exp2(b_f), tl.exp2(_sums(b_behind, b_gf, DOT)), b_totalf,
            b_from, p_tiles, p_sums, p_entries, 0, i_group, chunk, o_c, o_v, chunks, segments, segment_chunks, groups,
            K, V, TWO_LEVEL, DOT, PRECISION,
        )  # fmt: skip
        b_dq, b_dk, b_dv, b_dgb = _through_states(
            b_dq, b_dk, b_dv, b_nb, b_q, b_k, b_v, b_do, tl.exp2(b_b), tl.exp2(_sums(b_ahead, b_gb, DOT)), b_totalb,
            b_up_to, p_tiles, p_sums, p_entries, 1, i_group, chunk, o_c, o_v, chunks, segments, segment_chunks, groups,
            K, V, TWO_LEVEL, DOT, PRECISION,
        )  # fmt: skip
        b_dq += b_own * b_k
        b_dk += b_own * b_q

        o_key = (i_part * length + o_row) * (heads * K) + i_h * K + o_c[None, :]
        tl.store(p_dq + o_key, (b_dq * SCALE).to(p_dq.dtype.element_ty), mask=m_row)
        tl.store(p_dk + o_key, (b_dk * SCALE).to(p_dk.dtype.element_ty), mask=m_row)
        if LOGITS:
            p_gate = p_g + o_row * stride_gn + o_c[None, :]
            b_gate = tl.load(p_gate, mask=m_row, other=0.0).to(tl.float32)
            b_dgf *= _sigmoid_of_negative(b_gate) * INVERSE
            b_gate = tl.load(p_gate + stride_gd, mask=m_row, other=0.0).to(tl.float32)
            b_dgb *= _sigmoid_of_negative(b_gate) * INVERSE
        # The first decay of either direction acts on a state of zeros; exactly, not but for rounding.
        b_dgf = tl.where(o_n[:, None] == 0, 0.0, b_dgf * SCALE)
        b_dgb = tl.where(o_n[:, None] == length - 1, 0.0, b_dgb * SCALE)
        o_gate = (i_part * length + o_row) * (2 * heads * K) + i_h * K + o_c[None, :]
        tl.store(p_dg + o_gate, b_dgf.to(p_dg.dtype.element_ty), mask=m_row)
        tl.store(p_dg + o_gate + heads * K, b_dgb.to(p_dg.dtype.element_ty), mask=m_row)
    b_dv += _dot(b_AT, b_do, DOT, PRECISION)
    p_dv += (i_b * length + o_row) * (heads * V) + i_h * V + o_v[None, :]
    tl.store(p_dv, (b_dv * SCALE).to(p_dv.dtype.element_ty), mask=m_row)

"""Triton kernels of linear attention: the backward pass. See triton_impl.py for the design."""

import triton
import triton.language as tl

from subquad.ops.linear_attention._triton_tiles import (
    _at,
    _beside,
    _features,
    _fold_product,
    _kernel,
    _load_angles,
    _load_state,
    _load_vector,
    _mask,
    _operand,
    _parts,
    _program,
    _rotate,
    _store_state,
    _store_vector,
    _sum_tokens,
    _through_map,
    _times_state,
)


@triton.jit
def _sweep_queries(
    p_q, p_qc, p_g, p_cos, p_sin, p_dq, p_dqc, b_high, b_low, b_key_mean, b_value_mean, b_extra,
    start, end, heads, stride_qn, stride_qcn, stride_gn, stride_tn, scale, eps,
    SUMS: tl.constexpr, GRADS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    BE: tl.constexpr, KIND: tl.constexpr, MAP: tl.constexpr, CONTENT: tl.constexpr,
    ROTARY: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PARTS_Q: tl.constexpr,
):  # fmt: skip
    """SUMS: gradients of S, kbar and vbar, the first from products in DOT; GRADS: those of the queries, stored.

    With t_i = S G_i, <G_i, num_i> is <q_c[i], t_i>: the numerator itself is not needed. b_high and b_low are S^T, in
    PARTS_Q parts because most of t_i may cancel against dz_i kbar. b_extra is what the features of every query get
    through the weights of ``softmax_weighted``.
    """
    b_ds = tl.zeros((BD, BE), dtype=tl.float32)
    b_dkeys = tl.zeros((BN // 16, 8, BD), dtype=tl.float32)
    b_dvalues = tl.zeros((BN // 16, 8, BE), dtype=tl.float32)
    for n in range(start, end, BN):
        m_q = _mask(n, end, D, BN, BD)
        m_g = _mask(n, end, E, BN, BE)
        b_g = tl.load(_at(p_g, n, stride_gn, BN, BE), mask=m_g, other=0.0)
        b_t = _times_state(b_g.to(DOT), b_high, b_low, PRECISION, PARTS_Q)
        b_q = _features(tl.load(_at(p_q, n, stride_qn, BN, BD), mask=m_q, other=0.0), m_q, MAP)
        b_q = _beside(b_q, b_t)
        if CONTENT:
            b_qc = tl.load(_at(p_qc, n, stride_qcn, BN, BD), mask=m_q, other=0.0).to(tl.float32)
        elif ROTARY:
            b_cos, b_sin = _load_angles(p_cos, p_sin, n, end, stride_tn, D, BN, BD)
            b_qc = _rotate(b_q, b_cos, b_sin, BN, BD)
        else:
            b_qc = b_q
        m_n = (n + tl.arange(0, BN) < end)[:, None]
        b_z = tl.where(m_n, tl.sum(b_q * b_key_mean[None, :], axis=1)[:, None] * scale, 1.0)
        b_factor = tl.full((BN, 1), 1.0, tl.float32)  # gradient of the numerator over G
        b_dz = tl.zeros((BN, 1), dtype=tl.float32)
        if KIND == "subtract" or KIND == "magnitude":
            b_g32 = b_g.to(tl.float32)
            b_dz -= tl.sum(b_g32 * b_value_mean[None, :], axis=1)[:, None]
            if SUMS:
                b_dvalues += _fold_product(((1.0 if KIND == "subtract" else 0.0) - b_z) * b_g32, BN, BE)
        if KIND != "subtract" and KIND != "none":
            b_inverse = 1 / (tl.maximum(b_z, eps) if KIND == "clamp" else b_z + eps)
            b_through = b_inverse * b_inverse * tl.sum(b_qc * b_t, axis=1)[:, None]
            if KIND == "clamp":
                b_through = tl.where(b_z >= eps, b_through, 0.0)
            b_dz -= b_through
            b_factor = 1 + b_inverse if KIND == "magnitude" else b_inverse
        b_dz *= scale
        if SUMS:
            b_ds = tl.dot(
                tl.trans(_operand(b_factor * b_qc, DOT, PRECISION)), b_g.to(DOT), b_ds, input_precision=PRECISION
            )
            b_dkeys += _fold_product(b_dz * b_q, BN, BD)
        if GRADS:
            b_dq = b_dz * b_key_mean[None, :] + b_extra[None, :]
            b_dqc = b_factor * b_t
            if CONTENT:
                tl.store(_at(p_dqc, n, heads * D, BN, BD), b_dqc.to(p_dqc.dtype.element_ty), mask=m_q)
            elif ROTARY:
                b_dq += _rotate(b_dqc, b_cos, -b_sin, BN, BD)
            else:
                b_dq += b_dqc
            b_dq = _through_map(b_q, b_dq, MAP)
            tl.store(_at(p_dq, n, heads * D, BN, BD), b_dq.to(p_dq.dtype.element_ty), mask=m_q)
    return b_ds, _sum_tokens(b_dkeys), _sum_tokens(b_dvalues)


@_kernel
def linear_attention_bwd_kernel(
    p_g, p_q, p_k, p_v, p_qc, p_kc, p_cos, p_sin, p_state, p_key_mean, p_value_mean, p_query_mean, p_log_sum,
    p_dq, p_dk, p_dv, p_dqc, p_dkc, p_sums, p_totals, p_extra, p_extra_total,
    queries, keys, heads, splits, query_chunk, key_chunk,
    stride_gb, stride_gn, stride_gh, stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh, stride_qcb, stride_qcn, stride_qch, stride_kcb, stride_kcn, stride_kch,
    stride_tn, stride_th, stride_sums, scale, eps,
    SUMS: tl.constexpr, KEYS: tl.constexpr, GRADS: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    KIND: tl.constexpr, MAP: tl.constexpr, CONTENT: tl.constexpr, ROTARY: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, PARTS_Q: tl.constexpr,
):  # fmt: skip
    """All of the backward pass for an image and head, or one of its sweeps over a run of tokens.

    SUMS sweeps the queries for the gradients of the statistics, KEYS sweeps keys and values for theirs, GRADS stores
    those of the queries: in the first sweep, or for ``softmax_weighted`` in a third, because its weights give every
    query the same vector, a sum over the keys. Sweeps that a program does not make left their sums in memory: rows of
    ``stride_sums`` numbers (dS, dkbar, dvbar) for each split, image and head, and their totals; likewise that vector.
    Grid (B * splits * H); on chip: S and dS [BD, BE], float32 sums. Bytes: every token's vectors once for each sweep.
    """
    i_b, i_h, i_split = _program(heads, splits)
    i_head = i_b * heads + i_h
    i_row = i_head + i_split * (tl.num_programs(0) // splits)
    WEIGHTED: tl.constexpr = KIND == "softmax_weighted"
    TWICE: tl.constexpr = WEIGHTED and SUMS and GRADS  # all in one program: the queries are read again for GRADS
    p_cos += i_h * stride_th
    p_sin += i_h * stride_th
    p_q += i_b * stride_qb + i_h * stride_qh
    p_qc += i_b * stride_qcb + i_h * stride_qch
    p_g += i_b * stride_gb + i_h * stride_gh
    o_dq = (i_b * queries * heads + i_h) * D
    start = i_split * query_chunk
    end = tl.minimum(start + query_chunk, queries)

    product_scale = 1.0 if WEIGHTED else scale
    b_key_mean = _load_vector(p_key_mean + i_head * D, D, BD)
    b_extra = tl.zeros((BD,), dtype=tl.float32)
    b_value_mean = tl.zeros((BE,), dtype=tl.float32)
    if KIND == "subtract" or KIND == "magnitude":
        b_value_mean = _load_vector(p_value_mean + i_head * E, E, BE)
    p_state += i_head * (D * E)  # loaded for each sweep: kept, it would fill registers and shared memory
    if SUMS:
        b_state = _load_state(p_state, D, E, BD, BE)
        b_high, b_low = _parts(tl.trans(b_state), DOT, PRECISION, PARTS_Q)
        b_ds, b_dkey_mean, b_dvalue_mean = _sweep_queries(
            p_q, p_qc, p_g, p_cos, p_sin, p_dq + o_dq, p_dqc + o_dq, b_high, b_low, b_key_mean, b_value_mean, b_extra,
            start, end, heads, stride_qn, stride_qcn, stride_gn, stride_tn, product_scale, eps,
            True, GRADS and not WEIGHTED, D, E, BN, BD, BE, KIND, MAP, CONTENT, ROTARY, DOT, PRECISION, PARTS_Q,
        )  # fmt: skip
        if not KEYS:
            p_row = p_sums + i_row * stride_sums
            _store_state(p_row, b_ds, D, E, BD, BE)
            _store_vector(p_row + D * E, b_dkey_mean, D, BD)
            _store_vector(p_row + D * E + D, b_dvalue_mean, E, BE)

    if KEYS:
        if not SUMS:
            p_row = p_totals + i_head * stride_sums
            b_ds = _load_state(p_row, D, E, BD, BE)
            b_dkey_mean = _load_vector(p_row + D * E, D, BD)
            b_dvalue_mean = _load_vector(p_row + D * E + D, E, BE)
        p_k += i_b * stride_kb + i_h * stride_kh
        p_kc += i_b * stride_kcb + i_h * stride_kch
        p_v += i_b * stride_vb + i_h * stride_vh
        p_dk += (i_b * keys * heads + i_h) * D
        p_dkc += (i_b * keys * heads + i_h) * D
        p_dv += (i_b * keys * heads + i_h) * E
        key_start = i_split * key_chunk
        key_end = tl.minimum(key_start + key_chunk, keys)
        if WEIGHTED:
            b_state = _load_state(p_state, D, E, BD, BE)
            level = tl.sum(b_key_mean * b_dkey_mean, axis=0) + tl.sum(tl.sum(b_state * b_ds, axis=1), axis=0)
            b_query_mean = _load_vector(p_query_mean + i_head * D, D, BD)
            log_sum = tl.load(p_log_sum + i_head)
        b_ds *= product_scale / keys
        b_dkey_mean /= keys
        b_dvalue_mean /= keys
        b_high_k, b_low_k = _parts(tl.trans(b_ds), DOT, PRECISION, PARTS)
        b_high_v, b_low_v = _parts(b_ds, DOT, PRECISION, PARTS)
        b_sum = tl.zeros((BN // 16, 8, BD), dtype=tl.float32)
        for n in range(key_start, key_end, BN):
            m_k = _mask(n, key_end, D, BN, BD)
            m_v = _mask(n, key_end, E, BN, BE)
            b_v = tl.load(_at(p_v, n, stride_vn, BN, BE), mask=m_v, other=0.0)
            b_dkc = _times_state(b_v.to(DOT), b_high_k, b_low_k, PRECISION, PARTS)
            b_k = _features(tl.load(_at(p_k, n, stride_kn, BN, BD), mask=m_k, other=0.0), m_k, MAP)
            b_k = _beside(b_k, b_dkc)
            if CONTENT:
                b_kc = tl.load(_at(p_kc, n, stride_kcn, BN, BD), mask=m_k, other=0.0).to(tl.float32)
            elif ROTARY:
                b_cos, b_sin = _load_angles(p_cos, p_sin, n, key_end, stride_tn, D, BN, BD)
                b_kc = _rotate(b_k, b_cos, b_sin, BN, BD)
            else:
                b_kc = b_k
            b_dk = tl.broadcast_to(b_dkey_mean[None, :], (BN, BD))
            if WEIGHTED:
                b_share = tl.exp(scale * tl.sum(b_k * b_query_mean[None, :], axis=1)[:, None] - log_sum)  # w / N
                b_u = tl.sum(b_k * b_dk + b_kc * b_dkc, axis=1)[:, None] * keys
                b_t = b_share * (b_u - level)
                b_sum += _fold_product(b_t * b_k, BN, BD)
                b_kc *= b_share * keys
                b_dkc *= b_share * keys
                b_dk = b_share * keys * b_dk + scale * b_t * b_query_mean[None, :]
            b_dv = (
                _times_state(_operand(b_kc, DOT, PRECISION), b_high_v, b_low_v, PRECISION, PARTS)
                + b_dvalue_mean[None, :]
            )
            if CONTENT:
                tl.store(_at(p_dkc, n, heads * D, BN, BD), b_dkc.to(p_dkc.dtype.element_ty), mask=m_k)
            elif ROTARY:
                b_dk += _rotate(b_dkc, b_cos, -b_sin, BN, BD)
            else:
                b_dk += b_dkc
            b_dk = _through_map(b_k, b_dk, MAP)
            tl.store(_at(p_dk, n, heads * D, BN, BD), b_dk.to(p_dk.dtype.element_ty), mask=m_k)
            tl.store(_at(p_dv, n, heads * E, BN, BE), b_dv.to(p_dv.dtype.element_ty), mask=m_v)
        if WEIGHTED:
            b_extra = _sum_tokens(b_sum)
            if not TWICE:
                _store_vector(p_extra + i_row * D, b_extra, D, BD)

    if GRADS and (TWICE or not SUMS):
        if not TWICE:
            b_extra = _load_vector(p_extra_total + i_head * D, D, BD)
        b_state = _load_state(p_state, D, E, BD, BE)
        b_high, b_low = _parts(tl.trans(b_state), DOT, PRECISION, PARTS_Q)
        _sweep_queries(
            p_q, p_qc, p_g, p_cos, p_sin, p_dq + o_dq, p_dqc + o_dq, b_high, b_low, b_key_mean, b_value_mean,
            b_extra * (scale / queries), start, end, heads, stride_qn, stride_qcn, stride_gn, stride_tn, product_scale,
            eps, False, True, D, E, BN, BD, BE, KIND, MAP, CONTENT, ROTARY, DOT, PRECISION, PARTS_Q,
        )  # fmt: skip

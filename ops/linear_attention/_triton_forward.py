"""Triton kernels of linear attention: the forward pass. See triton_impl.py for the design."""

import triton.language as tl

from subquad.ops.linear_attention._triton_tiles import (
    _at,
    _features,
    _fold,
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
    _times_state,
)


@_kernel
def linear_attention_fwd_kernel(
    p_q, p_k, p_v, p_qc, p_kc, p_cos, p_sin, p_o, p_state, p_key_mean, p_value_mean, p_query_mean, p_maximum, p_sum,
    queries, keys, heads, splits, query_chunk, key_chunk,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_qcb, stride_qcn, stride_qch, stride_kcb, stride_kcn, stride_kch, stride_tn, stride_th,
    stride_state, stride_key_mean, stride_value_mean, stride_query_mean, stride_sum, scale, eps,
    MEAN: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, PARTIAL: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    KIND: tl.constexpr, MAP: tl.constexpr, CONTENT: tl.constexpr, ROTARY: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """All of the forward pass for an image and head, or one of its sweeps over a run of tokens.

    MEAN sums the features of the queries (for the weights of ``softmax_weighted``), KEYS fills the statistics (with
    PARTIAL their sums over the run, unscaled), QUERIES writes o. Sweeps that a program does not make left their results
    in memory. Grid (B * splits * H); on chip: S [BD, BE] in float32. Bytes: every token's vectors once for each sweep.
    """
    ROWS: tl.constexpr = min(BN, 32)  # of partial sums
    i_b, i_h, i_split = _program(heads, splits)
    i_head = i_b * heads + i_h
    i_row = i_head
    if PARTIAL:
        i_row += i_split * (tl.num_programs(0) // splits)
    p_q += i_b * stride_qb + i_h * stride_qh
    p_qc += i_b * stride_qcb + i_h * stride_qch
    p_cos += i_h * stride_th
    p_sin += i_h * stride_th
    start = i_split * query_chunk
    end = tl.minimum(start + query_chunk, queries)

    if MEAN:
        b_sum = tl.zeros((ROWS, BD), dtype=tl.float32)
        for n in range(start, end, BN):
            m_q = _mask(n, end, D, BN, BD)
            b_q = tl.load(_at(p_q, n, stride_qn, BN, BD), mask=m_q, other=0.0)
            b_sum += _fold(_features(b_q, m_q, MAP), BN, BD, ROWS)
        b_query_mean = tl.sum(b_sum, axis=0)
        if not PARTIAL:
            b_query_mean /= queries
        _store_vector(p_query_mean + i_row * stride_query_mean, b_query_mean, D, BD)
    elif KIND == "softmax_weighted" and KEYS:
        b_query_mean = _load_vector(p_query_mean + i_head * D, D, BD)

    if KEYS:
        p_k += i_b * stride_kb + i_h * stride_kh
        p_kc += i_b * stride_kcb + i_h * stride_kch
        p_v += i_b * stride_vb + i_h * stride_vh
        key_start = i_split * key_chunk
        key_end = tl.minimum(key_start + key_chunk, keys)
        b_state = tl.zeros((BD, BE), dtype=tl.float32)
        b_keys = tl.zeros((ROWS, BD), dtype=tl.float32)
        b_values = tl.zeros((ROWS, BE), dtype=tl.float32)
        maximum = float("-inf")  # of the logits so far, and the sum of their exponentials relative to it
        total = 0.0
        for n in range(key_start, key_end, BN):
            m_k = _mask(n, key_end, D, BN, BD)
            m_v = _mask(n, key_end, E, BN, BE)
            b_k = _features(tl.load(_at(p_k, n, stride_kn, BN, BD), mask=m_k, other=0.0), m_k, MAP)
            b_v = tl.load(_at(p_v, n, stride_vn, BN, BE), mask=m_v, other=0.0)
            if CONTENT:
                b_kc = tl.load(_at(p_kc, n, stride_kcn, BN, BD), mask=m_k, other=0.0).to(tl.float32)
            elif ROTARY:
                b_cos, b_sin = _load_angles(p_cos, p_sin, n, key_end, stride_tn, D, BN, BD)
                b_kc = _rotate(b_k, b_cos, b_sin, BN, BD)
            else:
                b_kc = b_k
            if KIND == "softmax_weighted":
                b_logit = scale * tl.sum(b_k * b_query_mean[None, :], axis=1)
                b_logit = tl.where(n + tl.arange(0, BN) < key_end, b_logit, float("-inf"))
                new_maximum = tl.maximum(maximum, tl.max(b_logit, axis=0))
                shrink = tl.exp(maximum - new_maximum)
                b_weight = tl.exp(b_logit - new_maximum)
                maximum = new_maximum
                total = total * shrink + tl.sum(b_weight, axis=0)
                b_state *= shrink
                b_keys *= shrink
                b_k *= b_weight[:, None]
                b_kc *= b_weight[:, None]
            b_state = tl.dot(tl.trans(_operand(b_kc, DOT, PRECISION)), b_v.to(DOT), b_state, input_precision=PRECISION)
            b_keys += _fold(b_k, BN, BD, ROWS)
            if KIND == "subtract" or KIND == "magnitude":
                b_values += _fold(b_v.to(tl.float32), BN, BE, ROWS)
        b_key_mean = tl.sum(b_keys, axis=0)
        b_value_mean = tl.sum(b_values, axis=0)
        if not PARTIAL:
            if KIND == "softmax_weighted":
                b_state /= total
                b_key_mean /= total
            else:
                b_state *= scale / keys
                b_key_mean /= keys
                b_value_mean /= keys
        _store_state(p_state + i_row * stride_state, b_state, D, E, BD, BE)
        _store_vector(p_key_mean + i_row * stride_key_mean, b_key_mean, D, BD)
        if KIND == "subtract" or KIND == "magnitude":
            _store_vector(p_value_mean + i_row * stride_value_mean, b_value_mean, E, BE)
        if KIND == "softmax_weighted":
            if PARTIAL:
                tl.store(p_maximum + i_row * stride_sum, maximum)
                tl.store(p_sum + i_row * stride_sum, total)
            else:
                tl.store(p_sum + i_row * stride_sum, maximum + tl.log(total))
    elif QUERIES:
        b_state = _load_state(p_state + i_head * (D * E), D, E, BD, BE)
        b_key_mean = _load_vector(p_key_mean + i_head * D, D, BD)
        if KIND == "subtract" or KIND == "magnitude":
            b_value_mean = _load_vector(p_value_mean + i_head * E, E, BE)

    if QUERIES:
        b_high, b_low = _parts(b_state, DOT, PRECISION, PARTS)
        if KIND != "softmax_weighted":
            b_key_mean *= scale
        p_o += (i_b * queries * heads + i_h) * E
        for n in range(start, end, BN):
            m_q = _mask(n, end, D, BN, BD)
            b_q = _features(tl.load(_at(p_q, n, stride_qn, BN, BD), mask=m_q, other=0.0), m_q, MAP)
            b_z = tl.sum(b_q * b_key_mean[None, :], axis=1)[:, None]
            if CONTENT:
                b_q = tl.load(_at(p_qc, n, stride_qcn, BN, BD), mask=m_q, other=0.0).to(tl.float32)
            elif ROTARY:
                b_cos, b_sin = _load_angles(p_cos, p_sin, n, end, stride_tn, D, BN, BD)
                b_q = _rotate(b_q, b_cos, b_sin, BN, BD)
            b_o = _times_state(_operand(b_q, DOT, PRECISION), b_high, b_low, PRECISION, PARTS)
            if KIND == "divide" or KIND == "softmax_weighted":
                b_o *= 1 / (b_z + eps)
            elif KIND == "subtract":
                b_o += (1 - b_z) * b_value_mean[None, :]
            elif KIND == "magnitude":
                b_o = b_o * (1 + 1 / (b_z + eps)) - b_z * b_value_mean[None, :]
            elif KIND == "clamp":
                b_o *= 1 / tl.maximum(b_z, eps)
            m_o = _mask(n, end, E, BN, BE)
            tl.store(_at(p_o, n, heads * E, BN, BE), b_o.to(p_o.dtype.element_ty), mask=m_o)


@_kernel
def linear_attention_fwd_kernel_combine(
    p_state, p_key_mean, p_value_mean, p_maximum, p_sum, p_state_out, p_key_mean_out, p_value_mean_out, p_sum_out,
    heads, keys, splits, stride, scale,
    D: tl.constexpr, E: tl.constexpr, BJ: tl.constexpr, BV: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Statistics from the sums of the splits.

    Rows of ``stride`` numbers, one for each split, image and head (``heads`` counts images and heads together). Grid
    (B * H, D * E / BJ); the first column of programs is also for the vectors.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    m_j = o_j < D * E
    o_c = tl.program_id(1) * BV + tl.arange(0, BV)
    m_d = o_c < D
    m_e = o_c < E
    b_state = tl.zeros((BJ,), dtype=tl.float32)
    b_keys = tl.zeros((BV,), dtype=tl.float32)
    b_values = tl.zeros((BV,), dtype=tl.float32)
    maximum = float("-inf")
    total = 0.0
    weight = 1.0
    shrink = 1.0
    for split in range(splits):
        o_row = (i_row + tl.full((), split, tl.int64) * heads) * stride
        if KIND == "softmax_weighted":
            own = tl.load(p_maximum + o_row)
            new_maximum = tl.maximum(maximum, own)
            shrink = tl.exp(maximum - new_maximum)
            weight = tl.exp(own - new_maximum)
            maximum = new_maximum
            total = total * shrink + weight * tl.load(p_sum + o_row)
        b_state = b_state * shrink + weight * tl.load(p_state + o_row + o_j, mask=m_j, other=0.0)
        b_keys = b_keys * shrink + weight * tl.load(p_key_mean + o_row + o_c, mask=m_d, other=0.0)
        if KIND == "subtract" or KIND == "magnitude":
            b_values += tl.load(p_value_mean + o_row + o_c, mask=m_e, other=0.0)
    if KIND == "softmax_weighted":
        b_state /= total
        b_keys /= total
        tl.store(p_sum_out + i_row + o_c, maximum + tl.log(total), mask=o_c == 0)
    else:
        b_state *= scale / keys
        b_keys /= keys
        b_values /= keys
    tl.store(p_state_out + i_row * (D * E) + o_j, b_state, mask=m_j)
    tl.store(p_key_mean_out + i_row * D + o_c, b_keys, mask=m_d)
    if KIND == "subtract" or KIND == "magnitude":
        tl.store(p_value_mean_out + i_row * E + o_c, b_values, mask=m_e)


@_kernel
def linear_attention_kernel_sum(p_x, p_y, columns, splits, divisor, BJ: tl.constexpr):
    """y[j] = sum_i x[i, j] / divisor of x [splits, columns] in float32, in the order of i. Grid (columns / BJ)."""
    o_j = tl.program_id(0).to(tl.int64) * BJ + tl.arange(0, BJ)
    m_j = o_j < columns
    b = tl.zeros((BJ,), dtype=tl.float32)
    for split in range(splits):
        b += tl.load(p_x + tl.full((), split, tl.int64) * columns + o_j, mask=m_j, other=0.0)
    tl.store(p_y + o_j, b / divisor, mask=m_j)

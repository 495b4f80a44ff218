"""Triton kernels of window attention. See triton_impl.py for the design."""

import triton
import triton.language as tl

from subquad.ops._triton_attention import (
    LN2,
    LOG2E,
    NOTHING_YET,
    gradient_step,
    load_gradient,
    load_keys,
    load_rows,
    softmax_step,
    store_row,
    store_rows,
    sum_rows,
)

# Numbers that only take part in index arithmetic: no variant of a kernel for each of their divisors.
_PLAIN = ["windows", "height", "width", "rows", "columns", "heads", "offset_y", "offset_x"]


@triton.jit
def _places(
    i_row, i_column, o_t, height, width, rows, columns, offset_y, offset_x,
    WH: tl.constexpr, WW: tl.constexpr, PAD_FIRST: tl.constexpr, GRID: tl.constexpr,
):  # fmt: skip
    """Where the tokens o_t [T] of a window lie: pixel, whether on the map, whether in the window; each [T]."""
    o_y = o_t // WW
    o_x = o_t - o_y * WW
    if GRID:
        o_py = i_row + o_y * rows
        o_px = i_column + o_x * columns
    else:
        o_py = i_row * WH + o_y
        o_px = i_column * WW + o_x
    m_in = o_y < WH
    o_sy = o_py + offset_y
    o_sx = o_px + offset_x
    if PAD_FIRST:
        o_sy = tl.where(o_sy >= rows * WH, o_sy - rows * WH, o_sy)
        o_sx = tl.where(o_sx >= columns * WW, o_sx - columns * WW, o_sx)
        m_map = m_in & (o_sy < height) & (o_sx < width)
    else:
        o_sy = tl.where(o_sy >= height, o_sy - height, o_sy)
        o_sx = tl.where(o_sx >= width, o_sx - width, o_sx)
        m_map = m_in & (o_py < height) & (o_px < width)
    return o_sy * width + o_sx, m_map, m_in


@triton.jit
def _sides(o_t, i_row, i_column, rows, columns, WH: tl.constexpr, WW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr):
    """On which side of its window's seams each token [T] is: 1 below the one, 2 right of the other, added up.

    Only the last row and the last column of windows of a shifted map have seams.
    """
    o_side = tl.zeros_like(o_t)
    if SY > 0:
        o_side += (o_t >= tl.where(i_row == rows - 1, (WH - SY) * WW, WH * WW)).to(tl.int32)
    if SX > 0:
        o_side += 2 * (o_t % WW >= tl.where(i_column == columns - 1, WW - SX, WW)).to(tl.int32)
    return o_side


@triton.jit
def _masked(
    b_s, o_q, o_k, i_row, i_column, rows, columns, m_padk,
    WH: tl.constexpr, WW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, MASK: tl.constexpr, HIDE: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """Logits [Tq, Tk] in base 2 with what seams, hidden padding and, without a bias, the window's end add."""
    if SY + SX > 0:  # noqa: SIM102
        if (SY > 0 and i_row == rows - 1) or (SX > 0 and i_column == columns - 1):  # few windows
            o_sideq = _sides(o_q, i_row, i_column, rows, columns, WH, WW, SY, SX)
            o_sidek = _sides(o_k, i_row, i_column, rows, columns, WH, WW, SY, SX)
            b_s = tl.where(o_sideq[:, None] == o_sidek[None, :], b_s, b_s + MASK)
    if HIDE:
        b_s = tl.where(m_padk[None, :], -float("inf"), b_s)
    if not BIAS:
        b_s = tl.where((o_k < WH * WW)[None, :], b_s, -float("inf"))
    return b_s


@triton.jit(do_not_specialize=["heads"])
def window_attention_fwd_kernel_bias(
    p_table, p_bias, stride_entry, stride_head, heads,
    WH: tl.constexpr, WW: tl.constexpr, SIZE: tl.constexpr, BS: tl.constexpr, KEY_MINUS_QUERY: tl.constexpr,
):  # fmt: skip
    """The bias of each pair of tokens of a window: (heads, SIZE, SIZE) in float32, times log2 e.

    Grid (SIZE * SIZE / BS, heads). Keys behind the window's end get minus infinity, which masks them for free.
    """
    i_h = tl.program_id(1)
    o_pair = tl.program_id(0) * BS + tl.arange(0, BS)
    o_q = o_pair // SIZE
    o_k = o_pair - o_q * SIZE
    o_dy = o_q // WW - o_k // WW
    o_dx = o_q % WW - o_k % WW
    if KEY_MINUS_QUERY:
        o_dy = -o_dy
        o_dx = -o_dx
    o_entry = (o_dy + WH - 1) * (2 * WW - 1) + o_dx + WW - 1
    m_k = o_k < WH * WW
    b = tl.load(p_table + o_entry * stride_entry + i_h * stride_head, mask=m_k & (o_q < WH * WW), other=0.0)
    b = tl.where(m_k, b.to(tl.float32) * LOG2E, -float("inf"))
    tl.store(p_bias + i_h.to(tl.int64) * SIZE * SIZE + o_pair, b)


@triton.jit(do_not_specialize=_PLAIN)
def window_attention_fwd_kernel(
    p_q, p_k, p_v, p_bias, p_padk, p_padv, p_o, p_lse,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    windows, height, width, rows, columns, heads, offset_y, offset_x,
    WH: tl.constexpr, WW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, BLOCKS: tl.constexpr, SCALE: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, RAGGED: tl.constexpr, PADK: tl.constexpr, PADV: tl.constexpr,
    HIDE: tl.constexpr, PAD_FIRST: tl.constexpr, GRID: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o = softmax(scale q k^T + bias + mask) v in every window, and lse.

    Grid (heads * BLOCKS, programs): a program takes BT queries of a head in every programs-th window of the batch. On
    chip: q, k, v and the [BT, BT] logits; of a window of one block also its bias, read once for all windows. Softmax
    and sums in float32. Bytes per token and head: q, k, v and o once (k, v once a block of queries) and 4 of lse.
    """
    i_h = tl.program_id(0) % heads
    o_q = tl.program_id(0) // heads * BT + tl.arange(0, BT)
    p_biasq = p_bias + i_h.to(tl.int64) * (BLOCKS * BT * BLOCKS * BT) + (o_q * (BLOCKS * BT))[:, None]
    if BIAS and BLOCKS == 1:
        b_bias = tl.load(p_biasq + tl.arange(0, BT)[None, :])
    for i_window in range(tl.program_id(1), windows, tl.num_programs(1)):
        i_b = (i_window // (rows * columns)).to(tl.int64)
        i_row = i_window // columns % rows
        i_column = i_window % columns
        o_tokenq, m_q, _m_in = _places(
            i_row, i_column, o_q, height, width, rows, columns, offset_y, offset_x, WH, WW, PAD_FIRST, GRID
        )
        b_q = load_rows(p_q + i_b * stride_qb + i_h * stride_qh, o_tokenq * stride_qt, m_q, D, BD)
        b_top = tl.full((BT,), NOTHING_YET, tl.float32)
        b_sum = tl.zeros((BT,), tl.float32)
        b_o = tl.zeros((BT, BE), tl.float32)
        for i_block in range(BLOCKS):
            o_k = i_block * BT + tl.arange(0, BT)
            o_tokenk, m_k, m_in = _places(
                i_row, i_column, o_k, height, width, rows, columns, offset_y, offset_x, WH, WW, PAD_FIRST, GRID
            )
            m_pad = m_in & (m_k == 0)
            b_k, b_v = load_keys(
                p_k + i_b * stride_kb + i_h * stride_kh, p_v + i_b * stride_vb + i_h * stride_vh, p_padk + i_h * D,
                p_padv + i_h * E, o_tokenk, stride_kt, stride_vt, m_k, m_pad, D, E, BD, BE,
                RAGGED and PADK, RAGGED and PADV,
            )  # fmt: skip
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (SCALE * LOG2E)
            if BIAS and BLOCKS == 1:
                b_s += b_bias
            elif BIAS:
                b_s += tl.load(p_biasq + o_k[None, :])
            b_s = _masked(
                b_s,
                o_q,
                o_k,
                i_row,
                i_column,
                rows,
                columns,
                m_pad,
                WH,
                WW,
                SY,
                SX,
                MASK * LOG2E,
                RAGGED and HIDE,
                BIAS,
            )
            if BLOCKS == 1:
                b_top = tl.max(b_s, 1)
                b_top = tl.where(b_top == -float("inf"), 0.0, b_top)  # of a row behind the window's end
                b_p = tl.exp2(b_s - b_top[:, None])
                b_sum = tl.sum(b_p, 1)
                b_o = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
            else:
                b_p, b_decay, b_top, b_sum = softmax_step(b_s, b_top, b_sum)
                b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_decay[:, None], input_precision=PRECISION)
        b_sum = tl.where(m_q, b_sum, 1.0)
        i_pixel = i_b * height * width
        store_rows(p_o + i_pixel * heads * E + i_h * E, o_tokenq * (heads * E), b_o / b_sum[:, None], m_q, E, BE)
        tl.store(p_lse + i_pixel * heads + i_h + o_tokenq * heads, (b_top + tl.log2(b_sum)) * LN2, mask=m_q)


@triton.jit
def _weights_and_gradients(
    b_q, b_k, b_v, b_do, b_delta, b_lse, p_bias, o_q, o_k, i_row, i_column, rows, columns, m_padk,
    WH: tl.constexpr, WW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, SCALE: tl.constexpr, MASK: tl.constexpr,
    HIDE: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P and dS of queries o_q and keys o_k [T], each [T, T]; bias at p_bias [T, T]."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (SCALE * LOG2E)
    if BIAS:
        b_s += tl.load(p_bias)  # from the L1: registers are dearer
    b_s = _masked(b_s, o_q, o_k, i_row, i_column, rows, columns, m_padk, WH, WW, SY, SX, MASK * LOG2E, HIDE, BIAS)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    return gradient_step(b_s, b_dp, b_lse * LOG2E, b_delta)


@triton.jit(do_not_specialize=_PLAIN)
def window_attention_bwd_kernel(
    p_q, p_k, p_v, p_bias, p_padk, p_padv, p_o, p_lse, p_do, p_dq, p_dk, p_dv, p_pairs, p_dpadk, p_dpadv,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_dqb, stride_dqt, stride_dqh, stride_dvb, stride_dvt, stride_dvh,
    windows, height, width, rows, columns, heads, offset_y, offset_x,
    WH: tl.constexpr, WW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, SCALE: tl.constexpr, MASK: tl.constexpr,
    BIAS: tl.constexpr, RAGGED: tl.constexpr, PADK: tl.constexpr, PADV: tl.constexpr, HIDE: tl.constexpr,
    PAD_FIRST: tl.constexpr, GRID: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every gradient in windows of one block of BT tokens, from lse.

        P = exp(logits - lse)   dv = P^T do   dS = P (do v^T - <do, o>)   dq = scale dS k   dk = scale dS^T q

    Grid (heads, programs): a program takes a head in every programs-th window of the batch. On chip: q, k, v, do, the
    [BT, BT] logits, their gradients, the bias, and sums over the program's windows: of dS [BT, BT] and of dk and dv of
    padding; these leave as a program's partial sums, which a later pass adds up, so that there are no atomics. Bytes a
    token and head: q, k, v, o, do, dq, dk and dv once, 4 of lse; and 4 TOKENS^2 a program and head.
    """
    i_h = tl.program_id(0)
    o_t = tl.arange(0, BT)
    o_pair = o_t[:, None] * BT + o_t[None, :]
    p_biasq = p_bias + i_h.to(tl.int64) * (BT * BT) + o_pair
    b_pairs = tl.zeros((BT, BT), tl.float32)
    b_dpadk = tl.zeros((BD,), tl.float32)
    b_dpadv = tl.zeros((BE,), tl.float32)
    for i_window in range(tl.program_id(1), windows, tl.num_programs(1)):
        i_b = (i_window // (rows * columns)).to(tl.int64)
        i_row = i_window // columns % rows
        i_column = i_window % columns
        o_token, m_map, m_in = _places(
            i_row, i_column, o_t, height, width, rows, columns, offset_y, offset_x, WH, WW, PAD_FIRST, GRID
        )
        m_pad = m_in & (m_map == 0)
        i_pixel = i_b * height * width
        b_q = load_rows(p_q + i_b * stride_qb + i_h * stride_qh, o_token * stride_qt, m_map, D, BD)
        b_k, b_v = load_keys(
            p_k + i_b * stride_kb + i_h * stride_kh, p_v + i_b * stride_vb + i_h * stride_vh, p_padk + i_h * D,
            p_padv + i_h * E, o_token, stride_kt, stride_vt, m_map, m_pad, D, E, BD, BE,
            RAGGED and PADK, RAGGED and PADV,
        )  # fmt: skip
        i_first = i_pixel * heads * E + i_h * E
        b_do, b_delta = load_gradient(p_do + i_first, p_o + i_first, o_token * (heads * E), m_map, E, BE)
        # What has no query gets no weight.
        b_lse = tl.load(p_lse + i_pixel * heads + i_h + o_token * heads, mask=m_map, other=float("inf"))
        b_p, b_ds = _weights_and_gradients(
            b_q, b_k, b_v, b_do, b_delta, b_lse, p_biasq, o_t, o_t, i_row, i_column, rows, columns, m_pad,
            WH, WW, SY, SX, SCALE, MASK, RAGGED and HIDE, BIAS, PRECISION,
        )  # fmt: skip
        b_dv = tl.dot(tl.trans(b_p.to(b_do.dtype)), b_do, input_precision=PRECISION)
        store_rows(p_dv + i_b * stride_dvb + i_h * stride_dvh, o_token * stride_dvt, b_dv, m_map, E, BE)
        if BIAS:
            b_pairs += b_ds
        b_ds = b_ds.to(b_q.dtype)
        b_dq = tl.dot(b_ds, b_k, input_precision=PRECISION) * SCALE
        store_rows(p_dq + i_b * stride_dqb + i_h * stride_dqh, o_token * stride_dqt, b_dq, m_map, D, BD)
        b_dk = tl.dot(tl.trans(b_ds), b_q, input_precision=PRECISION) * SCALE
        store_rows(p_dk + i_b * stride_dqb + i_h * stride_dqh, o_token * stride_dqt, b_dk, m_map, D, BD)
        if RAGGED and PADK:
            b_dpadk += sum_rows(b_dk, m_pad)
        if RAGGED and PADV:
            b_dpadv += sum_rows(b_dv, m_pad)
    i_partial = tl.program_id(1).to(tl.int64) * heads + i_h
    if BIAS:
        m_pair = (o_t < WH * WW)[:, None] & (o_t < WH * WW)[None, :]
        o_pair = o_t[:, None] * (WH * WW) + o_t[None, :]
        tl.store(p_pairs + i_partial * (WH * WW * WH * WW) + o_pair, b_pairs, mask=m_pair)
    if RAGGED and PADK:
        store_row(p_dpadk + i_partial * D, b_dpadk, D, BD)
    if RAGGED and PADV:
        store_row(p_dpadv + i_partial * E, b_dpadv, E, BE)


@triton.jit(do_not_specialize=_PLAIN)
def window_attention_bwd_kernel_queries(
    p_q, p_k, p_v, p_bias, p_padk, p_padv, p_o, p_lse, p_do, p_dq, p_pairs,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_dqb, stride_dqt, stride_dqh,
    windows, height, width, rows, columns, heads, offset_y, offset_x,
    WH: tl.constexpr, WW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, BLOCKS: tl.constexpr, SCALE: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, RAGGED: tl.constexpr, PADK: tl.constexpr, PADV: tl.constexpr,
    HIDE: tl.constexpr, PAD_FIRST: tl.constexpr, GRID: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and the sums of dS in windows of several blocks.

    Grid (heads * BLOCKS, programs): a program takes BT queries of a head in every programs-th window of the batch, and
    adds dS to rows of p_pairs (programs, heads, tokens, tokens), zeros before, that are its own. On chip: q, do, dq and
    a [BT, BT] tile.
    """
    i_h = tl.program_id(0) % heads
    o_q = tl.program_id(0) // heads * BT + tl.arange(0, BT)
    p_biasq = p_bias + i_h.to(tl.int64) * (BLOCKS * BT * BLOCKS * BT) + (o_q * (BLOCKS * BT))[:, None]
    i_partial = tl.program_id(1).to(tl.int64) * heads + i_h
    p_pairsq = p_pairs + i_partial * (WH * WW * WH * WW) + (o_q * (WH * WW))[:, None]
    for i_window in range(tl.program_id(1), windows, tl.num_programs(1)):
        i_b = (i_window // (rows * columns)).to(tl.int64)
        i_row = i_window // columns % rows
        i_column = i_window % columns
        i_pixel = i_b * height * width
        o_tokenq, m_q, _m_in = _places(
            i_row, i_column, o_q, height, width, rows, columns, offset_y, offset_x, WH, WW, PAD_FIRST, GRID
        )
        b_q = load_rows(p_q + i_b * stride_qb + i_h * stride_qh, o_tokenq * stride_qt, m_q, D, BD)
        i_first = i_pixel * heads * E + i_h * E
        b_do, b_delta = load_gradient(p_do + i_first, p_o + i_first, o_tokenq * (heads * E), m_q, E, BE)
        b_lse = tl.load(p_lse + i_pixel * heads + i_h + o_tokenq * heads, mask=m_q, other=float("inf"))
        b_dq = tl.zeros((BT, BD), tl.float32)
        for i_block in range(BLOCKS):
            o_k = i_block * BT + tl.arange(0, BT)
            o_tokenk, m_k, m_in = _places(
                i_row, i_column, o_k, height, width, rows, columns, offset_y, offset_x, WH, WW, PAD_FIRST, GRID
            )
            m_pad = m_in & (m_k == 0)
            b_k, b_v = load_keys(
                p_k + i_b * stride_kb + i_h * stride_kh, p_v + i_b * stride_vb + i_h * stride_vh, p_padk + i_h * D,
                p_padv + i_h * E, o_tokenk, stride_kt, stride_vt, m_k, m_pad, D, E, BD, BE,
                RAGGED and PADK, RAGGED and PADV,
            )  # fmt: skip
            _b_p, b_ds = _weights_and_gradients(
                b_q, b_k, b_v, b_do, b_delta, b_lse, p_biasq + o_k[None, :], o_q, o_k, i_row, i_column, rows, columns,
                m_pad, WH, WW, SY, SX, SCALE, MASK, RAGGED and HIDE, BIAS, PRECISION,
            )  # fmt: skip
            if BIAS:
                m_pair = (o_q < WH * WW)[:, None] & (o_k < WH * WW)[None, :]
                b_sum = tl.load(p_pairsq + o_k[None, :], mask=m_pair, other=0.0)
                tl.store(p_pairsq + o_k[None, :], b_sum + b_ds, mask=m_pair)
            b_dq += tl.dot(b_ds.to(b_q.dtype), b_k, input_precision=PRECISION)
        tl.debug_barrier()  # the next window reads the sums back, maybe in other threads
        store_rows(p_dq + i_b * stride_dqb + i_h * stride_dqh, o_tokenq * stride_dqt, b_dq * SCALE, m_q, D, BD)


@triton.jit(do_not_specialize=_PLAIN)
def window_attention_bwd_kernel_keys(
    p_q, p_k, p_v, p_bias, p_padk, p_padv, p_o, p_lse, p_do, p_dk, p_dv, p_dpadk, p_dpadv,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_dkb, stride_dkt, stride_dkh, stride_dvb, stride_dvt, stride_dvh,
    windows, height, width, rows, columns, heads, offset_y, offset_x,
    WH: tl.constexpr, WW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, BLOCKS: tl.constexpr, SCALE: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, RAGGED: tl.constexpr, PADK: tl.constexpr, PADV: tl.constexpr,
    HIDE: tl.constexpr, PAD_FIRST: tl.constexpr, GRID: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv in windows of several blocks, and their partial sums over padding (programs, BLOCKS, heads, D or E).

    Grid (heads * BLOCKS, programs): a program takes BT keys of a head in every programs-th window of the batch. On
    chip: k, v, dk, dv and a [BT, BT] tile.
    """
    i_h = tl.program_id(0) % heads
    o_k = tl.program_id(0) // heads * BT + tl.arange(0, BT)
    p_biask = p_bias + i_h.to(tl.int64) * (BLOCKS * BT * BLOCKS * BT) + o_k[None, :]
    b_dpadk = tl.zeros((BD,), tl.float32)
    b_dpadv = tl.zeros((BE,), tl.float32)
    for i_window in range(tl.program_id(1), windows, tl.num_programs(1)):
        i_b = (i_window // (rows * columns)).to(tl.int64)
        i_row = i_window // columns % rows
        i_column = i_window % columns
        i_pixel = i_b * height * width
        o_tokenk, m_k, m_in = _places(
            i_row, i_column, o_k, height, width, rows, columns, offset_y, offset_x, WH, WW, PAD_FIRST, GRID
        )
        m_pad = m_in & (m_k == 0)
        b_k, b_v = load_keys(
            p_k + i_b * stride_kb + i_h * stride_kh, p_v + i_b * stride_vb + i_h * stride_vh, p_padk + i_h * D,
            p_padv + i_h * E, o_tokenk, stride_kt, stride_vt, m_k, m_pad, D, E, BD, BE,
            RAGGED and PADK, RAGGED and PADV,
        )  # fmt: skip
        b_dk = tl.zeros((BT, BD), tl.float32)
        b_dv = tl.zeros((BT, BE), tl.float32)
        for i_block in range(BLOCKS):
            o_q = i_block * BT + tl.arange(0, BT)
            o_tokenq, m_q, _m_in = _places(
                i_row, i_column, o_q, height, width, rows, columns, offset_y, offset_x, WH, WW, PAD_FIRST, GRID
            )
            b_q = load_rows(p_q + i_b * stride_qb + i_h * stride_qh, o_tokenq * stride_qt, m_q, D, BD)
            i_first = i_pixel * heads * E + i_h * E
            b_do, b_delta = load_gradient(p_do + i_first, p_o + i_first, o_tokenq * (heads * E), m_q, E, BE)
            b_lse = tl.load(p_lse + i_pixel * heads + i_h + o_tokenq * heads, mask=m_q, other=float("inf"))
            b_p, b_ds = _weights_and_gradients(
                b_q, b_k, b_v, b_do, b_delta, b_lse, p_biask + (o_q * (BLOCKS * BT))[:, None], o_q, o_k,
                i_row, i_column, rows, columns, m_pad,
                WH, WW, SY, SX, SCALE, MASK, RAGGED and HIDE, BIAS, PRECISION,
            )  # fmt: skip
            b_dv += tl.dot(tl.trans(b_p.to(b_do.dtype)), b_do, input_precision=PRECISION)
            b_dk += tl.dot(tl.trans(b_ds.to(b_q.dtype)), b_q, input_precision=PRECISION)
        b_dk *= SCALE
        store_rows(p_dk + i_b * stride_dkb + i_h * stride_dkh, o_tokenk * stride_dkt, b_dk, m_k, D, BD)
        store_rows(p_dv + i_b * stride_dvb + i_h * stride_dvh, o_tokenk * stride_dvt, b_dv, m_k, E, BE)
        if RAGGED and PADK:
            b_dpadk += sum_rows(b_dk, m_pad)
        if RAGGED and PADV:
            b_dpadv += sum_rows(b_dv, m_pad)
    i_partial = tl.program_id(1).to(tl.int64) * (heads * BLOCKS) + tl.program_id(0)  # (programs, BLOCKS, heads)
    if RAGGED and PADK:
        store_row(p_dpadk + i_partial * D, b_dpadk, D, BD)
    if RAGGED and PADV:
        store_row(p_dpadv + i_partial * E, b_dpadv, E, BE)


@triton.jit(do_not_specialize=["heads"])
def window_attention_bwd_kernel_table(
    p_pairs, p_table, heads,
    WH: tl.constexpr, WW: tl.constexpr, BQ: tl.constexpr, BX: tl.constexpr, KEY_MINUS_QUERY: tl.constexpr,
):  # fmt: skip
    """The table's gradient from that of the bias of each pair, (heads, WH WW, WH WW).

    Grid (heads, 2 WH - 1): a program takes the pairs of one distance between rows, [BQ queries, BX keys of a row].
    """
    i_h = tl.program_id(0)
    i_dy = tl.program_id(1) - (WH - 1)
    o_q = tl.arange(0, BQ)
    o_x = tl.arange(0, BX)
    o_yk = o_q // WW - i_dy
    m = ((o_q < WH * WW) & (o_yk >= 0) & (o_yk < WH))[:, None] & (o_x < WW)[None, :]
    o_pair = (o_q * (WH * WW) + o_yk * WW)[:, None] + o_x[None, :]
    b = tl.load(p_pairs + i_h.to(tl.int64) * (WH * WW * WH * WW) + o_pair, mask=m, other=0.0)
    o_dx = (o_q % WW)[:, None] - o_x[None, :]
    for i_x in range(2 * WW - 1):
        b_sum = tl.sum(tl.sum(tl.where(o_dx == i_x - (WW - 1), b, 0.0), 1), 0)
        if KEY_MINUS_QUERY:
            i_entry = (WH - 1 - i_dy) * (2 * WW - 1) + 2 * WW - 2 - i_x
        else:
            i_entry = (WH - 1 + i_dy) * (2 * WW - 1) + i_x
        tl.store(p_table + i_entry * heads + i_h, b_sum)

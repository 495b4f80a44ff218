"""Triton kernels of the split forms of neighborhood attention. See triton_split.py for the design."""

import triton
import triton.language as tl

from subquad.ops.neighborhood_attention._triton_tiles import _first, _kernel, _queries, _sees


@triton.jit
def _program(heads, blocks, height, width, BT: tl.constexpr):
    """This program's head and image, and row, column and validity of its BT tokens, which follow on each other."""
    i = tl.program_id(0)
    head = i % heads
    i = i // heads
    o_n = i % blocks * BT + tl.arange(0, BT)
    m_n = o_n < height * width
    o_n = tl.minimum(o_n, height * width - 1)
    o_y = o_n // width
    return head, (i // blocks).to(tl.int64), o_y, o_n - o_y * width, m_n


@triton.jit
def _in_group(o, length, dilation, DILATED: tl.constexpr):
    """Group of positions on an axis, place in it, and its number of tokens."""
    p = o // dilation if DILATED else o
    g = o - p * dilation
    return g, p, (length - g + dilation - 1) // dilation if DILATED else length - g


@triton.jit
def _window_part(
    f_y, p_y, g_y, f_x, p_x, g_x, i_y, i_x, dilation_y, dilation_x,
    KX: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Slots i_x .. of row i_y of the windows of tokens [BT].

    Returns the slots' columns [BS], rows of the keys [BT, 1], their columns [BT, BS], and which are seen [., BS].
    """
    o_s = i_x + tl.arange(0, BS)
    k_y = f_y + i_y
    k_x = f_x[:, None] + o_s[None, :]
    m = (o_s < KX)[None, :]
    if CAUSAL_Y:
        m = m & (k_y <= p_y)[:, None]
    if CAUSAL_X:
        m = m & (k_x <= p_x[:, None])
    return o_s, (k_y * dilation_y + g_y)[:, None], k_x * dilation_x + g_x[:, None], m


@triton.jit
def _load_rows(p, o, m, D: tl.constexpr, BD: tl.constexpr):
    """[BT, BS, BD] of rows at offsets o [BT, BS], in float32; zeros where m is not."""
    o_d = tl.arange(0, BD)[None, None, :]
    m = m[:, :, None]
    if BD > D:
        m = m & (o_d < D)
    return tl.load(p + o[:, :, None] + o_d, mask=m, other=0.0).to(tl.float32)


@_kernel
def neighborhood_split_kernel_logits(
    p_q, p_k, p_rpb, p_out, scale,
    stride_qb, stride_qy, stride_qx, stride_qh, stride_kb, stride_ky, stride_kx, stride_kh,
    heads, height, width, dilation_y, dilation_x, blocks,
    DILATED: tl.constexpr, REPEATS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BIAS: tl.constexpr, ALIGN: tl.constexpr, EMPTY: tl.constexpr,
):  # fmt: skip
    """out = scale <q_i, k_j> + rpb for the slots of each window, EMPTY where causality leaves one empty.

    Grid heads * blocks * images: a program takes BT tokens of a head and walks over their windows, a row after the
    other, BS slots at a time, as [BT, BS, BD] products in float32. Bytes: q, k and the table once from memory (k KY KX
    times from the caches), out once.
    """
    head, image, o_y, o_x, m_n = _program(heads, blocks, height, width, BT)
    g_y, p_y, n_y = _in_group(o_y, height, dilation_y, DILATED)
    g_x, p_x, n_x = _in_group(o_x, width, dilation_x, DILATED)
    f_y = _first(p_y, n_y, KY, STRIDE_Y, CAUSAL_Y)
    f_x = _first(p_x, n_x, KX, STRIDE_X, CAUSAL_X)
    p_q += image * stride_qb + head * stride_qh
    p_k += (image * stride_kb + head // REPEATS * stride_kh) * ALIGN
    p_rpb += head * ((2 * KY - 1) * (2 * KX - 1))
    p_out += (image * height * width * heads + head) * (KY * KX)
    o_out = ((o_y * width + o_x) * heads * (KY * KX))[:, None]
    b_q = _load_rows(p_q, (o_y * stride_qy + o_x * stride_qx)[:, None], m_n[:, None], D, BD) * scale
    for i_y in range(KY):
        for i_x in range(0, KX, BS):
            o_s, k_y, k_x, m = _window_part(
                f_y, p_y, g_y, f_x, p_x, g_x, i_y, i_x, dilation_y, dilation_x, KX, CAUSAL_Y, CAUSAL_X, BS
            )
            b_k = _load_rows(p_k, (k_y * stride_ky + k_x * stride_kx) * ALIGN, m, D, BD)
            b_s = tl.sum(b_q * b_k, 2)
            if BIAS:
                o_rpb = ((f_y + i_y - p_y + KY - 1) * (2 * KX - 1) + f_x - p_x + KX - 1)[:, None] + o_s[None, :]
                b_s += tl.load(p_rpb + o_rpb, mask=m, other=0.0).to(tl.float32)
            if CAUSAL_Y or CAUSAL_X:
                b_s = tl.where(m, b_s, EMPTY)
            o_slot = o_out + (i_y * KX + o_s)[None, :]
            tl.store(p_out + o_slot, b_s.to(p_out.dtype.element_ty), mask=m_n[:, None] & (o_s < KX)[None, :])


@_kernel
def neighborhood_split_kernel_sums(
    p_w, p_k, p_out, scale,
    stride_wb, stride_wy, stride_wx, stride_wh, stride_kb, stride_ky, stride_kx, stride_kh,
    heads, height, width, dilation_y, dilation_x, blocks,
    DILATED: tl.constexpr, REPEATS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """out_i = scale times the sum of w_is k_j over the slots of each window; grid and blocks as for the logits."""
    head, image, o_y, o_x, m_n = _program(heads, blocks, height, width, BT)
    g_y, p_y, n_y = _in_group(o_y, height, dilation_y, DILATED)
    g_x, p_x, n_x = _in_group(o_x, width, dilation_x, DILATED)
    f_y = _first(p_y, n_y, KY, STRIDE_Y, CAUSAL_Y)
    f_x = _first(p_x, n_x, KX, STRIDE_X, CAUSAL_X)
    p_w += image * stride_wb + head * stride_wh
    p_k += (image * stride_kb + head // REPEATS * stride_kh) * ALIGN
    o_w = (o_y * stride_wy + o_x * stride_wx)[:, None]
    b_sum = tl.zeros((BT, BS, BD), tl.float32)
    for i_y in range(KY):
        for i_x in range(0, KX, BS):
            o_s, k_y, k_x, m = _window_part(
                f_y, p_y, g_y, f_x, p_x, g_x, i_y, i_x, dilation_y, dilation_x, KX, CAUSAL_Y, CAUSAL_X, BS
            )
            b_w = tl.load(p_w + o_w + (i_y * KX + o_s)[None, :], mask=m, other=0.0).to(tl.float32)
            b_sum += b_w[:, :, None] * _load_rows(p_k, (k_y * stride_ky + k_x * stride_kx) * ALIGN, m, D, BD)
    o_d = tl.arange(0, BD)[None, :]
    p_out += (image * height * width * heads + head) * D + ((o_y * width + o_x) * heads * D)[:, None]
    tl.store(p_out + o_d, (tl.sum(b_sum, 1) * scale).to(p_out.dtype.element_ty), mask=m_n[:, None] & (o_d < D))


@_kernel
def neighborhood_split_kernel_turned(
    p_w, p_q, p_out, scale,
    stride_wb, stride_wy, stride_wx, stride_wh, stride_qb, stride_qy, stride_qx, stride_qh,
    heads, height, width, dilation_y, dilation_x, blocks,
    DILATED: tl.constexpr, REPEATS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """out_j = scale times the sum of w_is q_i over the queries i that have the key j in a slot s.

    Grid heads of keys * blocks * images. The queries that may see any of a program's keys are walked over as windows
    are for the logits, in each query head that shares the keys; a query's own window tells whether, and in which slot.
    """
    head, image, o_y, o_x, m_n = _program(heads, blocks, height, width, BT)
    g_y, p_y, n_y = _in_group(o_y, height, dilation_y, DILATED)
    g_x, p_x, n_x = _in_group(o_x, width, dilation_x, DILATED)
    p_w += image * stride_wb + head * REPEATS * stride_wh
    p_q += (image * stride_qb + head * REPEATS * stride_qh) * ALIGN
    q_y, behind_y = _queries(p_y, n_y, 1, KY, STRIDE_Y, CAUSAL_Y)
    q_x, behind_x = _queries(p_x, n_x, 1, KX, STRIDE_X, CAUSAL_X)
    rows = tl.max(behind_y - q_y, 0)
    columns = tl.max(behind_x - q_x, 0)
    b_sum = tl.zeros((BT, BS, BD), tl.float32)
    for i in range(rows * REPEATS):
        repeat = i // rows if REPEATS > 1 else 0
        o_qy = q_y + i - repeat * rows
        f_y = _first(o_qy, n_y, KY, STRIDE_Y, CAUSAL_Y)
        m_y = (o_qy < behind_y) & _sees(f_y, o_qy, p_y, KY, CAUSAL_Y)
        o_row = (o_qy * dilation_y + g_y)[:, None]
        for i_x in range(0, columns, BS):
            o_qx = q_x[:, None] + i_x + tl.arange(0, BS)[None, :]
            f_x = _first(o_qx, n_x[:, None], KX, STRIDE_X, CAUSAL_X)
            m = m_y[:, None] & (o_qx < behind_x[:, None]) & _sees(f_x, o_qx, p_x[:, None], KX, CAUSAL_X)
            o_column = o_qx * dilation_x + g_x[:, None]
            o_slot = ((p_y - f_y) * KX)[:, None] + p_x[:, None] - f_x
            o_w = o_row * stride_wy + o_column * stride_wx + repeat * stride_wh + o_slot
            b_w = tl.load(p_w + o_w, mask=m, other=0.0).to(tl.float32)
            o_q = (o_row * stride_qy + o_column * stride_qx + repeat * stride_qh) * ALIGN
            b_sum += b_w[:, :, None] * _load_rows(p_q, o_q, m, D, BD)
    o_d = tl.arange(0, BD)[None, :]
    p_out += (image * height * width * heads + head) * D + ((o_y * width + o_x) * heads * D)[:, None]
    tl.store(p_out + o_d, (tl.sum(b_sum, 1) * scale).to(p_out.dtype.element_ty), mask=m_n[:, None] & (o_d < D))


@_kernel
def neighborhood_split_kernel_table(
    p_w, p_out, stride_wb, stride_wy, stride_wx, stride_wh,
    heads, height, width, dilation_y, dilation_x, tokens,
    KY: tl.constexpr, KX: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, CAUSAL_Y: tl.constexpr,
    CAUSAL_X: tl.constexpr, DILATED: tl.constexpr, BT: tl.constexpr, NX: tl.constexpr,
):  # fmt: skip
    """Sums of gradients w of logits over equal relative places: parts of the bias' gradient.

    Grid (heads, 2 KY - 1, parts): a program takes a row of a head's table and every parts-th block of BT of the tokens
    of all images, and looks up each token's slot, if it has one, at each place [BT, NX]. Writes float32, (parts, heads,
    2 KY - 1, 2 KX - 1).
    """
    head = tl.program_id(0)
    o_c = tl.arange(0, NX)
    p_w += head.to(tl.int64) * stride_wh
    b_sum = tl.zeros((BT, NX), tl.float32)
    for i_block in range(tl.program_id(2), tl.cdiv(tokens, BT), tl.num_programs(2)):
        o_n = i_block * BT + tl.arange(0, BT)
        o_row = o_n // width
        image = o_row // height
        o_y = o_row - image * height
        o_x = o_n - o_row * width
        _g_y, p_y, n_y = _in_group(o_y, height, dilation_y, DILATED)
        _g_x, p_x, n_x = _in_group(o_x, width, dilation_x, DILATED)
        k_y = p_y + tl.program_id(1) - (KY - 1)
        k_x = p_x[:, None] + o_c[None, :] - (KX - 1)
        f_y = _first(p_y, n_y, KY, STRIDE_Y, CAUSAL_Y)
        f_x = _first(p_x, n_x, KX, STRIDE_X, CAUSAL_X)[:, None]
        m = ((o_n < tokens) & _sees(f_y, p_y, k_y, KY, CAUSAL_Y))[:, None]
        m = m & _sees(f_x, p_x[:, None], k_x, KX, CAUSAL_X)
        o_token = image.to(tl.int64) * stride_wb + o_y * stride_wy + o_x * stride_wx + (k_y - f_y) * KX
        b_sum += tl.load(p_w + (o_token[:, None] + k_x - f_x), mask=m, other=0.0).to(tl.float32)
    i_row = (tl.program_id(2).to(tl.int64) * heads + head) * (2 * KY - 1) + tl.program_id(1)
    tl.store(p_out + i_row * (2 * KX - 1) + o_c, tl.sum(b_sum, 0), mask=o_c < 2 * KX - 1)

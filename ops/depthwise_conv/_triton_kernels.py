"""Triton kernels of the depthwise convolution. See triton_impl.py for the design."""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_PLAIN = [
    "stride_b", "stride_h", "stride_w", "columns", "blocks", "height", "width", "dim", "dim_blocks", "items", "rows",
    "first", "step", "center", "programs", "numbers",
]  # fmt: skip
"""Numbers that kernels are not specialised on; strides and channels are counted in ALIGN, so multiples of it."""


@triton.jit
def _item(
    i_item, o_c, columns, blocks, height, width, dim, rows,
    KW: tl.constexpr, LEFT: tl.constexpr, BM: tl.constexpr, ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """A program's work: BM columns of all images, and rows from i_first to i_last of each.

    Image [BM], column in it [BM], what of [BM, BC] there is, what of it has a neighbour at each of KW shifts, rows.
    """
    o_m = (i_item % blocks).to(INDEX) * BM + tl.arange(0, BM)
    o_b = o_m // width
    o_w = o_m % width
    m = (o_m < columns)[:, None] & (o_c < dim * ALIGN)[None, :]
    m_shifts = ()
    for j in tl.static_range(KW):
        o_j = o_w + (j - LEFT)
        m_shifts = m_shifts + (m & ((o_j >= 0) & (o_j < width))[:, None],)
    i_first = i_item // blocks * rows
    return o_b, o_w, m, m_shifts, i_first, tl.minimum(i_first + rows, height)


@triton.jit
def _within(m, i, first, last):
    """``m`` where first <= i < last; the interpreter cannot spread a single truth value over a block."""
    o = tl.zeros(m.shape, tl.int32) + i
    return m & (o >= first) & (o < last)


@triton.jit
def _load_taps(p_weight, o_c, dim, first, step, center, TAPS: tl.constexpr, CENTER: tl.constexpr, ALIGN: tl.constexpr):
    """The taps, each [BC], in the order ``first + t step``; ``center`` is added to one of them."""
    found = ()
    for t in tl.static_range(TAPS):
        b = tl.load(p_weight + o_c * TAPS + (first + t * step), mask=o_c < dim * ALIGN, other=0.0).to(tl.float32)
        if t == CENTER:
            b += center
        found = found + (b,)
    return found


@triton.jit
def _load_shifts(p_row, o, m_shifts, stride, KW: tl.constexpr, LEFT: tl.constexpr):
    """What lies -LEFT, .., KW - 1 - LEFT columns beside a tile's pixels in a row, each [BM, BC], as stored."""
    found = ()
    for j in tl.static_range(KW):
        found = found + (tl.load(p_row + (j - LEFT) * stride + o, mask=m_shifts[j], other=0.0),)
    return found


@triton.jit
def _sigmoid(b):
    return 1.0 / (1.0 + tl.exp2(b * -_LOG2E))


@triton.jit
def _finish(b, p_y, p_dy, o, m, ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr):
    """Store the activation of b [BM, BC]; with GRADIENT dy times its derivative."""
    if GRADIENT:
        b_dy = tl.load(p_dy + o, mask=m, other=0.0).to(tl.float32)
        if ACTIVATION == "silu":
            b_s = _sigmoid(b)
            b = b_dy * b_s * (1.0 + b * (1.0 - b_s))
        else:
            b_density = 0.3989422804014327 * tl.exp2(b * b * (-0.5 * _LOG2E))
            b = b_dy * (0.5 + 0.5 * tl.erf(b * 0.7071067811865476) + b * b_density)
    elif ACTIVATION == "silu":
        b = b * _sigmoid(b)
    elif ACTIVATION == "gelu":
        b = b * (0.5 + 0.5 * tl.erf(b * 0.7071067811865476))
    tl.store(p_y + o, b.to(p_y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=_PLAIN)
def depthwise_conv_fwd_kernel(
    p_x, p_weight, p_bias, p_dy, p_y, stride_b, stride_h, stride_w, columns, blocks, height, width, dim, dim_blocks,
    items, rows, first, step, center,
    KH: tl.constexpr, KW: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    ALIGN: tl.constexpr, ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr, BIAS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """y = act(conv(x)), or with GRADIENT dz = dy act'(conv(x)).

    Grid (items * channel blocks), channels first. Down the rows: a row of x is loaded once for each of KW shifts, one
    row ahead of its use, and added to the KH rows of outputs that see it, of which one is done. On chip: KH KW taps
    of a channel, KH - 1 unfinished rows. Bytes: x and y (and dy) once; x for KH - 1 rows more at the seams of items.
    """
    o_c = tl.program_id(0) % dim_blocks * BC + tl.arange(0, BC)
    o_b, o_w, m, m_shifts, i_first, i_last = _item(
        tl.program_id(0) // dim_blocks, o_c, columns, blocks, height, width, dim, rows, KW, LEFT, BM, ALIGN, INDEX
    )
    b_taps = _load_taps(p_weight, o_c, dim, first, step, center, KH * KW, TOP * KW + LEFT, ALIGN)
    b_bias = tl.zeros((BM, BC), tl.float32)
    if BIAS:
        b_bias += tl.load(p_bias + o_c, mask=o_c < dim * ALIGN, other=0.0).to(tl.float32)[None, :]
    o_x = ((o_b * stride_b + o_w * stride_w) * ALIGN)[:, None] + o_c[None, :]
    o_y = ((o_b * height * width + o_w) * (dim * ALIGN))[:, None] + o_c[None, :]
    stride_x = stride_h.to(tl.int64) * ALIGN
    stride_y = width.to(tl.int64) * dim * ALIGN
    i_start = tl.maximum(i_first - TOP, 0)
    i_end = tl.minimum(i_last + (KH - 1 - TOP), height)
    b_sums = ()
    for _ in tl.static_range(KH - 1):
        b_sums = b_sums + (b_bias,)
    b_next = _load_shifts(p_x + i_start * stride_x, o_x, m_shifts, stride_w * ALIGN, KW, LEFT)
    for i_row in range(i_start, i_end):
        b_x = b_next
        p_row = p_x + tl.minimum(i_row + 1, i_end - 1) * stride_x
        b_next = _load_shifts(p_row, o_x, m_shifts, stride_w * ALIGN, KW, LEFT)
        b_new = ()
        for i in tl.static_range(KH):
            b = b_bias
            if i > 0:
                b = b_sums[i - 1]
            for j in tl.static_range(KW):
                b += b_taps[i * KW + j][None, :] * b_x[j].to(tl.float32)
            b_new = b_new + (b,)
        i_out = i_row - (KH - 1 - TOP)
        m_out = _within(m, i_out, i_first, i_last)
        _finish(b_new[KH - 1], p_y + i_out * stride_y, p_dy + i_out * stride_y, o_y, m_out, ACTIVATION, GRADIENT)
        b_sums = b_new[: KH - 1]
    if TOP < KH - 1:  # rows at the lower border, which lack no tap but those on zeros
        for i_out in range(i_end - (KH - 1 - TOP), i_last):
            b = b_sums[KH - 2]
            m_out = _within(m, i_out, i_first, i_last)
            _finish(b, p_y + i_out * stride_y, p_dy + i_out * stride_y, o_y, m_out, ACTIVATION, GRADIENT)
            b_sums = (b_bias,) + b_sums[: KH - 2]


@triton.jit(do_not_specialize=_PLAIN)
def depthwise_conv_bwd_kernel(
    p_x, p_weight, p_dz, p_dx, p_partials, stride_b, stride_h, stride_w, columns, blocks, height, width, dim,
    dim_blocks, items, rows, first, step, center,
    KH: tl.constexpr, KW: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    ALIGN: tl.constexpr, BIAS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """dx and partial sums of dweight and dbias, from dz. TOP, LEFT, first and step are those of the flipped taps.

        dx[h, w] = sum_ij tap_ij dz[h + i - TOP, w + j - LEFT]    dtap_ij = sum_hw x[h, w] dz[h + i - TOP, w + j - LEFT]

    Grid (programs * channel blocks), channels first; a program takes every programs-th item. Down the rows as forward:
    a row of dz, at KW shifts, meets the KH rows of x and of dx that see it. On chip: the taps, their gradients [BM, BC]
    each, KH - 1 unfinished rows of dx and KH rows of x. Bytes: x, dz and dx once; 4 (KH KW + 1) a program and channel.
    """
    i_program = tl.program_id(0) // dim_blocks
    o_c = tl.program_id(0) % dim_blocks * BC + tl.arange(0, BC)
    b_taps = _load_taps(p_weight, o_c, dim, first, step, center, KH * KW, TOP * KW + LEFT, ALIGN)
    b_dtaps = ()
    for _ in tl.static_range(KH * KW + BIAS):
        b_dtaps = b_dtaps + (tl.zeros((BM, BC), tl.float32),)
    stride_x = stride_h.to(tl.int64) * ALIGN
    stride_z = width.to(tl.int64) * dim * ALIGN
    for i_item in range(i_program, items, tl.num_programs(0) // dim_blocks):
        o_b, o_w, m, m_shifts, i_first, i_last = _item(
            i_item, o_c, columns, blocks, height, width, dim, rows, KW, LEFT, BM, ALIGN, INDEX
        )
        o_x = ((o_b * stride_b + o_w * stride_w) * ALIGN)[:, None] + o_c[None, :]
        o_z = ((o_b * height * width + o_w) * (dim * ALIGN))[:, None] + o_c[None, :]
        i_start = tl.maximum(i_first - TOP, 0)
        i_end = tl.minimum(i_last + (KH - 1 - TOP), height)
        b_x = ()
        b_sums = ()
        for i in tl.static_range(KH):  # row i_start + TOP - i meets tap row i first; the newest one stays as stored
            i_own = i_start + TOP - i
            m_own = _within(m, i_own, i_first, i_last)
            b = tl.load(p_x + i_own * stride_x + o_x, mask=m_own, other=0.0)
            if i == 0:
                b_own = b
            else:
                b_x = b_x + (b.to(tl.float32),)
                b_sums = b_sums + (tl.zeros((BM, BC), tl.float32),)
        b_next = _load_shifts(p_dz + i_start * stride_z, o_z, m_shifts, dim * ALIGN, KW, LEFT)
        for i_row in range(i_start, i_end):
            b_dz = b_next
            b_x = (b_own.to(tl.float32),) + b_x
            p_row = p_dz + tl.minimum(i_row + 1, i_end - 1) * stride_z
            b_next = _load_shifts(p_row, o_z, m_shifts, dim * ALIGN, KW, LEFT)
            i_own = i_row + 1 + TOP
            b_own = tl.load(p_x + i_own * stride_x + o_x, mask=_within(m, i_own, i_first, i_last), other=0.0)
            b_new = ()
            b_more = ()
            for i in tl.static_range(KH):
                b = tl.zeros((BM, BC), tl.float32)
                if i > 0:
                    b = b_sums[i - 1]
                for j in tl.static_range(KW):
                    b_d = b_dz[j].to(tl.float32)
                    b += b_taps[i * KW + j][None, :] * b_d
                    b_more = b_more + (b_dtaps[i * KW + j] + b_x[i] * b_d,)
                b_new = b_new + (b,)
            if BIAS:
                own = tl.where((i_row >= i_first) & (i_row < i_last), 1.0, 0.0)
                b_more = b_more + (b_dtaps[KH * KW] + own * b_dz[LEFT].to(tl.float32),)
            b_dtaps = b_more
            i_out = i_row - (KH - 1 - TOP)
            b = b_new[KH - 1].to(p_dx.dtype.element_ty)
            tl.store(p_dx + i_out * stride_z + o_z, b, mask=_within(m, i_out, i_first, i_last))
            b_sums = b_new[: KH - 1]
            b_x = b_x[: KH - 1]
        if TOP < KH - 1:
            for i_out in range(i_end - (KH - 1 - TOP), i_last):
                b = b_sums[KH - 2].to(p_dx.dtype.element_ty)
                tl.store(p_dx + i_out * stride_z + o_z, b, mask=_within(m, i_out, i_first, i_last))
                b_sums = (tl.zeros((BM, BC), tl.float32),) + b_sums[: KH - 2]
    p_partial = p_partials + (i_program * (KH * KW + BIAS)).to(tl.int64) * dim * ALIGN + o_c
    for t in tl.static_range(KH * KW + BIAS):
        tl.store(p_partial + t * dim * ALIGN, tl.sum(b_dtaps[t], 0), mask=o_c < dim * ALIGN)


@triton.jit(do_not_specialize=_PLAIN)
def depthwise_conv_bwd_kernel_sums(
    p_partials, p_dweight, p_dbias, programs, dim, first, step, numbers, TAPS: tl.constexpr, BP: tl.constexpr,
    BJ: tl.constexpr,
):  # fmt: skip
    """Sum [programs, TAPS (+ 1), dim] over programs, in order, into dweight (dim, TAPS) and dbias (dim).

    Grid (numbers / BJ) with the numbers of a program.
    """
    o_j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    b_sum = tl.zeros((BP, BJ), tl.float32)
    for i_start in range(0, programs, BP):
        o_p = i_start + tl.arange(0, BP)
        m = (o_p < programs)[:, None] & (o_j < numbers)[None, :]
        b_sum += tl.load(p_partials + o_p.to(tl.int64)[:, None] * numbers + o_j[None, :], mask=m, other=0.0)
    b = tl.sum(b_sum, 0)
    o_t = o_j // dim
    o_c = o_j % dim
    m_t = o_t < TAPS
    tl.store(p_dweight + o_c * TAPS + first + o_t * step, b.to(p_dweight.dtype.element_ty), mask=m_t)
    tl.store(p_dbias + o_c, b.to(p_dbias.dtype.element_ty), mask=(o_t == TAPS) & (o_j < numbers))

"""Pieces of the selective scan's Triton kernels: tiles, addresses, step sizes. See triton_impl.py for the design."""

import inspect

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)

# Numbers that say nothing about alignment: compiling a kernel for each of their special values (1, multiples of 16)
# would only multiply the time of the first call.
_PLAIN = {
    *("n_lanes", "length", "segments", "segment_tiles", "slots", "stride_row_b", "stride_row_p", "stride_row_k"),
    *("height", "width", "magic", "shift", "columns"),
    *("n_routes", "routes", "images", "add", "done", "reversed_routes", "last", "rows", "programs"),
}


def _kernel(function):
    """``triton.jit`` without specialisation on the numbers in ``_PLAIN``."""
    names = [name for name in inspect.signature(function).parameters if name in _PLAIN]
    return triton.jit(do_not_specialize=names)(function)


# Tiles -----------------------------------------------------------------------------------------------------------
# Column n of a tile [BC, 4 * STEPS] holds step n // 8 * 2 + n % 2 of lane n % 8 // 2, row m holds channel
# m % 8 * (BC / 8) + m // 8 of the program's block. In the layout of a tensor core product a thread then owns one lane,
# all STEPS (4 or 8) steps and adjacent channels: what the functions of this section do is renaming registers.


@triton.jit
def _halves(b, BC: tl.constexpr):
    """[BC, 32] -> steps 0 to 3 and steps 4 to 7, each [BC, 16]."""
    return tl.split(tl.permute(tl.reshape(b, (BC, 2, 16)), (0, 2, 1)))


@triton.jit
def _whole(b_1, b_2, BC: tl.constexpr):
    """The inverse of ``_halves``."""
    return tl.reshape(tl.permute(tl.join(b_1, b_2), (0, 2, 1)), (BC, 32))


@triton.jit
def _split_time(b, BC: tl.constexpr):
    """[BC, 16] -> the 4 steps, each [BC, 4]."""
    b_even, b_odd = tl.split(tl.permute(tl.reshape(b, (BC, 2, 4, 2)), (0, 2, 1, 3)))
    b_0, b_2 = tl.split(b_even)
    b_1, b_3 = tl.split(b_odd)
    return b_0, b_1, b_2, b_3


@triton.jit
def _join_time(b_0, b_1, b_2, b_3, BC: tl.constexpr):
    """The inverse of ``_split_time``."""
    b = tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))
    return tl.reshape(tl.permute(b, (0, 2, 1, 3)), (BC, 16))


@triton.jit
def _sum_time(b, BC: tl.constexpr):
    """[BC, 4 * STEPS] -> [BC, 4]."""
    if b.shape[1] == 32:
        b_1, b_2 = _halves(b, BC)
        b = b_1 + b_2
    b_0, b_1, b_2, b_3 = _split_time(b, BC)
    return (b_0 + b_1) + (b_2 + b_3)


@triton.jit
def _repeat_rows(b, BC: tl.constexpr):
    """[8, 4 * STEPS] -> [BC, 4 * STEPS], row m from row m % 8."""
    b = tl.reshape(tl.permute(tl.join(b, b), (2, 0, 1)), (16, b.shape[1]))
    if BC == 32:
        b = tl.reshape(tl.permute(tl.join(b, b), (2, 0, 1)), (32, b.shape[1]))
    return b


@triton.jit
def _load_tile(p_map, o_map, m_map, BC: tl.constexpr, STEPS: tl.constexpr):
    """[lane, channel group, step, channel] of a map -> [BC, 4 * STEPS] in float32."""
    b = tl.reshape(tl.load(p_map + o_map, mask=m_map, other=0.0), (4, 8, STEPS // 2, 2, BC // 8))
    return tl.reshape(tl.permute(b, (4, 1, 2, 0, 3)), (BC, 4 * STEPS)).to(tl.float32)


@triton.jit
def _to_map(b, BC: tl.constexpr, STEPS: tl.constexpr):
    """[BC, 4 * STEPS] -> [lane, channel group, step, channel]."""
    b = tl.permute(tl.reshape(b, (BC // 8, 8, STEPS // 2, 4, 2)), (3, 1, 2, 4, 0))
    return tl.reshape(b, (4, 8, STEPS, BC // 8))


@triton.jit
def _load_state(p_state, m_state, BC: tl.constexpr):
    """[lane, channel group, channel] -> [BC, 4]."""
    return tl.reshape(tl.permute(tl.load(p_state, mask=m_state, other=0.0), (2, 1, 0)), (BC, 4))


@triton.jit
def _store_state(p_state, b, m_state, BC: tl.constexpr):
    tl.store(p_state, tl.permute(tl.reshape(b, (BC // 8, 8, 4)), (2, 1, 0)), mask=m_state)


# Addresses -------------------------------------------------------------------------------------------------------


@triton.jit
def _lanes(o_lane, n_lanes, segments, segment_steps, length, INDEX: tl.constexpr):
    """Image, segment, first step and end of the path of lanes 0 to 3; a lane that does not exist has an empty path."""
    o_lane = tl.program_id(1) * 4 + o_lane
    o_in = tl.minimum(o_lane, n_lanes - 1)
    o_segment = o_in % segments
    return (o_in // segments).to(INDEX), o_segment, o_segment * segment_steps, tl.where(o_lane < n_lanes, length, 0)


@triton.jit
def _channels(block, BC: tl.constexpr):
    """Channels of a tile's rows [BC], and as [channel group, channel]."""
    o_row = tl.arange(0, BC)
    o_c = block * BC + o_row % 8 * (BC // 8) + o_row // 8
    return o_c, block * BC + tl.arange(0, 8)[:, None] * (BC // 8) + tl.arange(0, BC // 8)[None, :]


@triton.jit
def _in_channels(m, o_c, dim, EVEN_C: tl.constexpr):
    """``m``, and channels that there are: all of them with EVEN_C."""
    if EVEN_C:
        m_c = tl.full(o_c.shape, True, tl.int1)
    else:
        m_c = o_c < dim
    return m & m_c


@triton.jit
def _path(p_table, routes, group, k, length, height, width, magic, shift):
    """What ``_pixels`` knows of a group's path: its row of the table, the steps that a run of pixels one line apart
    takes (1 for rows, height for columns), and how to divide by them.
    """
    column = (routes >> (28 + group)) & 1
    run = 1 + column * (height - 1)
    return p_table + k.to(tl.int64) * length, run, width, 1 + column * (magic - 1), column * shift


@triton.jit
def _if(flag, m):
    """``m`` where the number ``flag`` is not 0."""
    return m & (tl.zeros(m.shape, tl.int32) < flag)


@triton.jit
def _pixels(path, o_t, o_end, EVEN: tl.constexpr, TABLE: tl.constexpr):
    """Pixels of steps of a path, and which of the steps there are: all of them with EVEN.

    t // run is a product and a shift (see ``division``): a true division would be repeated in each of the layouts that
    addresses are needed in.
    """
    p_table, run, width, magic, shift = path
    if EVEN:
        m_t = tl.full(o_t.shape, True, tl.int1)
    else:
        m_t = o_t < o_end
    if TABLE:
        o_p = tl.load(p_table + o_t, mask=m_t, other=0)
    else:
        o_line = ((o_t.to(tl.int64) * magic) >> shift).to(tl.int32)
        o_p = o_line + (o_t - o_line * run) * width
    return o_p, m_t


@triton.jit
def _locate_columns(
    path, tile, n_lanes, segments, segment_tiles, length,
    STEPS: tl.constexpr, EVEN: tl.constexpr, TABLE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Image, pixel and mask of the columns of a tile, each [4 * STEPS]."""
    o_n = tl.arange(0, 4 * STEPS)
    o_b, _, o_start, o_end = _lanes(o_n % 8 // 2, n_lanes, segments, segment_tiles * STEPS, length, INDEX)
    o_p, m_t = _pixels(path, o_start + tile * STEPS + (o_n // 8 * 2 + o_n % 2), o_end, EVEN, TABLE)
    return o_b, o_p, m_t


@triton.jit
def _locate_map(
    path, tile, o_c, n_lanes, segments, segment_tiles, length, dim,
    STEPS: tl.constexpr, EVEN: tl.constexpr, EVEN_C: tl.constexpr, TABLE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Images [4], pixels [4, STEPS], and offsets and mask of a tile in a contiguous map (B, L, E), each
    [4, 8, STEPS, BC / 8].
    """
    o_b, _, o_start, o_end = _lanes(tl.arange(0, 4), n_lanes, segments, segment_tiles * STEPS, length, INDEX)
    o_t = (o_start + tile * STEPS)[:, None] + tl.arange(0, STEPS)[None, :]
    o_p, m_t = _pixels(path, o_t, tl.broadcast_to(o_end[:, None], (4, STEPS)), EVEN, TABLE)
    o_map = ((o_b[:, None] * length + o_p) * dim)[:, None, :, None] + o_c[None, :, None, :]
    return o_b, o_p, o_map, _in_channels(m_t[:, None, :, None], o_c[None, :, None, :], dim, EVEN_C)


@triton.jit
def _route(routes, field):
    """One of the route numbers that ``routes`` packs in 7 bits each: forward and reversed route of each group.

    Above them, from bit 28 on, is a bit for each group: whether its path runs along columns.
    """
    return (routes >> (field * 7)) & 127


# Step sizes ------------------------------------------------------------------------------------------------------
# The kernels work with steps times log2(e), so that a decay is one exp2, and with states times log2(e), so that a
# state's input is (step * x) * B; what leaves them is scaled by ln(2) once.


@triton.jit
def _softplus(b_s, EXACT: tl.constexpr):
    """log2(1 + exp2(s)) = max(s, 0) + log2(1 + e) with e = exp2(-|s|).

    log2(1 + e) / e is a minimax polynomial on [0, 1]: relative error 1.3e-6, or 6e-5 where the steps come from 16-bit
    rows. tl.log2 costs about 20 instructions, and 1 + e loses the small steps.
    """
    b_e = tl.exp2(-tl.abs(b_s))
    if EXACT:
        b_p = 0.02039729245007038 * b_e - 0.09578701853752136
        b_p = b_p * b_e + 0.21527500450611115
        b_p = b_p * b_e - 0.33908650279045105
        b_p = b_p * b_e + 0.4776690900325775
        b_p = b_p * b_e - 0.721159815788269
        b_p = b_p * b_e + 1.4426932334899902
    else:
        b_p = 0.05965258181095123 * b_e - 0.2271222174167633
        b_p = b_p * b_e + 0.4419010579586029
        b_p = b_p * b_e - 0.7169879078865051
        b_p = b_p * b_e + 1.4426132440567017
    return tl.maximum(b_s, 0.0) + b_p * b_e


@triton.jit
def _load_rows(p_rows, o_prow, m_t, WIDTH: tl.constexpr, BR: tl.constexpr):
    """``WIDTH`` entries of packed rows, transposed: [BR, 4 * STEPS]."""
    o_r = tl.arange(0, BR)
    return tl.trans(
        tl.load(p_rows + o_prow[:, None] + o_r[None, :], mask=m_t[:, None] & (o_r < WIDTH)[None, :], other=0.0)
    )


@triton.jit
def _store_rows(p_grow, b, m_t, WIDTH: tl.constexpr):
    """Write columns of b [., 32] as packed rows."""
    o_r = tl.arange(0, b.shape[0])
    m_r = m_t[:, None] & (o_r < WIDTH)[None, :]
    p_r = p_grow[:, None] + o_r[None, :]
    tl.store(p_r, (tl.trans(b) * _LN2).to(p_grow.dtype.element_ty), mask=m_r)


@triton.jit
def _parameters(
    p_weight,
    p_bias,
    k,
    o_c,
    m_c,
    dim,
    BR: tl.constexpr,
    RANK: tl.constexpr,
    LOW_RANK: tl.constexpr,
    dtype: tl.constexpr,
):
    """Offsets [BC] of a route's channels, their bias, and weight [BC, BR]."""
    o_e = k * dim + o_c
    b_bias = tl.load(p_bias + o_e, mask=m_c, other=0.0) * _LOG2E
    b_w = tl.zeros((1, 1), dtype)
    if LOW_RANK:
        o_r = tl.arange(0, BR)
        m_w = (o_r < RANK)[None, :] & m_c[:, None]
        b_w = (tl.load(p_weight + o_e[:, None] * RANK + o_r[None, :], mask=m_w, other=0.0) * _LOG2E).to(dtype)
    return o_e, b_bias, b_w


@triton.jit
def _load_route(
    p_dt, p_rows, k, o_b, o_p, m_t, o_mb, o_mp, o_mc, m_map, b_w, b_bias,
    stride_dt_b, stride_dt_p, stride_dt_k, stride_row_b, stride_row_p, stride_row_k,
    BC: tl.constexpr, BR: tl.constexpr, RANK: tl.constexpr, ALIGN: tl.constexpr,
    STEPS: tl.constexpr, LOW_RANK: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """What a route says about a tile: its packed rows [BR, 4 * STEPS] and raw steps [BC, 4 * STEPS]."""
    # Strides come divided by ALIGN: that lets the compiler see how wide it can load.
    o_row = (o_b * stride_row_b + k.to(INDEX) * stride_row_k + o_p.to(INDEX) * stride_row_p) * ALIGN
    b_rows = _load_rows(p_rows, o_row, m_t, RANK + 2, BR)
    if LOW_RANK:
        b_s = tl.dot(b_w, b_rows, acc=tl.broadcast_to(b_bias[:, None], (BC, 4 * STEPS)), input_precision=PRECISION)
    else:
        o_dt = (o_mb * stride_dt_b + k.to(INDEX) * stride_dt_k)[:, None] + o_mp.to(INDEX) * stride_dt_p
        b_dt = _load_tile(p_dt, o_dt[:, None, :, None] + o_mc[None, :, None, :], m_map, BC, STEPS)
        b_s = b_dt * _LOG2E + b_bias[:, None]
    return b_rows, b_s


@triton.jit
def _steps(b_s, m_t, SOFTPLUS: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr):
    """Step sizes [BC, 4 * STEPS]; 0 beyond the path's end, where the state must stay as it is."""
    if SOFTPLUS:
        b_s = _softplus(b_s, EXACT)
    if not EVEN:
        b_s = tl.where(m_t[None, :], b_s, 0.0)
    return b_s


@triton.jit
def _select(b_rows, column, BC: tl.constexpr, PRECISION: tl.constexpr):
    """Rows ``column`` and ``column + 1`` of ``b_rows``, each repeated for all channels: [BC, 4 * STEPS] in float32.

    One product with unit vectors is exact and arrives in the layout of the step sizes. Loading the two columns would
    touch every packed row's cache line again.
    """
    o_unit = column + tl.arange(0, 16) // 8
    b_unit = tl.where(o_unit[:, None] == tl.arange(0, b_rows.shape[0])[None, :], 1.0, 0.0).to(b_rows.dtype)
    b = tl.dot(b_unit, b_rows, input_precision=PRECISION)
    b_B, b_C = tl.split(tl.permute(tl.reshape(b, (2, 8, b.shape[1])), (1, 2, 0)))
    return _repeat_rows(b_B, BC), _repeat_rows(b_C, BC)


# Recurrences over the steps of a tile ----------------------------------------------------------------------------


@triton.jit
def _recur_4(b_h, b_a, b_b, BC: tl.constexpr):
    a_0, a_1, a_2, a_3 = _split_time(b_a, BC)
    b_0, b_1, b_2, b_3 = _split_time(b_b, BC)
    h_0 = a_0 * b_h + b_0
    h_1 = a_1 * h_0 + b_1
    h_2 = a_2 * h_1 + b_2
    h_3 = a_3 * h_2 + b_3
    return _join_time(h_0, h_1, h_2, h_3, BC), h_3


@triton.jit
def _recur_reversed_4(b_h, b_a, b_b, BC: tl.constexpr):
    a_0, a_1, a_2, a_3 = _split_time(b_a, BC)
    b_0, b_1, b_2, b_3 = _split_time(b_b, BC)
    h_3 = a_3 * b_h + b_3
    h_2 = a_2 * h_3 + b_2
    h_1 = a_1 * h_2 + b_1
    h_0 = a_0 * h_1 + b_0
    return _join_time(h_0, h_1, h_2, h_3, BC), h_0


@triton.jit
def _recur(b_h, b_a, b_b, BC: tl.constexpr):
    """h <- a h + b from the first step to the last: the states after each step, and the last one."""
    if b_a.shape[1] == 32:
        a_1, a_2 = _halves(b_a, BC)
        b_1, b_2 = _halves(b_b, BC)
        h_1, b_h = _recur_4(b_h, a_1, b_1, BC)
        h_2, b_h = _recur_4(b_h, a_2, b_2, BC)
        return _whole(h_1, h_2, BC), b_h
    else:
        return _recur_4(b_h, b_a, b_b, BC)


@triton.jit
def _recur_reversed(b_h, b_a, b_b, BC: tl.constexpr):
    """h <- a h + b from the last step to the first."""
    if b_a.shape[1] == 32:
        a_1, a_2 = _halves(b_a, BC)
        b_1, b_2 = _halves(b_b, BC)
        h_2, b_h = _recur_reversed_4(b_h, a_2, b_2, BC)
        h_1, b_h = _recur_reversed_4(b_h, a_1, b_1, BC)
        return _whole(h_1, h_2, BC), b_h
    else:
        return _recur_reversed_4(b_h, b_a, b_b, BC)


@triton.jit
def _collect_4(b_h, b_before, b_a, b_b, BC: tl.constexpr):
    a_0, a_1, a_2, a_3 = _split_time(b_a, BC)
    b_0, b_1, b_2, b_3 = _split_time(b_b, BC)
    a_0 = b_before * a_0
    a_1 = a_0 * a_1
    a_2 = a_1 * a_2
    a_3 = a_2 * a_3
    return b_h + a_0 * b_0 + a_1 * b_1 + a_2 * b_2 + a_3 * b_3, a_3


@triton.jit
def _collect_reversed_4(b_h, b_after, b_a, b_b, BC: tl.constexpr):
    a_0, a_1, a_2, a_3 = _split_time(b_a, BC)
    b_0, b_1, b_2, b_3 = _split_time(b_b, BC)
    a_3 = b_after * a_3
    a_2 = a_3 * a_2
    a_1 = a_2 * a_1
    return b_h + b_after * b_3 + a_3 * b_2 + a_2 * b_1 + a_1 * b_0, a_1 * a_0


@triton.jit
def _collect(b_h, b_before, b_a, b_b, BC: tl.constexpr):
    """h + sum over steps of (product of all decays up to the step, its own too) * b: what reaches the path's start."""
    if b_a.shape[1] == 32:
        a_1, a_2 = _halves(b_a, BC)
        b_1, b_2 = _halves(b_b, BC)
        b_h, b_before = _collect_4(b_h, b_before, a_1, b_1, BC)
        b_h, b_before = _collect_4(b_h, b_before, a_2, b_2, BC)
    else:
        b_h, b_before = _collect_4(b_h, b_before, b_a, b_b, BC)
    return b_h


@triton.jit
def _collect_reversed(b_h, b_after, b_a, b_b, BC: tl.constexpr):
    """h + sum over steps of (product of the decays of all later steps) * b: what reaches the segment's end."""
    if b_a.shape[1] == 32:
        a_1, a_2 = _halves(b_a, BC)
        b_1, b_2 = _halves(b_b, BC)
        b_h, b_after = _collect_reversed_4(b_h, b_after, a_2, b_2, BC)
        b_h, b_after = _collect_reversed_4(b_h, b_after, a_1, b_1, BC)
    else:
        b_h, b_after = _collect_reversed_4(b_h, b_after, b_a, b_b, BC)
    return b_h


@triton.jit
def _adjoint_4(b_q, b_a, b_c, BC: tl.constexpr):
    a_0, a_1, a_2, a_3 = _split_time(b_a, BC)
    c_0, c_1, c_2, c_3 = _split_time(b_c, BC)
    g_3 = b_q + c_3
    g_2 = a_3 * g_3 + c_2
    g_1 = a_2 * g_2 + c_1
    g_0 = a_1 * g_1 + c_0
    return _join_time(g_0, g_1, g_2, g_3, BC), a_0 * g_0


@triton.jit
def _adjoint_reversed_4(b_q, b_a, b_c, BC: tl.constexpr):
    a_0, a_1, a_2, a_3 = _split_time(b_a, BC)
    c_0, c_1, c_2, c_3 = _split_time(b_c, BC)
    g_0 = b_q + c_0
    g_1 = a_0 * g_0 + c_1
    g_2 = a_1 * g_1 + c_2
    g_3 = a_2 * g_2 + c_3
    return _join_time(g_0, g_1, g_2, g_3, BC), a_3 * g_3


@triton.jit
def _adjoint(b_q, b_a, b_c, BC: tl.constexpr):
    """G_t = q_t + c_t, q_{t-1} = a_t G_t from the last step to the first: all G, and the q that leaves the tile."""
    if b_a.shape[1] == 32:
        a_1, a_2 = _halves(b_a, BC)
        c_1, c_2 = _halves(b_c, BC)
        g_2, b_q = _adjoint_4(b_q, a_2, c_2, BC)
        g_1, b_q = _adjoint_4(b_q, a_1, c_1, BC)
        return _whole(g_1, g_2, BC), b_q
    else:
        return _adjoint_4(b_q, b_a, b_c, BC)


@triton.jit
def _adjoint_reversed(b_q, b_a, b_c, BC: tl.constexpr):
    """The adjoint of a reversed route, from the first step to the last."""
    if b_a.shape[1] == 32:
        a_1, a_2 = _halves(b_a, BC)
        c_1, c_2 = _halves(b_c, BC)
        g_1, b_q = _adjoint_reversed_4(b_q, a_1, c_1, BC)
        g_2, b_q = _adjoint_reversed_4(b_q, a_2, c_2, BC)
        return _whole(g_1, g_2, BC), b_q
    else:
        return _adjoint_reversed_4(b_q, b_a, b_c, BC)

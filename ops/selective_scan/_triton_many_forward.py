"""Triton kernels of the selective scan with several states: the forward pass. See _triton_many.py for the design."""

import triton
import triton.language as tl

from subquad.ops.selective_scan._triton_tiles import (
    _LN2,
    _LOG2E,
    _channels,
    _collect,
    _in_channels,
    _kernel,
    _lanes,
    _load_rows,
    _load_tile,
    _parameters,
    _pixels,
    _recur,
    _repeat_rows,
    _steps,
    _store_state,
    _sum_time,
    _to_map,
)

# Addresses -------------------------------------------------------------------------------------------------------
# Here a route is walked from its own start. Its steps are counted on the path padded to whole segments: those of a
# reversed route begin with the padding, so that chunks of pixels are chunks of steps for it too.


@triton.jit
def _way(p_table, k, length, padded, height, width, magic, shift, columns, reversed_routes):
    """What ``_visited`` knows of route k; ``columns`` and ``reversed_routes`` have a bit for each route."""
    column = (columns >> k) & 1
    path = p_table + k.to(tl.int64) * length, 1 + column * (height - 1), width, 1 + column * (magic - 1), column * shift
    return path, padded - 1, (reversed_routes >> k) & 1


@triton.jit
def _visited(way, o_t, o_end, EVEN: tl.constexpr, TABLE: tl.constexpr):
    """Pixels that a route visits at its steps, and which of the steps there are."""
    path, last, backwards = way
    return _pixels(path, o_t + backwards * (last - 2 * o_t), o_end, EVEN, TABLE)


@triton.jit
def _locate(
    way, tile, o_c, n_lanes, segments, segment_tiles, length, dim,
    STEPS: tl.constexpr, EVEN: tl.constexpr, EVEN_C: tl.constexpr, TABLE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Image, pixel and mask of a tile's columns, each [4 * STEPS]; images [4], pixels [4, STEPS], and offsets and mask
    in a contiguous map (B, L, E), each [4, 8, STEPS, BC / 8].
    """
    o_n = tl.arange(0, 4 * STEPS)
    o_nb, _, o_start, o_end = _lanes(o_n % 8 // 2, n_lanes, segments, segment_tiles * STEPS, length, INDEX)
    o_np, m_t = _visited(way, o_start + tile * STEPS + (o_n // 8 * 2 + o_n % 2), o_end, EVEN, TABLE)
    o_mb, _, o_start, o_end = _lanes(tl.arange(0, 4), n_lanes, segments, segment_tiles * STEPS, length, INDEX)
    o_t = (o_start + tile * STEPS)[:, None] + tl.arange(0, STEPS)[None, :]
    o_mp, m_mt = _visited(way, o_t, tl.broadcast_to(o_end[:, None], (4, STEPS)), EVEN, TABLE)
    o_map = ((o_mb[:, None] * length + o_mp) * dim)[:, None, :, None] + o_c[None, :, None, :]
    m_map = _in_channels(m_mt[:, None, :, None], o_c[None, :, None, :], dim, EVEN_C)
    return o_nb, o_np, m_t, o_mb, o_mp, o_map, m_map


@triton.jit
def _raw_steps(
    p_dt, k, o_nb, o_np, m_t, o_mb, o_mp, o_mc, m_map, b_w, b_bias, stride_b, stride_p, stride_k,
    BC: tl.constexpr, BR: tl.constexpr, RANK: tl.constexpr, ALIGN: tl.constexpr, STEPS: tl.constexpr,
    LOW_RANK: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Low-rank entries [BR, 4 * STEPS] (nothing for full-rank steps) and a tile's steps before softplus."""
    # Strides come divided by ALIGN: that lets the compiler see how wide it can load.
    if LOW_RANK:
        o_row = (o_nb * stride_b + k.to(INDEX) * stride_k + o_np.to(INDEX) * stride_p) * ALIGN
        b_rows = _load_rows(p_dt, o_row, m_t, RANK, BR)
        b_s = tl.dot(b_w, b_rows, acc=tl.broadcast_to(b_bias[:, None], (BC, 4 * STEPS)), input_precision=PRECISION)
    else:
        o_dt = ((o_mb * stride_b + k.to(INDEX) * stride_k)[:, None] + o_mp.to(INDEX) * stride_p) * ALIGN
        b_rows = b_w
        b_dt = _load_tile(p_dt, o_dt[:, None, :, None] + o_mc[None, :, None, :], m_map, BC, STEPS)
        b_s = b_dt * _LOG2E + b_bias[:, None]
    return b_rows, b_s


@triton.jit
def _turned(o_b, o_segment, k, n_routes, padded, segment_steps, N: tl.constexpr, STEPS: tl.constexpr):
    """Offsets of a segment's first tile in turned rows (B, K, tiles, 2 N, STEPS): [4, 8, STEPS], equal along the 8."""
    o_first = ((o_b * n_routes + k) * padded + o_segment * segment_steps) * (2 * N)
    return o_first[:, None, None] + tl.zeros((1, 8, 1), tl.int32) + tl.arange(0, STEPS)[None, None, :]


@triton.jit
def _block(
    p_table, length, padded, height, width, magic, shift, n_routes, columns, reversed_routes,
    N: tl.constexpr, STEPS: tl.constexpr, BT: tl.constexpr,
    EVEN: tl.constexpr, TABLE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Image, route, pixels, mask and offsets in the turned rows of this program's BT steps."""
    blocks = padded // BT
    path = tl.program_id(0) // blocks
    k = path % n_routes
    way = _way(p_table, k, length, padded, height, width, magic, shift, columns, reversed_routes)
    o_t = tl.program_id(0) % blocks * BT + tl.arange(0, BT)
    o_p, m_t = _visited(way, o_t, tl.zeros((BT,), tl.int32) + length, EVEN, TABLE)
    o_turned = (path.to(INDEX) * padded + o_t // STEPS * STEPS) * (2 * N) + o_t % STEPS
    return (path // n_routes).to(INDEX), k, o_p, m_t, o_turned


@triton.jit
def _spread(b, BC: tl.constexpr):
    """[lane, 8 times the same, step] -> [BC, 4 * STEPS] in float32, the same for all channels."""
    b = tl.reshape(b, (4, 8, b.shape[2] // 2, 2))
    return _repeat_rows(tl.reshape(tl.permute(b, (1, 2, 0, 3)), (8, 8 * b.shape[2])).to(tl.float32), BC)


@triton.jit
def _load_turned(p_turned, row, BC: tl.constexpr, STEPS: tl.constexpr):
    """Row ``row`` of a turned tile for all channels, [BC, 4 * STEPS] in float32.

    All threads load what they use themselves, 16 bytes at once: cheaper than sending it from one to the others.
    """
    return _spread(tl.load(p_turned + row * STEPS), BC)


# A kernel has its states in a tuple, memory has them in a dimension. All of them are loaded or stored at once: for each
# load and store the compiler looks at all of the kernel, and that takes it longer than everything else. Both ways take
# a round for each doubling, 5 at most: more states than the op allows.


@triton.jit
def _unstack(b, N: tl.constexpr):
    """[., ., power of two above 1] -> the first N of as many [., .]."""
    bs = (b,)
    for _round in tl.static_range(5):
        if len(bs) < b.shape[2]:
            b_evens, b_odds = (), ()
            for i in tl.static_range(len(bs)):
                if 2 * len(bs) < b.shape[2]:
                    b_even, b_odd = tl.split(tl.reshape(bs[i], (b.shape[0], b.shape[1], b.shape[2] // len(bs) // 2, 2)))
                else:
                    b_even, b_odd = tl.split(bs[i])
                b_evens, b_odds = b_evens + (b_even,), b_odds + (b_odd,)
            bs = b_evens + b_odds
    return bs[:N]


@triton.jit
def _stack(bs, N: tl.constexpr):
    """The inverse of ``_unstack``; anything takes the places beyond the N-th."""
    for _place in tl.static_range(triton.next_power_of_2(N) - N):
        bs = bs + (bs[0],)
    for _round in tl.static_range(5):
        if len(bs) > 1:
            b_pairs = ()
            for i in tl.static_range(len(bs) // 2):
                b_pairs = b_pairs + (tl.join(bs[i], bs[i + len(bs) // 2]),)
            bs = b_pairs
    return tl.reshape(bs[0], (bs[0].shape[0], bs[0].shape[1], triton.next_power_of_2(N)))


@triton.jit
def _decays(p_A, o_e, m_c, N: tl.constexpr):
    """A of each state, [BC, 1] each."""
    o_n = tl.arange(0, triton.next_power_of_2(N))
    b_A = tl.load(p_A + (o_e * N)[:, None] + o_n, mask=m_c[:, None] & (o_n < N), other=0.0)
    return _unstack(b_A[:, None, :], N)


@triton.jit
def _load_states(p_state, stride, m_state, N: tl.constexpr, BC: tl.constexpr):
    """[lane, channel group, channel] of each state, ``stride`` numbers apart -> [BC, 4] each."""
    o_n = tl.arange(0, triton.next_power_of_2(N))
    b = tl.load(p_state[:, :, :, None] + o_n * stride, mask=m_state[:, :, :, None] & (o_n < N), other=0.0)
    return _unstack(tl.reshape(tl.permute(b, (2, 1, 0, 3)), (BC, 4, b.shape[3])), N)


@triton.jit
def _store_states(p_state, stride, bs, factor, m_state, N: tl.constexpr, BC: tl.constexpr):
    b = _stack(bs, N) * factor
    o_n = tl.arange(0, b.shape[2])
    b = tl.permute(tl.reshape(b, (BC // 8, 8, 4, b.shape[2])), (2, 1, 0, 3))
    tl.store(p_state[:, :, :, None] + o_n * stride, b, mask=m_state[:, :, :, None] & (o_n < N))


# Kernels ---------------------------------------------------------------------------------------------------------


@_kernel
def selective_scan_turn_kernel(
    p_rows, p_table, p_turned,
    length, padded, stride_row_b, stride_row_p, stride_row_k,
    height, width, magic, shift, n_routes, columns, reversed_routes,
    N: tl.constexpr, RANK: tl.constexpr, ALIGN: tl.constexpr, STEPS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    EVEN: tl.constexpr, TABLE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """B and C of packed rows (R + 2 N of a pixel and route) as (B, K, tiles, 2 N, STEPS), in the order of each route's
    steps, zero in the padding.

    Grid (B * K * padded / BT).
    """
    i_b, k, o_p, m_t, o_turned = _block(
        p_table, length, padded, height, width, magic, shift, n_routes, columns, reversed_routes,
        N, STEPS, BT, EVEN, TABLE, INDEX,
    )  # fmt: skip
    o_j = tl.arange(0, BN)
    o_row = (i_b * stride_row_b + k.to(INDEX) * stride_row_k + o_p.to(INDEX) * stride_row_p) * ALIGN
    m_row = m_t[:, None] & (o_j < 2 * N)[None, :]
    b = tl.load(p_rows + (o_row + RANK)[:, None] + o_j[None, :], mask=m_row, other=0.0)
    tl.store(p_turned + (o_j * STEPS)[:, None] + o_turned[None, :], tl.trans(b), mask=(o_j < 2 * N)[:, None])


@_kernel
def selective_scan_many_kernel_ends(
    p_map, p_dt, p_turned, p_weight, p_bias, p_A, p_table, p_ends, p_totals,
    n_lanes, length, padded, segments, segment_tiles, dim, stride_dt_b, stride_dt_p, stride_dt_k,
    height, width, magic, shift, n_routes, columns, reversed_routes,
    N: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, RANK: tl.constexpr, ALIGN: tl.constexpr,
    STEPS: tl.constexpr, ADJOINT: tl.constexpr,
    LOW_RANK: tl.constexpr, SOFTPLUS: tl.constexpr, EVEN: tl.constexpr, EVEN_C: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """What leaves a segment that nothing enters, and the sum of its steps.

    Of the map x the states at its end, from x and B; with ADJOINT, of the map of gradients of y, the adjoint states at
    its start, from these and C. Grid (E / BC, lanes / 4, K), one warp.
    """
    k = tl.program_id(2)
    way = _way(p_table, k, length, padded, height, width, magic, shift, columns, reversed_routes)
    o_b, o_segment, _, o_end = _lanes(tl.arange(0, 4), n_lanes, segments, segment_tiles * STEPS, length, INDEX)
    o_c, o_sc = _channels(tl.program_id(0), BC)
    m_c = _in_channels(tl.full((BC,), True, tl.int1), o_c, dim, EVEN_C)
    m_state = _in_channels((o_end > 0)[:, None, None], o_sc[None, :, :], dim, EVEN_C)
    o_e, b_bias, b_w = _parameters(p_weight, p_bias, k, o_c, m_c, dim, BR, RANK, LOW_RANK, p_dt.dtype.element_ty)
    p_turned += _turned(o_b, o_segment, k, n_routes, padded, segment_tiles * STEPS, N, STEPS)
    b_As = _decays(p_A, o_e, m_c, N)
    b_total = tl.zeros((BC, 4), dtype=tl.float32)
    b_hs = ()
    for _n in tl.static_range(N):
        b_hs = b_hs + (b_total,)
    for tile in range(segment_tiles):
        o_nb, o_np, m_t, o_mb, o_mp, o_map, m_map = _locate(
            way, tile, o_sc, n_lanes, segments, segment_tiles, length, dim, STEPS, EVEN, EVEN_C, TABLE, INDEX
        )
        b_in = _load_tile(p_map, o_map, m_map, BC, STEPS)
        _b_rows, b_s = _raw_steps(
            p_dt, k, o_nb, o_np, m_t, o_mb, o_mp, o_sc, m_map, b_w, b_bias, stride_dt_b, stride_dt_p, stride_dt_k,
            BC, BR, RANK, ALIGN, STEPS, LOW_RANK, PRECISION, INDEX,
        )  # fmt: skip
        b_d = _steps(b_s, m_t, SOFTPLUS, EVEN, EXACT)
        if not ADJOINT:
            b_in *= b_d
        b_ends = ()
        for n in tl.static_range(N):
            b_a = tl.exp2(b_d * b_As[n])
            if ADJOINT:
                b_b = b_in * _load_turned(p_turned, N + n, BC, STEPS)
                b_h = _collect(b_hs[n], tl.exp2(b_total * b_As[n]), b_a, b_b, BC)
            else:
                _b_each, b_h = _recur(b_hs[n], b_a, b_in * _load_turned(p_turned, n, BC, STEPS), BC)
            b_ends = b_ends + (b_h,)
        b_hs = b_ends
        b_total += _sum_time(b_d, BC)
        p_turned += 2 * N * STEPS
    o_total = ((o_b * n_routes + k) * segments + o_segment) * dim
    _store_state(p_totals + o_total[:, None, None] + o_sc[None, :, :], b_total, m_state, BC)
    p_end = p_ends + (o_total * N)[:, None, None] + o_sc[None, :, :]
    factor: tl.constexpr = 1.0 if ADJOINT else _LN2
    _store_states(p_end, dim, b_hs, factor, m_state, N, BC)


@triton.jit
def _chunk(tile, o_segment, backwards, segments, segment_tiles, TILES: tl.constexpr):
    """Number, along the path, of the chunk that a tile lies in."""
    o_chunk = (o_segment * segment_tiles + tile) // TILES
    return o_chunk + backwards * (segments * segment_tiles // TILES - 1 - 2 * o_chunk)


@_kernel
def selective_scan_many_fwd_kernel(
    p_x, p_dt, p_turned, p_weight, p_bias, p_A, p_D, p_table, p_entries, p_states, p_y,
    n_lanes, length, padded, segments, segment_tiles, dim, stride_dt_b, stride_dt_p, stride_dt_k,
    height, width, magic, shift, n_routes, columns, reversed_routes, slots, images,
    N: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, RANK: tl.constexpr, ALIGN: tl.constexpr,
    STEPS: tl.constexpr, CHUNK: tl.constexpr, TWO_LEVEL: tl.constexpr, ENTRY: tl.constexpr,
    LOW_RANK: tl.constexpr, SOFTPLUS: tl.constexpr, EVEN: tl.constexpr, EVEN_C: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """h_t[n] = exp(d_t A[n]) h_{t-1}[n] + d_t B_t[n] x_t;  y_t = C_t . h_t + D x_t, for one route: y to (K, B, L, E).

    Grid (E / BC, lanes / 4, K), one warp; on chip: all states. Those that enter chunks are saved, and the last ones.
    All arithmetic is fp32.
    """
    k = tl.program_id(2)
    way = _way(p_table, k, length, padded, height, width, magic, shift, columns, reversed_routes)
    o_b, o_segment, _, o_end = _lanes(tl.arange(0, 4), n_lanes, segments, segment_tiles * STEPS, length, INDEX)
    o_c, o_sc = _channels(tl.program_id(0), BC)
    m_c = _in_channels(tl.full((BC,), True, tl.int1), o_c, dim, EVEN_C)
    m_state = _in_channels((o_end > 0)[:, None, None], o_sc[None, :, :], dim, EVEN_C)
    o_e, b_bias, b_w = _parameters(p_weight, p_bias, k, o_c, m_c, dim, BR, RANK, LOW_RANK, p_dt.dtype.element_ty)
    b_D = tl.load(p_D + o_e, mask=m_c, other=0.0)
    p_turned += _turned(o_b, o_segment, k, n_routes, padded, segment_tiles * STEPS, N, STEPS)
    o_route = o_b * n_routes + k
    p_state = p_states + (o_route * slots * dim * N)[:, None, None] + (o_sc * N)[None, :, :]
    p_entry = p_entries + ((o_route * segments + o_segment) * dim * N)[:, None, None] + o_sc[None, :, :]
    p_route = p_y + k.to(tl.int64) * images * length * dim
    b_As = _decays(p_A, o_e, m_c, N)
    b_hs = ()
    if ENTRY:
        b_given = _load_states(p_entry, dim, m_state, N, BC)
        for n in tl.static_range(N):
            b_hs = b_hs + (b_given[n] * _LOG2E,)
    else:
        for _n in tl.static_range(N):
            b_hs = b_hs + (tl.zeros((BC, 4), dtype=tl.float32),)
    for tile in range(segment_tiles):
        o_nb, o_np, m_t, o_mb, o_mp, o_map, m_map = _locate(
            way, tile, o_sc, n_lanes, segments, segment_tiles, length, dim, STEPS, EVEN, EVEN_C, TABLE, INDEX
        )
        b_x = _load_tile(p_x, o_map, m_map, BC, STEPS)
        _b_rows, b_s = _raw_steps(
            p_dt, k, o_nb, o_np, m_t, o_mb, o_mp, o_sc, m_map, b_w, b_bias, stride_dt_b, stride_dt_p, stride_dt_k,
            BC, BR, RANK, ALIGN, STEPS, LOW_RANK, PRECISION, INDEX,
        )  # fmt: skip
        if tile % (CHUNK // STEPS) == 0:
            o_chunk = _chunk(tile, o_segment, way[2], segments, segment_tiles, CHUNK // STEPS)
            m_save = m_state & (o_chunk < slots - 1)[:, None, None]
            _store_states(p_state + (o_chunk * dim * N)[:, None, None], 1, b_hs, _LN2, m_save, N, BC)
        b_d = _steps(b_s, m_t, SOFTPLUS, EVEN, EXACT)
        b_dx = b_d * b_x
        b_y = tl.zeros((BC, 4 * STEPS), dtype=tl.float32)
        b_ends = ()
        for n in tl.static_range(N):
            b_B = _load_turned(p_turned, n, BC, STEPS)
            b_C = _load_turned(p_turned, N + n, BC, STEPS)
            b_each, b_h = _recur(b_hs[n], tl.exp2(b_d * b_As[n]), b_dx * b_B, BC)
            b_y += b_each * b_C
            b_ends = b_ends + (b_h,)
        b_hs = b_ends
        b_y = _to_map(b_y * _LN2 + b_x * b_D[:, None], BC, STEPS)
        tl.store(p_route + o_map, b_y.to(p_y.dtype.element_ty), mask=m_map)
        p_turned += 2 * N * STEPS
    if not TWO_LEVEL:
        _store_states(p_state + (slots - 1) * dim * N, 1, b_hs, _LN2, m_state, N, BC)


@_kernel
def selective_scan_kernel_sum(p_parts, p_sum, numbers, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum [PARTS, numbers] over the first axis, in order. Grid (numbers / BLOCK)."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        b += tl.load(p_parts + part * numbers.to(tl.int64) + o, mask=o < numbers, other=0.0).to(tl.float32)
    tl.store(p_sum + o, b.to(p_sum.dtype.element_ty), mask=o < numbers)

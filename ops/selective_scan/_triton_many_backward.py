"""Triton kernels of the selective scan with several states: the backward pass. See _triton_many.py for the design."""

import triton
import triton.language as tl

from subquad.ops.selective_scan._triton_many_forward import (
    _block,
    _chunk,
    _locate,
    _raw_steps,
    _spread,
    _turned,
    _way,
)
from subquad.ops.selective_scan._triton_tiles import (
    _LN2,
    _LOG2E,
    _adjoint,
    _channels,
    _in_channels,
    _kernel,
    _lanes,
    _load_state,
    _load_tile,
    _parameters,
    _recur,
    _steps,
    _store_rows,
    _store_state,
    _sum_time,
    _to_map,
)


@triton.jit
def _slots(p_scratch, o_sc, size, BC: tl.constexpr):
    """Where a program's states wait: [lane, channel group, channel] of the first one."""
    i_program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * tl.num_programs(0)
    o_slot = (tl.arange(0, 4) * BC)[:, None, None] + o_sc[None, :, :] - tl.program_id(0) * BC
    return p_scratch + (i_program + tl.program_id(0)) * size + o_slot


@triton.jit
def _entering(p_A, p_h, p_B, n, m_c, m_state, BC: tl.constexpr):
    """A, the state that enters a tile, and B of state n: loaded while state n - 1 is being worked on."""
    b_A = tl.load(p_A + n, mask=m_c, other=0.0)
    return b_A, _load_state(p_h + n * (4 * BC), m_state, BC), tl.load(p_B + n * p_B.shape[2])


@triton.jit
def _leaving(p_q, p_gA, p_C, n, m_state, BC: tl.constexpr):
    """The adjoint state that enters a tile from its end, the sum of gA so far, and C of state n."""
    b_q = _load_state(p_q + n * (4 * BC), m_state, BC)
    return b_q, _load_state(p_gA + n * (4 * BC), m_state, BC), tl.load(p_C + n * p_C.shape[2])


@triton.jit
def _sum_channels(b, STEPS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Column sums of [BC, 4 * STEPS] as [lane, repeated, step], by a product with ones."""
    b_ones = tl.full((16, b.shape[0]), 1.0, DOT)
    b = tl.reshape(tl.dot(b_ones, b.to(DOT), input_precision=PRECISION), (2, 8, STEPS // 2, 4, 2))
    b, _same = tl.split(tl.permute(b, (3, 1, 2, 4, 0)))
    return tl.reshape(b, (4, 8, STEPS))


@_kernel
def selective_scan_many_bwd_kernel(
    p_gy, p_x, p_dt, p_turned, p_weight, p_bias, p_A, p_D, p_table, p_states, p_entries,
    p_gx, p_gdt, p_grows, p_gturned, p_gweight, p_gparams, p_ginitial, p_scratch,
    n_lanes, length, padded, segments, segment_tiles, dim, stride_dt_b, stride_dt_p, stride_dt_k,
    height, width, magic, shift, n_routes, columns, reversed_routes, slots, images,
    N: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, RANK: tl.constexpr, ALIGN: tl.constexpr,
    STEPS: tl.constexpr, CHUNK: tl.constexpr, TWO_LEVEL: tl.constexpr, ENTRY: tl.constexpr,
    KEEP_INITIAL: tl.constexpr,
    LOW_RANK: tl.constexpr, SOFTPLUS: tl.constexpr, EVEN: tl.constexpr, EVEN_C: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, DOT: tl.constexpr, ROW: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Gradients of all inputs for one route, chunk by chunk from its end: formulas at ``selective_scan_bwd_kernel``.

    Grid (E / BC, lanes / 4, K), one warp. A chunk's states are computed again from the saved one that enters it; those
    that enter its tiles, adjoint states and sums of gA wait in ``p_scratch`` (L1). Sums over channels go to
    ``p_gturned`` ([grid 0, B, K, tiles, 2 N, STEPS]: gB, gC) and ``p_grows`` ([grid 0, B, L, K, ROW]: low-rank gdt),
    sums over lanes to ``p_gparams`` ([grid 1, K, E, N + 2]: gA, gD, gbias) and ``p_gweight`` ([grid 1, K, E, BR]), a
    route's share of gx to ``p_gx`` (K, B, L, E); all are added up outside, in a fixed order.
    """
    k = tl.program_id(2)
    way = _way(p_table, k, length, padded, height, width, magic, shift, columns, reversed_routes)
    o_b, o_segment, _, o_end = _lanes(tl.arange(0, 4), n_lanes, segments, segment_tiles * STEPS, length, INDEX)
    o_c, o_sc = _channels(tl.program_id(0), BC)
    m_c = _in_channels(tl.full((BC,), True, tl.int1), o_c, dim, EVEN_C)
    m_state = _in_channels((o_end > 0)[:, None, None], o_sc[None, :, :], dim, EVEN_C)
    o_e, b_bias, b_w = _parameters(p_weight, p_bias, k, o_c, m_c, dim, BR, RANK, LOW_RANK, p_dt.dtype.element_ty)
    b_D = tl.load(p_D + o_e, mask=m_c, other=0.0)
    tiles: tl.constexpr = CHUNK // STEPS
    size: tl.constexpr = N * 4 * BC
    p_h = _slots(p_scratch, o_sc, (tiles + 2) * size, BC)
    p_q = p_h + tiles * size
    p_gA = p_q + size
    o_turned = _turned(o_b, o_segment, k, n_routes, padded, segment_tiles * STEPS, N, STEPS)
    p_gt = p_gturned + tl.program_id(0).to(tl.int64) * images * n_routes * (2 * N) * padded + o_turned
    m_gt = (tl.arange(0, 8) == 0)[None, :, None] & (o_end > 0)[:, None, None]
    o_route = o_b * n_routes + k
    p_state = p_states + (o_route * slots * dim * N)[:, None, None] + (o_sc * N)[None, :, :]
    p_entry = p_entries + ((o_route * segments + o_segment) * dim * N)[:, None, None] + o_sc[None, :, :]
    p_route = p_gx + k.to(tl.int64) * images * length * dim
    p_gw = p_gweight + ((tl.program_id(1).to(tl.int64) * n_routes + k) * dim + o_c)[:, None] * BR
    p_gw += tl.arange(0, BR)[None, :]
    b_zero = tl.zeros((BC, 4), dtype=tl.float32)
    b_q = b_zero
    for n in range(N):
        if ENTRY:
            b_q = _load_state(p_entry + n * dim, m_state, BC)
        _store_state(p_q + n * (4 * BC), b_q, m_state, BC)
        _store_state(p_gA + n * (4 * BC), b_zero, m_state, BC)
    b_gD = b_zero
    b_gbias = b_zero
    b_gw = tl.zeros((BC, BR), dtype=tl.float32)
    for step in range(segment_tiles // tiles):
        first = segment_tiles - (step + 1) * tiles
        o_chunk = _chunk(first, o_segment, way[2], segments, segment_tiles, tiles)
        m_saved = m_state & (o_chunk < slots - 1)[:, None, None]
        for n in range(N):
            b_h = _load_state(p_state + (o_chunk * dim * N + n)[:, None, None], m_saved, BC) * _LOG2E
            _store_state(p_h + n * (4 * BC), b_h, m_state, BC)
        for i in range(tiles - 1):
            o_nb, o_np, m_t, o_mb, o_mp, o_map, m_map = _locate(
                way, first + i, o_sc, n_lanes, segments, segment_tiles, length, dim, STEPS, EVEN, EVEN_C, TABLE, INDEX
            )
            b_x = _load_tile(p_x, o_map, m_map, BC, STEPS)
            _b_rows, b_s = _raw_steps(
                p_dt, k, o_nb, o_np, m_t, o_mb, o_mp, o_sc, m_map, b_w, b_bias, stride_dt_b, stride_dt_p, stride_dt_k,
                BC, BR, RANK, ALIGN, STEPS, LOW_RANK, PRECISION, INDEX,
            )  # fmt: skip
            b_d = _steps(b_s, m_t, SOFTPLUS, EVEN, EXACT)
            b_dx = b_d * b_x
            p_in = p_turned + o_turned + (first + i) * (2 * N * STEPS)
            b_A, b_h, b_B = _entering(p_A + o_e * N, p_h + i * size, p_in, 0, m_c, m_state, BC)
            for n in range(N):
                ahead = tl.minimum(n + 1, N - 1)
                b_A1, b_h1, b_B1 = _entering(p_A + o_e * N, p_h + i * size, p_in, ahead, m_c, m_state, BC)
                b_b = b_dx * _spread(b_B, BC)
                _b_hs, b_h = _recur(b_h, tl.exp2(b_d * b_A[:, None]), b_b, BC)
                _store_state(p_h + ((i + 1) * N + n) * (4 * BC), b_h, m_state, BC)
                b_A, b_h, b_B = b_A1, b_h1, b_B1
        for back in range(tiles):
            i = tiles - 1 - back
            tile = first + i
            o_nb, o_np, m_t, o_mb, o_mp, o_map, m_map = _locate(
                way, tile, o_sc, n_lanes, segments, segment_tiles, length, dim, STEPS, EVEN, EVEN_C, TABLE, INDEX
            )
            b_x = _load_tile(p_x, o_map, m_map, BC, STEPS)
            b_gy = _load_tile(p_gy, o_map, m_map, BC, STEPS)
            b_rows, b_s = _raw_steps(
                p_dt, k, o_nb, o_np, m_t, o_mb, o_mp, o_sc, m_map, b_w, b_bias, stride_dt_b, stride_dt_p, stride_dt_k,
                BC, BR, RANK, ALIGN, STEPS, LOW_RANK, PRECISION, INDEX,
            )  # fmt: skip
            b_d = _steps(b_s, m_t, SOFTPLUS, EVEN, EXACT)
            b_dx = b_d * b_x
            b_gB = tl.zeros((BC, 4 * STEPS), dtype=tl.float32)
            b_gp = tl.zeros((BC, 4 * STEPS), dtype=tl.float32)
            p_in = p_turned + o_turned + tile * (2 * N * STEPS)
            b_A, b_h, b_B = _entering(p_A + o_e * N, p_h + i * size, p_in, 0, m_c, m_state, BC)
            b_q, b_gA, b_C = _leaving(p_q, p_gA, p_in + N * STEPS, 0, m_state, BC)
            for n in range(N):
                ahead = tl.minimum(n + 1, N - 1)
                b_A1, b_h1, b_B1 = _entering(p_A + o_e * N, p_h + i * size, p_in, ahead, m_c, m_state, BC)
                b_q1, b_gA1, b_C1 = _leaving(p_q, p_gA, p_in + N * STEPS, ahead, m_state, BC)
                b_a = tl.exp2(b_d * b_A[:, None])
                b_Bs = _spread(b_B, BC)
                b_b = b_dx * b_Bs
                b_hs, _b_h = _recur(b_h, b_a, b_b, BC)
                b_g, b_q = _adjoint(b_q, b_a, b_gy * _spread(b_C, BC), BC)
                b_ghs = b_g * (b_hs - b_b)
                b_gB += b_g * b_Bs
                b_gp += b_ghs * (b_A * _LN2)[:, None]
                _store_state(p_q + n * (4 * BC), b_q, m_state, BC)
                _store_state(p_gA + n * (4 * BC), b_gA + _sum_time(b_ghs * b_d, BC), m_state, BC)
                b_sumB = _sum_channels(b_g * b_dx, STEPS, DOT, PRECISION)
                b_sumC = _sum_channels(b_gy * b_hs, STEPS, DOT, PRECISION)
                p_gtB = p_gt + (tile * (2 * N) + n) * STEPS
                tl.store(p_gtB, b_sumB.to(p_gturned.dtype.element_ty), mask=m_gt)
                tl.store(p_gtB + N * STEPS, b_sumC.to(p_gturned.dtype.element_ty), mask=m_gt)
                b_A, b_h, b_B, b_q, b_gA, b_C = b_A1, b_h1, b_B1, b_q1, b_gA1, b_C1
            # Loaded again: they would take registers all the while.
            b_x = _load_tile(p_x, o_map, m_map, BC, STEPS)
            b_rows, b_s = _raw_steps(
                p_dt, k, o_nb, o_np, m_t, o_mb, o_mp, o_sc, m_map, b_w, b_bias, stride_dt_b, stride_dt_p, stride_dt_k,
                BC, BR, RANK, ALIGN, STEPS, LOW_RANK, PRECISION, INDEX,
            )  # fmt: skip
            b_gs = b_gB * b_x + b_gp
            if SOFTPLUS:
                b_gs = b_gs * tl.exp2(b_s - b_d)  # sigmoid(s) = exp(s - softplus(s))
            if not EVEN:
                b_gs = tl.where(m_t[None, :], b_gs, 0.0)
            b_gD += _sum_time(b_gy * b_x, BC)
            b_gbias += _sum_time(b_gs, BC)
            if LOW_RANK:
                b_low = tl.dot(tl.trans(b_w.to(DOT)), b_gs.to(DOT), input_precision=PRECISION)
                o_row = ((tl.program_id(0).to(INDEX) * images + o_nb) * length + o_np) * n_routes + k
                _store_rows(p_grows + o_row * ROW, b_low, m_t, RANK)
                if BR > 16:
                    b_gw = tl.load(p_gw, mask=m_c[:, None] & (step * tiles + back > 0), other=0.0)
                b_gw = tl.dot(b_gs.to(DOT), tl.trans(b_rows).to(DOT), acc=b_gw, input_precision=PRECISION)
                if BR > 16:
                    tl.store(p_gw, b_gw, mask=m_c[:, None])
            else:
                o_gdt = ((o_mb[:, None] * length + o_mp) * n_routes + k) * dim
                p_gd = p_gdt + o_gdt[:, None, :, None] + o_sc[None, :, None, :]
                tl.store(p_gd, _to_map(b_gs, BC, STEPS).to(p_gdt.dtype.element_ty), mask=m_map)
            b_gx = _to_map(b_gB * b_d * _LN2 + b_gy * b_D[:, None], BC, STEPS)
            tl.store(p_route + o_map, b_gx.to(p_gx.dtype.element_ty), mask=m_map)
    p_param = p_gparams + ((tl.program_id(1).to(tl.int64) * n_routes + k) * dim + o_c) * (N + 2)
    for n in range(N):
        b_gA = _load_state(p_gA + n * (4 * BC), m_state, BC)
        tl.store(p_param + n, tl.sum(b_gA, 1) * (_LN2 * _LN2), mask=m_c)
        if KEEP_INITIAL and not TWO_LEVEL:
            b_q = _load_state(p_q + n * (4 * BC), m_state, BC)
            _store_state(
                p_ginitial + ((o_route * dim * N)[:, None, None] + (o_sc * N)[None, :, :] + n), b_q, m_state, BC
            )
    tl.store(p_param + N, tl.sum(b_gD, 1), mask=m_c)
    tl.store(p_param + (N + 1), tl.sum(b_gbias, 1), mask=m_c)
    if LOW_RANK and BR == 16:
        tl.store(p_gw, b_gw, mask=m_c[:, None])


@_kernel
def selective_scan_turn_back_kernel(
    p_gturned, p_table, p_gB, p_gC,
    length, padded, height, width, magic, shift, n_routes, columns, reversed_routes, images, programs,
    N: tl.constexpr, STEPS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    EVEN: tl.constexpr, TABLE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Sum [programs, B, K, tiles, 2 N, STEPS] (in the order of each route's steps, times log2(e)) over programs, in
    order, into gradients of B and C (B, L, K, N).

    Grid (B * K * padded / BT).
    """
    i_b, k, o_p, m_t, o_turned = _block(
        p_table, length, padded, height, width, magic, shift, n_routes, columns, reversed_routes,
        N, STEPS, BT, EVEN, TABLE, INDEX,
    )  # fmt: skip
    o_n = tl.arange(0, BN)
    m_n = (o_n < N)[:, None]
    p_part = p_gturned + (o_n * STEPS)[:, None] + o_turned[None, :]
    b_gB = tl.zeros((BN, BT), dtype=tl.float32)
    b_gC = tl.zeros((BN, BT), dtype=tl.float32)
    for _ in range(programs):
        b_gB += tl.load(p_part, mask=m_n, other=0.0).to(tl.float32)
        b_gC += tl.load(p_part + N * STEPS, mask=m_n, other=0.0).to(tl.float32)
        p_part += images.to(tl.int64) * n_routes * (2 * N) * padded
    o_row = ((i_b * length + o_p) * n_routes + k) * N
    o_out = o_row[:, None] + o_n[None, :]
    m_out = m_t[:, None] & (o_n < N)[None, :]
    tl.store(p_gB + o_out, tl.trans(b_gB * _LN2).to(p_gB.dtype.element_ty), mask=m_out)
    tl.store(p_gC + o_out, tl.trans(b_gC * _LN2).to(p_gC.dtype.element_ty), mask=m_out)

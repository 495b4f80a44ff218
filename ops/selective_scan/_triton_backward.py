"""Triton kernels of the selective scan: the backward pass. See triton_impl.py for the design."""

import triton.language as tl

from subquad.ops.selective_scan._triton_forward import (
    _column,
    _exp_minus_abs,
    _join_time,
    _kernel,
    _load_pixels,
    _load_rows,
    _load_states,
    _load_weight,
    _raw_steps,
    _recur,
    _softplus,
    _split_time,
    _steps,
    _sum_time,
)

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@_kernel
def selective_scan_bwd_kernel_aggregate(
    p_gy, p_dt, p_rows, p_weight, p_bias, p_A, p_ends, p_sums, p_scratch, p_pixels,
    n_lanes, length, segments, segment_chunks, dim,
    stride_dt_b, stride_dt_p, stride_dt_k, stride_row_b, stride_row_p, stride_row_k,
    n_routes, k_forward, k_reversed,
    N: tl.constexpr, CH: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr,
    WIDTH: tl.constexpr, ALIGN: tl.constexpr, TILES: tl.constexpr, LOW_RANK: tl.constexpr, SOFTPLUS: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """q_{t-1} = exp(d_t A) (q_t + C_t gy_t) from q = 0 at the segment's end: the adjoint state that leaves the segment.

    Grid (E / BC, lanes / CH), one warp. Writes the adjoint state at the segment's start and the sum of its steps.
    """
    T: tl.constexpr = 4 * CH
    o_ch = tl.arange(0, CH)
    o_lane = tl.program_id(1) * CH + o_ch
    m_lane = o_lane < n_lanes
    o_row = tl.arange(0, T)
    o_rlane = tl.program_id(1) * CH + o_row % CH
    o_rbatch = (o_rlane // segments).to(INDEX)
    o_rstart = (o_rlane % segments) * (segment_chunks * TILES * 4)
    o_rend = tl.where(o_rlane < n_lanes, length, 0)
    o_block = tl.arange(0, BC)
    o_c = tl.program_id(0) * BC + o_block
    m_c = o_c < dim
    m_state = m_lane[:, None] & m_c[None, :]
    o_r = tl.arange(0, BR)
    n_tiles = segment_chunks * TILES
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    p_slot = p_scratch + program * (N * CH * BC) + (o_ch * BC)[:, None] + o_block[None, :]
    for direction in range(2):
        k = tl.where(direction == 0, k_forward, k_reversed)
        if k >= 0:
            o_e = k * dim + o_c
            b_bias = tl.load(p_bias + o_e, mask=m_c, other=0.0)
            b_w = 0.0
            if LOW_RANK:
                b_w = _load_weight(p_weight, o_e, m_c, o_r, RANK, p_rows.dtype.element_ty)
            b_A = tl.load(p_A + o_e * N, mask=m_c, other=0.0) * _LOG2E
            o_dtrow = o_rbatch * stride_dt_b + k * stride_dt_k
            o_first = o_rbatch * stride_row_b + k * stride_row_k
            b_q = tl.zeros((CH, BC), dtype=tl.float32)
            if N > 1:
                for n in range(N):
                    tl.store(p_slot + n * (CH * BC), b_q)
            b_sum = tl.zeros((CH, BC), dtype=tl.float32)
            # Against the route: its last step first; the rows of a tile stay in the route's order.
            move = 8 * direction - 4
            o_t = o_rstart + (n_tiles * 4 - 4) * (1 - direction) + 3 * direction + (o_row // CH) * (1 - 2 * direction)
            o_next = _load_pixels(p_pixels, o_t, o_rend)
            for _ in range(n_tiles):
                o_p = o_next
                o_t += move
                o_next = _load_pixels(p_pixels, o_t, o_rend)
                m_t = o_p >= 0
                o_x = ((o_rbatch * length + o_p) * dim)[:, None] + o_c[None, :]
                o_prow = (o_first + o_p * stride_row_p) * ALIGN
                b_gy = tl.load(p_gy + o_x, mask=m_t[:, None] & m_c[None, :], other=0.0).to(tl.float32)
                b_rows = _load_rows(p_rows, o_prow, m_t, o_r, WIDTH)
                if N > 1:
                    b_Cs = _load_states(p_rows, o_prow, m_t, RANK + N, N, NP)
                b_d = _steps(
                    p_dt, o_dtrow + o_p * stride_dt_p, b_rows, m_t, b_w, b_bias, o_c, m_c, LOW_RANK, SOFTPLUS, PRECISION
                )
                b_sum += _sum_time(b_d, CH, BC)
                for n in range(N):
                    if N > 1:
                        b_A = tl.load(p_A + o_e * N + n, mask=m_c, other=0.0) * _LOG2E
                        b_q = tl.load(p_slot + n * (CH * BC))
                        b_C = _column(b_Cs, n, NP, BC, PRECISION)
                    else:
                        b_C = _column(b_rows, RANK + 1, BR, BC, PRECISION)
                    a_0, a_1, a_2, a_3 = _split_time(tl.exp2(b_d * b_A[None, :]), CH, BC)
                    c_0, c_1, c_2, c_3 = _split_time(b_gy * b_C, CH, BC)
                    b_q = a_3 * (b_q + c_3)
                    b_q = a_2 * (b_q + c_2)
                    b_q = a_1 * (b_q + c_1)
                    b_q = a_0 * (b_q + c_0)
                    if N > 1:
                        tl.store(p_slot + n * (CH * BC), b_q)
            o_path = (o_lane // segments).to(INDEX) * n_routes + k
            o_end = (o_path * segments + o_lane % segments) * dim
            tl.store(p_sums + o_end[:, None] + o_c[None, :], b_sum, mask=m_state)
            for n in range(N):
                if N > 1:
                    b_q = tl.load(p_slot + n * (CH * BC))
                tl.store(p_ends + o_end[:, None] * N + (o_c * N)[None, :] + n, b_q, mask=m_state)


@_kernel
def selective_scan_bwd_kernel(
    p_gy, p_x, p_dt, p_rows, p_weight, p_bias, p_A, p_D, p_states, p_q, p_scratch,
    p_partial, p_gx, p_gdt, p_grows, p_gparams, p_ginitial, p_pixels,
    n_lanes, length, segments, segment_chunks, chunks, slots, dim,
    stride_dt_b, stride_dt_p, stride_dt_k, stride_row_b, stride_row_p, stride_row_k,
    n_routes, k_forward, k_reversed, add, blocks, images,
    N: tl.constexpr, CH: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr,
    WIDTH: tl.constexpr, ALIGN: tl.constexpr, TILES: tl.constexpr, LOW_RANK: tl.constexpr, SOFTPLUS: tl.constexpr,
    ENTRY: tl.constexpr, KEEP_INITIAL: tl.constexpr,
    OUTPUT: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of all inputs from the states saved at chunk entries and the adjoint states entering the segments.

    With G_t = q_t + C_t gy_t (total adjoint of h_t), q_{t-1} = a_t G_t, p_t = a_t h_{t-1} = h_t - d_t B_t x_t:
        gx_t = D gy_t + d_t sum_n G_t B_t      gB_t = sum_c G_t d_t x_t      gC_t = sum_c gy_t h_t
        gd_t = sum_n G_t (B_t x_t + A p_t)     gA = sum_t G_t d_t p_t        gD = sum_t gy_t x_t
        gs_t = gd_t sigmoid(s_t)               gbias = sum_t gs_t
        gdt_t = gs_t . weight                  gweight = sum_t gs_t dt_t     (low-rank steps)

    Grid (channel blocks / ``blocks``, lanes / CH), one warp that loops over its channel blocks. Each chunk is walked
    twice: in the route's order to put the state entering each tile into ``p_scratch`` (L1, L2), then backwards.
    ``p_scratch`` of a program: N adjoint states, N sums of gA, then TILES x N states, all [CH, BC].
    Sums over channels go to ``p_grows`` ([grid 0, B, L, K, R + 2N]: gdt, gB, gC), sums over lanes to ``p_gparams``
    ([grid 1, K, E, R + N + 2]: gweight, gA, gD, gbias); both are added up outside, in a fixed order.
    """
    T: tl.constexpr = 4 * CH
    SLOT: tl.constexpr = CH * BC
    o_ch = tl.arange(0, CH)
    o_lane = tl.program_id(1) * CH + o_ch
    m_lane = o_lane < n_lanes
    o_batch = (o_lane // segments).to(INDEX)
    o_segment = o_lane % segments
    o_row = tl.arange(0, T)
    o_rlane = tl.program_id(1) * CH + o_row % CH
    o_rbatch = (o_rlane // segments).to(INDEX)
    o_rsegment = o_rlane % segments
    o_rend = tl.where(o_rlane < n_lanes, length, 0)
    o_r = tl.arange(0, BR)
    o_block = tl.arange(0, BC)
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    p_adjoint = p_scratch + program * ((TILES + 2) * N * SLOT) + (o_ch * BC)[:, None] + o_block[None, :]
    p_gA = p_adjoint + N * SLOT
    p_slot = p_adjoint + 2 * N * SLOT
    o_grow = (tl.program_id(0).to(INDEX) * images + o_rbatch) * length
    for direction in range(2):
        k = tl.where(direction == 0, k_forward, k_reversed)
        if k >= 0:
            o_dtrow = o_rbatch * stride_dt_b + k * stride_dt_k
            o_first = o_rbatch * stride_row_b + k * stride_row_k
            o_path = o_batch * n_routes + k
            added = tl.maximum(add, tl.where(k_forward >= 0, direction, 0))
            for block in range(blocks):
                o_c = (tl.program_id(0) * blocks + block) * BC + o_block
                m_c = o_c < dim
                m_state = m_lane[:, None] & m_c[None, :]
                o_e = k * dim + o_c
                b_bias = tl.load(p_bias + o_e, mask=m_c, other=0.0)
                b_D = tl.load(p_D + o_e, mask=m_c, other=0.0)
                b_w = 0.0
                if LOW_RANK:
                    b_w = _load_weight(p_weight, o_e, m_c, o_r, RANK, p_x.dtype.element_ty)
                p_state = p_states + (o_path * slots * dim)[:, None] * N + (o_c * N)[None, :]
                b_q = tl.zeros((CH, BC), dtype=tl.float32)
                b_gA = tl.zeros((CH, BC), dtype=tl.float32)
                for n in range(N):
                    if ENTRY == 1:
                        o_q = (o_path * segments + o_segment) * dim  # one segment: the gradient of the last state
                        b_q = tl.load(p_q + o_q[:, None] * N + (o_c * N)[None, :] + n, mask=m_state, other=0.0)
                    if N > 1:
                        tl.store(p_adjoint + n * SLOT, b_q)
                        tl.store(p_gA + n * SLOT, b_gA)
                b_gD = tl.zeros((CH, BC), dtype=tl.float32)
                b_gbias = tl.zeros((CH, BC), dtype=tl.float32)
                b_gw = tl.zeros((BR, BC), dtype=tl.float32)
                for chunk_step in range(segment_chunks):
                    chunk = tl.where(direction == 0, segment_chunks - 1 - chunk_step, chunk_step)
                    o_chunk = o_segment * segment_chunks + chunk
                    m_entry = m_state & (o_chunk < chunks)[:, None]
                    b_h = tl.zeros((CH, BC), dtype=tl.float32)
                    for n in range(N):
                        b_h = tl.load(p_state + (o_chunk * dim)[:, None] * N + n, mask=m_entry, other=0.0)
                        if N > 1:
                            tl.store(p_slot + n * SLOT, b_h)
                    b_A = tl.load(p_A + o_e * N, mask=m_c, other=0.0) * _LOG2E
                    move = 4 - 8 * direction
                    o_t = (o_rsegment * segment_chunks + chunk) * (TILES * 4)
                    o_t = o_t + (TILES * 4 - 1) * direction + (o_row // CH) * (1 - 2 * direction)
                    o_next = _load_pixels(p_pixels, o_t, o_rend)
                    for tile in range(TILES - 1):
                        o_p = o_next
                        o_t += move
                        o_next = _load_pixels(p_pixels, o_t, o_rend)
                        m_t = o_p >= 0
                        o_x = ((o_rbatch * length + o_p) * dim)[:, None] + o_c[None, :]
                        o_prow = (o_first + o_p * stride_row_p) * ALIGN
                        b_x = tl.load(p_x + o_x, mask=m_t[:, None] & m_c[None, :], other=0.0).to(tl.float32)
                        b_rows = _load_rows(p_rows, o_prow, m_t, o_r, WIDTH)
                        if N > 1:
                            b_Bs = _load_states(p_rows, o_prow, m_t, RANK, N, NP)
                        b_d = _steps(
                            p_dt, o_dtrow + o_p * stride_dt_p, b_rows, m_t, b_w, b_bias, o_c, m_c,
                            LOW_RANK, SOFTPLUS, PRECISION,
                        )  # fmt: skip
                        b_dx = b_d * b_x
                        for n in range(N):
                            if N > 1:
                                b_A = tl.load(p_A + o_e * N + n, mask=m_c, other=0.0) * _LOG2E
                                b_h = tl.load(p_slot + (tile * N + n) * SLOT)
                                b_B = _column(b_Bs, n, NP, BC, PRECISION)
                            else:
                                tl.store(p_slot + tile * SLOT, b_h)
                                b_B = _column(b_rows, RANK, BR, BC, PRECISION)
                            b_a = tl.exp2(b_d * b_A[None, :])
                            _, _, _, b_h = _recur(b_h, b_a, b_dx * b_B, CH, BC)
                            if N > 1:
                                tl.store(p_slot + ((tile + 1) * N + n) * SLOT, b_h)
                    if N == 1:
                        tl.store(p_slot + (TILES - 1) * SLOT, b_h)
                    tl.debug_barrier()
                    # Loaded again: triton 3.6 hoists a layout conversion that two loops share into the first of them.
                    b_A2 = tl.load(p_A + o_e * N, mask=m_c, other=0.0) * _LOG2E
                    for step in range(TILES):
                        tile = TILES - 1 - step
                        o_p = o_next
                        o_t -= move
                        o_next = _load_pixels(p_pixels, o_t, o_rend)
                        m_t = o_p >= 0
                        m_x = m_t[:, None] & m_c[None, :]
                        o_x = ((o_rbatch * length + o_p) * dim)[:, None] + o_c[None, :]
                        o_prow = (o_first + o_p * stride_row_p) * ALIGN
                        b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
                        b_gy = tl.load(p_gy + o_x, mask=m_x, other=0.0).to(tl.float32)
                        b_rows = _load_rows(p_rows, o_prow, m_t, o_r, WIDTH)
                        # The second walk, and every walk of a later group, adds to what is there.
                        m_add = m_t[:, None] & (o_c < dim * added)[None, :]
                        b_before = tl.load(p_partial + o_x, mask=m_add, other=0.0)
                        b_first = tl.load(p_slot + tile * (N * SLOT))
                        if N > 1:
                            b_Bs = _load_states(p_rows, o_prow, m_t, RANK, N, NP)
                            b_Cs = _load_states(p_rows, o_prow, m_t, RANK + N, N, NP)
                        b_s = _raw_steps(
                            p_dt, o_dtrow + o_p * stride_dt_p, b_rows, m_t, b_w, b_bias, o_c, m_c, LOW_RANK, PRECISION
                        )
                        b_d = b_s
                        if SOFTPLUS:
                            b_exp = _exp_minus_abs(b_s)
                            b_d = _softplus(b_s, b_exp)
                        b_d = tl.where(m_t[:, None], b_d, 0.0)
                        b_dx = b_d * b_x
                        b_gx = b_D[None, :] * b_gy
                        b_gd = tl.zeros((T, BC), dtype=tl.float32)
                        b_gB = tl.zeros((T,), dtype=tl.float32)
                        b_gC = tl.zeros((T,), dtype=tl.float32)
                        # A row of p_grows: R entries of gdt (none for full-rank steps), N of gB, N of gC.
                        p_grow = p_grows + ((o_grow + o_p) * n_routes + k) * (RANK + 2 * N)
                        m_more = o_p >= tl.where(block > 0, 0, length)
                        for n in range(N):
                            if N > 1:
                                b_A2 = tl.load(p_A + o_e * N + n, mask=m_c, other=0.0) * _LOG2E
                                b_q = tl.load(p_adjoint + n * SLOT)
                                b_gA = tl.load(p_gA + n * SLOT)
                                b_first = tl.load(p_slot + (tile * N + n) * SLOT)
                                b_B = _column(b_Bs, n, NP, BC, PRECISION)
                                b_C = _column(b_Cs, n, NP, BC, PRECISION)
                            else:
                                b_B = _column(b_rows, RANK, BR, BC, PRECISION)
                                b_C = _column(b_rows, RANK + 1, BR, BC, PRECISION)
                            b_a = tl.exp2(b_d * b_A2[None, :])
                            b_b = b_dx * b_B
                            h_0, h_1, h_2, h_3 = _recur(b_first, b_a, b_b, CH, BC)
                            b_hs = _join_time(h_0, h_1, h_2, h_3, CH, BC)
                            a_0, a_1, a_2, a_3 = _split_time(b_a, CH, BC)
                            c_0, c_1, c_2, c_3 = _split_time(b_gy * b_C, CH, BC)
                            g_3 = b_q + c_3
                            g_2 = a_3 * g_3 + c_2
                            g_1 = a_2 * g_2 + c_1
                            g_0 = a_1 * g_1 + c_0
                            b_q = a_0 * g_0
                            b_g = _join_time(g_0, g_1, g_2, g_3, CH, BC)
                            b_gp = b_g * (b_hs - b_b)
                            b_gx += b_g * (b_d * b_B)
                            b_gd += b_g * (b_x * b_B) + b_gp * (b_A2 * _LN2)[None, :]
                            b_gA += _sum_time(b_gp * b_d, CH, BC)
                            if N > 1:
                                tl.store(p_adjoint + n * SLOT, b_q)
                                tl.store(p_gA + n * SLOT, b_gA)
                            b_gB = tl.sum(b_g * b_dx, 1)
                            b_gC = tl.sum(b_gy * b_hs, 1)
                            if N > 1:
                                p_gB = p_grow + (RANK + n)
                                p_gC = p_grow + (RANK + N + n)
                                tl.store(p_gB, b_gB + tl.load(p_gB, mask=m_more, other=0.0), mask=m_t)
                                tl.store(p_gC, b_gC + tl.load(p_gC, mask=m_more, other=0.0), mask=m_t)
                        if SOFTPLUS:
                            # sigmoid(s); 1 / (1 + e) by rsqrt, a fifth of the instructions of a division.
                            b_root = tl.rsqrt(1.0 + b_exp)
                            b_gd = b_gd * (tl.where(b_s > 0.0, 1.0, b_exp) * (b_root * b_root))
                        b_gd = tl.where(m_t[:, None], b_gd, 0.0)
                        b_gbias += _sum_time(b_gd, CH, BC)
                        b_gD += _sum_time(b_gy * b_x, CH, BC)
                        if LOW_RANK:
                            b_grow = tl.dot(b_gd.to(DOT), tl.trans(b_w.to(DOT)), input_precision=PRECISION)  # [T, BR]
                            b_gw += tl.dot(tl.trans(b_rows.to(DOT)), b_gd.to(DOT), input_precision=PRECISION)
                        else:
                            b_grow = tl.zeros((T, BR), dtype=tl.float32)
                            p_gdtrow = p_gdt + (((o_rbatch * length + o_p) * n_routes + k) * dim)[:, None]
                            tl.store(p_gdtrow + o_c[None, :], b_gd.to(p_gdt.dtype.element_ty), mask=m_x)
                        if N == 1:
                            b_grow = tl.where((o_r == RANK)[None, :], b_gB[:, None], b_grow)
                            b_grow = tl.where((o_r == RANK + 1)[None, :], b_gC[:, None], b_grow)
                        if N == 1 or LOW_RANK:
                            m_r = (o_r < (WIDTH if N == 1 else RANK))[None, :]
                            p_gr = p_grow[:, None] + o_r[None, :]
                            b_grow += tl.load(p_gr, mask=m_more[:, None] & m_r, other=0.0)
                            tl.store(p_gr, b_grow, mask=m_t[:, None] & m_r)
                        b_gx += b_before
                        if OUTPUT:
                            m_out = m_t[:, None] & (o_c < dim * direction)[None, :]
                            tl.store(p_gx + o_x, b_gx.to(p_gx.dtype.element_ty), mask=m_out)
                            m_x = m_t[:, None] & (o_c < dim * (1 - direction))[None, :]
                        tl.store(p_partial + o_x, b_gx, mask=m_x)
                    tl.debug_barrier()
                width = RANK + N + 2
                p_param = p_gparams + ((tl.program_id(1).to(tl.int64) * n_routes + k) * dim + o_c) * width
                if LOW_RANK:
                    m_w = (o_r < RANK)[:, None] & m_c[None, :]
                    tl.store(p_param[None, :] + o_r[:, None], b_gw, mask=m_w)
                p_param = p_param + RANK
                m_first = m_state & (o_segment == tl.where(direction == 0, 0, segments - 1))[:, None]
                for n in range(N):
                    if N > 1:
                        b_q = tl.load(p_adjoint + n * SLOT)
                        b_gA = tl.load(p_gA + n * SLOT)
                    tl.store(p_param + n, tl.sum(b_gA, 0), mask=m_c)
                    if KEEP_INITIAL:
                        p_first = p_ginitial + (o_path * dim)[:, None] * N + (o_c * N)[None, :]
                        tl.store(p_first + n, b_q, mask=m_first)
                tl.store(p_param + N, tl.sum(b_gD, 0), mask=m_c)
                tl.store(p_param + N + 1, tl.sum(b_gbias, 0), mask=m_c)

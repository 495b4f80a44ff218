"""Triton kernels of the selective scan: the backward pass. See triton_impl.py for the design."""

import triton
import triton.language as tl

from subquad.ops.selective_scan._triton_tiles import (
    _LN2,
    _LOG2E,
    _adjoint,
    _adjoint_reversed,
    _channels,
    _collect,
    _if,
    _in_channels,
    _kernel,
    _lanes,
    _load_route,
    _load_state,
    _load_tile,
    _locate_columns,
    _locate_map,
    _parameters,
    _path,
    _recur,
    _recur_reversed,
    _route,
    _select,
    _steps,
    _store_rows,
    _store_state,
    _sum_time,
    _to_map,
)


@_kernel
def selective_scan_bwd_kernel_states(
    p_gy, p_x, p_dt, p_rows, p_weight, p_bias, p_A, p_table, p_states, p_entries,
    p_tiles, p_adjoints, p_sums, p_ends, p_totals, p_ginitial,
    n_lanes, length, segments, segment_tiles, slots, dim,
    stride_dt_b, stride_dt_p, stride_dt_k, stride_row_b, stride_row_p, stride_row_k,
    height, width, magic, shift, n_routes, routes, images,
    BC: tl.constexpr, BR: tl.constexpr, RANK: tl.constexpr, ALIGN: tl.constexpr,
    STEPS: tl.constexpr, CHUNK: tl.constexpr, FORWARD: tl.constexpr, REVERSED: tl.constexpr,
    TWO_LEVEL: tl.constexpr, ENTRY: tl.constexpr,
    KEEP_INITIAL: tl.constexpr,
    LOW_RANK: tl.constexpr, SOFTPLUS: tl.constexpr, EVEN: tl.constexpr, EVEN_C: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """States and adjoint states without gradients, walked from the path's start: what the gradient pass, which walks
    from the end, cannot know when it comes to a tile.

    Grid (E / BC, lanes / 4, groups), one warp; on chip: state and adjoints. Writes for each tile the forward route's
    state at its start (``p_tiles``, from the saved state at the segment's start) and the reversed route's adjoint state
    there, q_{t-1} = exp(d_t A) (q_t + C_t gy_t) (``p_adjoints``). With TWO_LEVEL the latter starts from zero in each
    segment and comes with the sum of steps up to there, and both routes' adjoints that leave the segment are written.
    """
    group = tl.program_id(2)
    k_f = _route(routes, group * 2)
    k_r = _route(routes, group * 2 + 1)
    path = _path(p_table, routes, group, k_f, length, height, width, magic, shift)
    o_b, o_segment, _, o_end = _lanes(tl.arange(0, 4), n_lanes, segments, segment_tiles * STEPS, length, INDEX)
    o_c, o_sc = _channels(tl.program_id(0), BC)
    m_c = _in_channels(tl.full((BC,), True, tl.int1), o_c, dim, EVEN_C)
    m_state = _in_channels((o_end > 0)[:, None, None], o_sc[None, :, :], dim, EVEN_C)
    dtype: tl.constexpr = p_x.dtype.element_ty
    o_ef, b_biasf, b_wf = _parameters(p_weight, p_bias, k_f, o_c, m_c, dim, BR, RANK, LOW_RANK, dtype)
    b_Af = tl.load(p_A + o_ef, mask=m_c, other=0.0)
    o_er, b_biasr, b_wr = _parameters(p_weight, p_bias, k_r, o_c, m_c, dim, BR, RANK, LOW_RANK, dtype)
    b_Ar = tl.load(p_A + o_er, mask=m_c, other=0.0)
    o_tile = ((group * images + o_b) * segments + o_segment) * segment_tiles * dim
    p_tile = p_tiles + o_tile[:, None, None] + o_sc[None, :, :]
    p_adjoint = p_adjoints + o_tile[:, None, None] + o_sc[None, :, :]
    p_sum = p_sums + o_tile[:, None, None] + o_sc[None, :, :]
    o_pathf = o_b * n_routes + k_f
    o_pathr = o_b * n_routes + k_r
    p_state = p_states + ((o_pathf * slots + o_segment * segment_tiles // (CHUNK // STEPS)) * dim)[:, None, None]
    p_state += o_sc[None, :, :]
    b_h = tl.zeros((BC, 4), dtype=tl.float32)
    b_qf = tl.zeros((BC, 4), dtype=tl.float32)
    b_qr = tl.zeros((BC, 4), dtype=tl.float32)
    b_sumf = tl.zeros((BC, 4), dtype=tl.float32)
    b_sumr = tl.zeros((BC, 4), dtype=tl.float32)
    if FORWARD:
        b_h = _load_state(p_state, m_state, BC) * _LOG2E
    if ENTRY:
        b_qr = _load_state(p_entries + (o_pathr * dim)[:, None, None] + o_sc[None, :, :], m_state, BC)
    for tile in range(segment_tiles):
        o_nb, o_np, m_t = _locate_columns(
            path, tile, n_lanes, segments, segment_tiles, length, STEPS, EVEN, TABLE, INDEX
        )
        o_mb, o_mp, o_map, m_map = _locate_map(
            path, tile, o_sc, n_lanes, segments, segment_tiles, length, dim, STEPS, EVEN, EVEN_C, TABLE, INDEX
        )
        b_gy = _load_tile(p_gy, o_map, m_map, BC, STEPS)
        if FORWARD:
            b_x = _load_tile(p_x, o_map, m_map, BC, STEPS)
            b_rows, b_s = _load_route(
                p_dt, p_rows, k_f, o_nb, o_np, m_t, o_mb, o_mp, o_sc, m_map, b_wf, b_biasf,
                stride_dt_b, stride_dt_p, stride_dt_k, stride_row_b, stride_row_p, stride_row_k,
                BC, BR, RANK, ALIGN, STEPS, LOW_RANK, PRECISION, INDEX,
            )  # fmt: skip
            b_d = _steps(b_s, m_t, SOFTPLUS, EVEN, EXACT)
            b_dx = b_d * b_x
            _store_state(p_tile + tile * dim, b_h, m_state, BC)
            b_B, b_C = _select(b_rows, RANK, BC, PRECISION)
            b_a = tl.exp2(b_d * b_Af[:, None])
            _b_hs, b_h = _recur(b_h, b_a, b_dx * b_B, BC)
            if TWO_LEVEL:
                b_qf = _collect(b_qf, tl.exp2(b_sumf * b_Af[:, None]), b_a, b_gy * b_C, BC)
            if TWO_LEVEL:
                b_sumf += _sum_time(b_d, BC)
        if REVERSED:
            b_rows, b_s = _load_route(
                p_dt, p_rows, k_r, o_nb, o_np, m_t, o_mb, o_mp, o_sc, m_map, b_wr, b_biasr,
                stride_dt_b, stride_dt_p, stride_dt_k, stride_row_b, stride_row_p, stride_row_k,
                BC, BR, RANK, ALIGN, STEPS, LOW_RANK, PRECISION, INDEX,
            )  # fmt: skip
            b_d = _steps(b_s, m_t, SOFTPLUS, EVEN, EXACT)
            if TWO_LEVEL:
                _store_state(p_sum + tile * dim, b_sumr, m_state, BC)
                b_sumr += _sum_time(b_d, BC)
            _store_state(p_adjoint + tile * dim, b_qr, m_state, BC)
            b_B, b_C = _select(b_rows, RANK, BC, PRECISION)
            _b_g, b_qr = _adjoint_reversed(b_qr, tl.exp2(b_d * b_Ar[:, None]), b_gy * b_C, BC)
    if TWO_LEVEL:
        if FORWARD:
            o_total = (o_pathf * segments + o_segment) * dim
            _store_state(p_totals + o_total[:, None, None] + o_sc[None, :, :], b_sumf, m_state, BC)
            p_end = p_ends + o_total[:, None, None] + o_sc[None, :, :]
            _store_state(p_end, b_qf, m_state, BC)
        if REVERSED:
            o_total = (o_pathr * segments + o_segment) * dim
            _store_state(p_totals + o_total[:, None, None] + o_sc[None, :, :], b_sumr, m_state, BC)
            p_end = p_ends + o_total[:, None, None] + o_sc[None, :, :]
            _store_state(p_end, b_qr, m_state, BC)
    elif REVERSED and KEEP_INITIAL:
        p_first = p_ginitial + (o_pathr * dim)[:, None, None] + o_sc[None, :, :]
        _store_state(p_first, b_qr, m_state, BC)


@triton.jit
def _route_gradients(
    b_A, b_in, b_carry, b_gA, b_w, b_s, b_rows, b_x, b_gy, b_gx, m_t,
    BC: tl.constexpr, BR: tl.constexpr, RANK: tl.constexpr,
    STEPS: tl.constexpr, REVERSED: tl.constexpr, LOW_RANK: tl.constexpr,
    SOFTPLUS: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile's share of one route's gradients.

    ``b_in`` is what enters the tile from memory (h for a forward route, q for a reversed one), ``b_carry`` what comes
    from the tile before (q, h). Returns the carry, gA * log2(e)^2, gx * log2(e), gs, and gdt, gB, gC times log2(e) as
    packed rows [BR, .].
    """
    b_d = _steps(b_s, m_t, SOFTPLUS, EVEN, EXACT)
    b_dx = b_d * b_x
    b_B, b_C = _select(b_rows, RANK, BC, PRECISION)
    b_a = tl.exp2(b_d * b_A[:, None])
    b_b = b_dx * b_B
    if REVERSED:
        b_h, b_carry = _recur_reversed(b_carry, b_a, b_b, BC)
        b_g, b_in = _adjoint_reversed(b_in, b_a, b_gy * b_C, BC)
    else:
        b_h, b_in = _recur(b_in, b_a, b_b, BC)
        b_g, b_carry = _adjoint(b_carry, b_a, b_gy * b_C, BC)
    b_gp = b_g * (b_h - b_b)
    b_gb = b_g * b_B
    b_gx += b_gb * b_d
    b_gd = b_gb * b_x + b_gp * (b_A * _LN2)[:, None]
    b_gA += _sum_time(b_gp * b_d, BC)
    # Sums over channels as products with rows of ones at the place of B and C in the packed row.
    b_low = tl.zeros((BR, 4 * STEPS), dtype=tl.float32)
    b_low = _add_row(b_low, b_g * b_dx, RANK, DOT, PRECISION)
    b_low = _add_row(b_low, b_gy * b_h, RANK + 1, DOT, PRECISION)
    if SOFTPLUS:
        b_gd = b_gd * tl.exp2(b_s - b_d)  # sigmoid(s) = exp(s - softplus(s))
    if not EVEN:
        b_gd = tl.where(m_t[None, :], b_gd, 0.0)
    if LOW_RANK:
        b_low = tl.dot(tl.trans(b_w.to(DOT)), b_gd.to(DOT), acc=b_low, input_precision=PRECISION)
    return b_carry, b_gA, b_gx, b_gd, b_low


@triton.jit
def _add_row(b_sum, b, row, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Add the column sums of b [BC, .] to a row of ``b_sum``."""
    o_r = tl.arange(0, b_sum.shape[0])
    b_unit = tl.broadcast_to(tl.where(o_r == row, 1.0, 0.0)[:, None], (b_sum.shape[0], b.shape[0])).to(DOT)
    return tl.dot(b_unit, b.to(DOT), acc=b_sum, input_precision=PRECISION)


@triton.jit
def _store_parameters(p_row, b_gA, b_gD, b_gbias, m_c):
    """Write a route's gradients of A, D and bias for each channel, summed over this program's lanes."""
    tl.store(p_row, tl.sum(b_gA, 1) * (_LN2 * _LN2), mask=m_c)
    tl.store(p_row + 1, tl.sum(b_gD, 1), mask=m_c)
    tl.store(p_row + 2, tl.sum(b_gbias, 1), mask=m_c)


@_kernel
def selective_scan_bwd_kernel(
    p_gy, p_x, p_dt, p_rows, p_weight, p_bias, p_A, p_D, p_table, p_states, p_entries, p_tiles, p_adjoints, p_sums,
    p_partial, p_gx, p_gdt, p_grows, p_gweight, p_gparams, p_ginitial,
    n_lanes, length, segments, segment_tiles, slots, dim,
    stride_dt_b, stride_dt_p, stride_dt_k, stride_row_b, stride_row_p, stride_row_k,
    height, width, magic, shift, n_routes, routes, images, add, done,
    BC: tl.constexpr, BR: tl.constexpr, RANK: tl.constexpr, ALIGN: tl.constexpr,
    STEPS: tl.constexpr, CHUNK: tl.constexpr, FORWARD: tl.constexpr, REVERSED: tl.constexpr,
    TWO_LEVEL: tl.constexpr, ENTRY: tl.constexpr,
    KEEP_INITIAL: tl.constexpr,
    LOW_RANK: tl.constexpr, SOFTPLUS: tl.constexpr, EVEN: tl.constexpr, EVEN_C: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, DOT: tl.constexpr, ROW: tl.constexpr,
    TABLE: tl.constexpr,
):  # fmt: skip
    """Gradients of all inputs, for the two routes of one group, walked from the path's end.

    With G_t = q_t + C_t gy_t (total adjoint of h_t), q_{t-1} = a_t G_t, p_t = a_t h_{t-1} = h_t - d_t B_t x_t:
        gx_t = D gy_t + d_t sum_n G_t B_t      gB_t = sum_c G_t d_t x_t      gC_t = sum_c gy_t h_t
        gd_t = sum_n G_t (B_t x_t + A p_t)     gA = sum_t G_t d_t p_t        gD = sum_t gy_t x_t
        gs_t = gd_t sigmoid(s_t)               gbias = sum_t gs_t
        gdt_t = gs_t . weight                  gweight = sum_t gs_t dt_t     (low-rank steps)

    Grid (E / BC, lanes / 4), one warp. On chip: the forward
    route's adjoint state and the reversed route's state; the other two enter each tile from ``p_tiles`` and
    ``p_adjoints``.
    Sums over channels go to ``p_grows`` ([grid 0, B, L, K, ROW]: gdt, gB, gC), sums over lanes to ``p_gparams``
    ([grid 1, K, E, 3]: gA, gD, gbias) and ``p_gweight`` ([grid 1, K, E, BR], where it also waits between tiles if
    it would take too many registers); all are added up outside, in a fixed order.
    """
    k_f = _route(routes, 0)
    k_r = _route(routes, 1)
    path = _path(p_table, routes, 0, k_f, length, height, width, magic, shift)
    o_b, o_segment, _, o_end = _lanes(tl.arange(0, 4), n_lanes, segments, segment_tiles * STEPS, length, INDEX)
    dtype: tl.constexpr = p_x.dtype.element_ty
    o_tile = (o_b * segments + o_segment) * segment_tiles * dim
    o_pathf = o_b * n_routes + k_f
    o_pathr = o_b * n_routes + k_r
    o_last = tl.minimum((o_segment + 1) * segment_tiles // (CHUNK // STEPS), slots - 1) - 1
    o_c, o_sc = _channels(tl.program_id(0), BC)
    m_c = _in_channels(tl.full((BC,), True, tl.int1), o_c, dim, EVEN_C)
    m_state = _in_channels((o_end > 0)[:, None, None], o_sc[None, :, :], dim, EVEN_C)
    p_tile = p_tiles + o_tile[:, None, None] + o_sc[None, :, :]
    p_adjoint = p_adjoints + o_tile[:, None, None] + o_sc[None, :, :]
    p_sum = p_sums + o_tile[:, None, None] + o_sc[None, :, :]
    p_entryf = p_entries + ((o_pathf * segments + o_segment) * dim)[:, None, None] + o_sc[None, :, :]
    p_entryr = p_entries + ((o_pathr * segments + o_segment) * dim)[:, None, None] + o_sc[None, :, :]
    o_ef, b_biasf, b_wf = _parameters(p_weight, p_bias, k_f, o_c, m_c, dim, BR, RANK, LOW_RANK, dtype)
    b_Af = tl.load(p_A + o_ef, mask=m_c, other=0.0)
    o_er, b_biasr, b_wr = _parameters(p_weight, p_bias, k_r, o_c, m_c, dim, BR, RANK, LOW_RANK, dtype)
    b_Ar = tl.load(p_A + o_er, mask=m_c, other=0.0)
    b_D = tl.zeros((BC,), dtype=tl.float32)
    if FORWARD:
        b_D += tl.load(p_D + o_ef, mask=m_c, other=0.0)
    if REVERSED:
        b_D += tl.load(p_D + o_er, mask=m_c, other=0.0)
    b_q = tl.zeros((BC, 4), dtype=tl.float32)
    b_h = tl.zeros((BC, 4), dtype=tl.float32)
    b_entry = tl.zeros((BC, 4), dtype=tl.float32)
    b_gAf = tl.zeros((BC, 4), dtype=tl.float32)
    b_gAr = tl.zeros((BC, 4), dtype=tl.float32)
    if FORWARD and ENTRY:
        b_q = _load_state(p_entryf, m_state, BC)
    if REVERSED:
        p_state = p_states + ((o_pathr * slots + o_last) * dim)[:, None, None] + o_sc[None, :, :]
        b_h = _load_state(p_state, m_state, BC) * _LOG2E
        if TWO_LEVEL:
            b_entry = _load_state(p_entryr, m_state, BC)
    b_gD = tl.zeros((BC, 4), dtype=tl.float32)
    b_gbiasf = tl.zeros((BC, 4), dtype=tl.float32)
    b_gbiasr = tl.zeros((BC, 4), dtype=tl.float32)
    b_gwf = tl.zeros((BC, BR), dtype=tl.float32)
    b_gwr = tl.zeros((BC, BR), dtype=tl.float32)
    o_param = tl.program_id(1).to(tl.int64) * n_routes * dim
    o_gw = o_c[:, None] * BR + tl.arange(0, BR)[None, :]
    p_gwf = p_gweight + (o_param + k_f * dim) * BR + o_gw
    p_gwr = p_gweight + (o_param + k_r * dim) * BR + o_gw
    for step in range(segment_tiles):
        tile = segment_tiles - 1 - step
        o_nb, o_np, m_t = _locate_columns(
            path, tile, n_lanes, segments, segment_tiles, length, STEPS, EVEN, TABLE, INDEX
        )
        o_mb, o_mp, o_map, m_map = _locate_map(
            path, tile, o_sc, n_lanes, segments, segment_tiles, length, dim, STEPS, EVEN, EVEN_C, TABLE, INDEX
        )
        b_x = _load_tile(p_x, o_map, m_map, BC, STEPS)
        b_gy = _load_tile(p_gy, o_map, m_map, BC, STEPS)
        b_sum = tl.zeros((BC, 4), dtype=tl.float32)
        if FORWARD:
            b_hf = _load_state(p_tile + tile * dim, m_state, BC)
        if REVERSED:
            b_qr = _load_state(p_adjoint + tile * dim, m_state, BC)
            if TWO_LEVEL:
                b_sum = _load_state(p_sum + tile * dim, m_state, BC)
                b_qr += tl.exp2(b_sum * b_Ar[:, None]) * b_entry
        b_gD += _sum_time(b_gy * b_x, BC)
        b_gx = tl.zeros((BC, 4 * STEPS), dtype=tl.float32)
        # A row of p_grows: R entries of gdt (none for full-rank steps), gB, gC.
        o_grow = ((tl.program_id(0).to(INDEX) * images + o_nb) * length + o_np) * n_routes
        if FORWARD:
            b_rows, b_s = _load_route(
                p_dt, p_rows, k_f, o_nb, o_np, m_t, o_mb, o_mp, o_sc, m_map, b_wf, b_biasf,
                stride_dt_b, stride_dt_p, stride_dt_k, stride_row_b, stride_row_p, stride_row_k,
                BC, BR, RANK, ALIGN, STEPS, LOW_RANK, PRECISION, INDEX,
            )  # fmt: skip
            b_q, b_gAf, b_gx, b_gs, b_low = _route_gradients(
                b_Af, b_hf, b_q, b_gAf, b_wf, b_s, b_rows, b_x, b_gy, b_gx, m_t,
                BC, BR, RANK, STEPS, False, LOW_RANK, SOFTPLUS, EVEN, EXACT, PRECISION, DOT,
            )  # fmt: skip
            b_gbiasf += _sum_time(b_gs, BC)
            p_grow = p_grows + (o_grow + k_f) * ROW
            if LOW_RANK:
                if BR > 16:
                    b_gwf = tl.load(p_gwf, mask=m_c[:, None] & (step > 0), other=0.0)
                b_gwf = tl.dot(b_gs.to(DOT), tl.trans(b_rows).to(DOT), acc=b_gwf, input_precision=PRECISION)
                if BR > 16:
                    tl.store(p_gwf, b_gwf, mask=m_c[:, None])
            else:
                o_gdt = ((o_mb[:, None] * length + o_mp) * n_routes + k_f) * dim
                p_gd = p_gdt + o_gdt[:, None, :, None] + o_sc[None, :, None, :]
                tl.store(p_gd, _to_map(b_gs, BC, STEPS).to(p_gdt.dtype.element_ty), mask=m_map)
            _store_rows(p_grow, b_low, m_t, RANK + 2)
        if REVERSED:
            b_rows, b_s = _load_route(
                p_dt, p_rows, k_r, o_nb, o_np, m_t, o_mb, o_mp, o_sc, m_map, b_wr, b_biasr,
                stride_dt_b, stride_dt_p, stride_dt_k, stride_row_b, stride_row_p, stride_row_k,
                BC, BR, RANK, ALIGN, STEPS, LOW_RANK, PRECISION, INDEX,
            )  # fmt: skip
            b_h, b_gAr, b_gx, b_gs, b_low = _route_gradients(
                b_Ar, b_qr, b_h, b_gAr, b_wr, b_s, b_rows, b_x, b_gy, b_gx, m_t,
                BC, BR, RANK, STEPS, True, LOW_RANK, SOFTPLUS, EVEN, EXACT, PRECISION, DOT,
            )  # fmt: skip
            b_gbiasr += _sum_time(b_gs, BC)
            p_grow = p_grows + (o_grow + k_r) * ROW
            if LOW_RANK:
                if BR > 16:
                    b_gwr = tl.load(p_gwr, mask=m_c[:, None] & (step > 0), other=0.0)
                b_gwr = tl.dot(b_gs.to(DOT), tl.trans(b_rows).to(DOT), acc=b_gwr, input_precision=PRECISION)
                if BR > 16:
                    tl.store(p_gwr, b_gwr, mask=m_c[:, None])
            else:
                o_gdt = ((o_mb[:, None] * length + o_mp) * n_routes + k_r) * dim
                p_gd = p_gdt + o_gdt[:, None, :, None] + o_sc[None, :, None, :]
                tl.store(p_gd, _to_map(b_gs, BC, STEPS).to(p_gdt.dtype.element_ty), mask=m_map)
            _store_rows(p_grow, b_low, m_t, RANK + 2)
        b_gx = b_gx * _LN2 + b_gy * b_D[:, None]
        b_gx += _load_tile(p_partial, o_map, _if(add, m_map), BC, STEPS)
        b_gx = _to_map(b_gx, BC, STEPS)
        tl.store(p_partial + o_map, b_gx.to(p_partial.dtype.element_ty), mask=_if(1 - done, m_map))
        tl.store(p_gx + o_map, b_gx.to(p_gx.dtype.element_ty), mask=_if(done, m_map))
    if FORWARD:
        _store_parameters(p_gparams + (o_param + k_f * dim + o_c) * 3, b_gAf, b_gD, b_gbiasf, m_c)
        if LOW_RANK and BR == 16:
            tl.store(p_gwf, b_gwf, mask=m_c[:, None])
        if KEEP_INITIAL and not TWO_LEVEL:
            p_first = p_ginitial + (o_pathf * dim)[:, None, None] + o_sc[None, :, :]
            _store_state(p_first, b_q, m_state, BC)
    if REVERSED:
        _store_parameters(p_gparams + (o_param + k_r * dim + o_c) * 3, b_gAr, b_gD, b_gbiasr, m_c)
        if LOW_RANK and BR == 16:
            tl.store(p_gwr, b_gwr, mask=m_c[:, None])

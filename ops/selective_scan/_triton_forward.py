"""Triton kernels of the selective scan: the forward pass. See triton_impl.py for the design."""

import triton.language as tl

from subquad.ops.selective_scan._triton_tiles import (
    _LN2,
    _LOG2E,
    _channels,
    _collect_reversed,
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
    _store_state,
    _sum_time,
    _to_map,
)


@_kernel
def selective_scan_fwd_kernel_states(
    p_x, p_dt, p_rows, p_weight, p_bias, p_A, p_table, p_entries, p_tiles, p_sums, p_ends, p_totals, p_states,
    n_lanes, length, segments, segment_tiles, slots, dim,
    stride_dt_b, stride_dt_p, stride_dt_k, stride_row_b, stride_row_p, stride_row_k,
    height, width, magic, shift, n_routes, routes, images,
    BC: tl.constexpr, BR: tl.constexpr, RANK: tl.constexpr, ALIGN: tl.constexpr,
    STEPS: tl.constexpr, FORWARD: tl.constexpr, REVERSED: tl.constexpr, TWO_LEVEL: tl.constexpr, ENTRY: tl.constexpr,
    LOW_RANK: tl.constexpr, SOFTPLUS: tl.constexpr, EVEN: tl.constexpr, EVEN_C: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """States without outputs, walked from the path's end: what the output pass cannot know when it comes to a tile.

    Grid (E / BC, lanes / 4, groups), one warp; on chip: the states of both directions. Writes for the reversed route
    the state that enters each tile, and with TWO_LEVEL, where every segment starts from zero, the sum of its steps up
    to there; then for both routes the segment's end state and the sum of its steps.
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
    p_sum = p_sums + o_tile[:, None, None] + o_sc[None, :, :]
    o_pathr = o_b * n_routes + k_r
    b_hf = tl.zeros((BC, 4), dtype=tl.float32)
    b_hr = tl.zeros((BC, 4), dtype=tl.float32)
    b_sumf = tl.zeros((BC, 4), dtype=tl.float32)
    b_sumr = tl.zeros((BC, 4), dtype=tl.float32)
    if ENTRY:
        p_entry = p_entries + (o_pathr * dim)[:, None, None] + o_sc[None, :, :]
        b_hr = _load_state(p_entry, m_state, BC) * _LOG2E
    for step in range(segment_tiles):
        tile = segment_tiles - 1 - step
        o_nb, o_np, m_t = _locate_columns(
            path, tile, n_lanes, segments, segment_tiles, length, STEPS, EVEN, TABLE, INDEX
        )
        o_mb, o_mp, o_map, m_map = _locate_map(
            path, tile, o_sc, n_lanes, segments, segment_tiles, length, dim, STEPS, EVEN, EVEN_C, TABLE, INDEX
        )
        b_x = _load_tile(p_x, o_map, m_map, BC, STEPS)
        if REVERSED:
            b_rows, b_s = _load_route(
                p_dt, p_rows, k_r, o_nb, o_np, m_t, o_mb, o_mp, o_sc, m_map, b_wr, b_biasr,
                stride_dt_b, stride_dt_p, stride_dt_k, stride_row_b, stride_row_p, stride_row_k,
                BC, BR, RANK, ALIGN, STEPS, LOW_RANK, PRECISION, INDEX,
            )  # fmt: skip
            b_d = _steps(b_s, m_t, SOFTPLUS, EVEN, EXACT)
            b_dx = b_d * b_x
            if TWO_LEVEL:
                _store_state(p_sum + tile * dim, b_sumr, m_state, BC)
                b_sumr += _sum_time(b_d, BC)
            _store_state(p_tile + tile * dim, b_hr, m_state, BC)
            b_B, _b_C = _select(b_rows, RANK, BC, PRECISION)
            _b_h, b_hr = _recur_reversed(b_hr, tl.exp2(b_d * b_Ar[:, None]), b_dx * b_B, BC)
        if FORWARD and TWO_LEVEL:
            b_rows, b_s = _load_route(
                p_dt, p_rows, k_f, o_nb, o_np, m_t, o_mb, o_mp, o_sc, m_map, b_wf, b_biasf,
                stride_dt_b, stride_dt_p, stride_dt_k, stride_row_b, stride_row_p, stride_row_k,
                BC, BR, RANK, ALIGN, STEPS, LOW_RANK, PRECISION, INDEX,
            )  # fmt: skip
            b_d = _steps(b_s, m_t, SOFTPLUS, EVEN, EXACT)
            b_dx = b_d * b_x
            b_B, _b_C = _select(b_rows, RANK, BC, PRECISION)
            b_rest = tl.exp2(b_sumf * b_Af[:, None])
            b_hf = _collect_reversed(b_hf, b_rest, tl.exp2(b_d * b_Af[:, None]), b_dx * b_B, BC)
            b_sumf += _sum_time(b_d, BC)
    if TWO_LEVEL:
        if FORWARD:
            o_total = ((o_b * n_routes + k_f) * segments + o_segment) * dim
            _store_state(p_totals + o_total[:, None, None] + o_sc[None, :, :], b_sumf, m_state, BC)
            p_end = p_ends + o_total[:, None, None] + o_sc[None, :, :]
            _store_state(p_end, b_hf * _LN2, m_state, BC)
        if REVERSED:
            o_total = (o_pathr * segments + o_segment) * dim
            _store_state(p_totals + o_total[:, None, None] + o_sc[None, :, :], b_sumr, m_state, BC)
            p_end = p_ends + o_total[:, None, None] + o_sc[None, :, :]
            _store_state(p_end, b_hr * _LN2, m_state, BC)
    elif REVERSED:
        o_last = (o_pathr * slots + slots - 1) * dim
        _store_state(p_states + o_last[:, None, None] + o_sc[None, :, :], b_hr * _LN2, m_state, BC)


@_kernel
def selective_scan_fwd_kernel(
    p_x, p_dt, p_rows, p_weight, p_bias, p_A, p_D, p_table, p_entries, p_tiles, p_sums, p_states, p_partial, p_y,
    n_lanes, length, segments, segment_tiles, slots, dim,
    stride_dt_b, stride_dt_p, stride_dt_k, stride_row_b, stride_row_p, stride_row_k,
    height, width, magic, shift, n_routes, routes, add, done,
    BC: tl.constexpr, BR: tl.constexpr, RANK: tl.constexpr, ALIGN: tl.constexpr,
    STEPS: tl.constexpr, CHUNK: tl.constexpr, FORWARD: tl.constexpr, REVERSED: tl.constexpr,
    TWO_LEVEL: tl.constexpr, ENTRY: tl.constexpr,
    LOW_RANK: tl.constexpr, SOFTPLUS: tl.constexpr, EVEN: tl.constexpr, EVEN_C: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """h_t = exp(d_t A) h_{t-1} + d_t B_t x_t;  y_t = C_t . h_t + D x_t, summed over the two routes of one group.

    Grid (E / BC, lanes / 4), one warp, walked from the path's start. The forward route's state stays on chip; the
    reversed route enters each tile with the state that ``selective_scan_fwd_kernel_states`` left. So x is read once and
    y written once: to ``p_y`` by the last group (``done``), by others to ``p_partial``, to which all but the first
    (``add``) add. One kernel serves all groups, for the time that compiling takes. Saves the states at chunk
    entries (every CHUNK steps). All arithmetic is fp32.
    """
    k_f = _route(routes, 0)
    k_r = _route(routes, 1)
    path = _path(p_table, routes, 0, k_f, length, height, width, magic, shift)
    o_b, o_segment, _, o_end = _lanes(tl.arange(0, 4), n_lanes, segments, segment_tiles * STEPS, length, INDEX)
    o_c, o_sc = _channels(tl.program_id(0), BC)
    m_c = _in_channels(tl.full((BC,), True, tl.int1), o_c, dim, EVEN_C)
    m_state = _in_channels((o_end > 0)[:, None, None], o_sc[None, :, :], dim, EVEN_C)
    dtype: tl.constexpr = p_x.dtype.element_ty
    o_ef, b_biasf, b_wf = _parameters(p_weight, p_bias, k_f, o_c, m_c, dim, BR, RANK, LOW_RANK, dtype)
    b_Af = tl.load(p_A + o_ef, mask=m_c, other=0.0)
    o_er, b_biasr, b_wr = _parameters(p_weight, p_bias, k_r, o_c, m_c, dim, BR, RANK, LOW_RANK, dtype)
    b_Ar = tl.load(p_A + o_er, mask=m_c, other=0.0)
    b_D = tl.zeros((BC,), dtype=tl.float32)
    if FORWARD:
        b_D += tl.load(p_D + o_ef, mask=m_c, other=0.0)
    if REVERSED:
        b_D += tl.load(p_D + o_er, mask=m_c, other=0.0)
    o_tile = (o_b * segments + o_segment) * segment_tiles * dim
    p_tile = p_tiles + o_tile[:, None, None] + o_sc[None, :, :]
    p_sum = p_sums + o_tile[:, None, None] + o_sc[None, :, :]
    o_pathf = o_b * n_routes + k_f
    o_pathr = o_b * n_routes + k_r
    p_entryf = p_entries + ((o_pathf * segments + o_segment) * dim)[:, None, None] + o_sc[None, :, :]
    p_entryr = p_entries + ((o_pathr * segments + o_segment) * dim)[:, None, None] + o_sc[None, :, :]
    p_statef = p_states + (o_pathf * slots * dim)[:, None, None] + o_sc[None, :, :]
    p_stater = p_states + (o_pathr * slots * dim)[:, None, None] + o_sc[None, :, :]
    b_hf = tl.zeros((BC, 4), dtype=tl.float32)
    b_er = tl.zeros((BC, 4), dtype=tl.float32)
    if FORWARD and ENTRY:
        b_hf = _load_state(p_entryf, m_state, BC) * _LOG2E
    if TWO_LEVEL and REVERSED:
        b_er = _load_state(p_entryr, m_state, BC) * _LOG2E
    for tile in range(segment_tiles):
        o_nb, o_np, m_t = _locate_columns(
            path, tile, n_lanes, segments, segment_tiles, length, STEPS, EVEN, TABLE, INDEX
        )
        o_mb, o_mp, o_map, m_map = _locate_map(
            path, tile, o_sc, n_lanes, segments, segment_tiles, length, dim, STEPS, EVEN, EVEN_C, TABLE, INDEX
        )
        b_x = _load_tile(p_x, o_map, m_map, BC, STEPS)
        if REVERSED:
            b_hr = _load_state(p_tile + tile * dim, m_state, BC)
            b_sumr = tl.zeros((BC, 4), dtype=tl.float32)
            if TWO_LEVEL:
                b_sumr = _load_state(p_sum + tile * dim, m_state, BC)
                b_hr += tl.exp2(b_sumr * b_Ar[:, None]) * b_er
        b_y = _load_tile(p_partial, o_map, _if(add, m_map), BC, STEPS) + b_x * b_D[:, None]
        b_sum = tl.zeros((BC, 4 * STEPS), dtype=tl.float32)
        if FORWARD:
            if tile % (CHUNK // STEPS) == 0:
                o_chunk = (o_segment * segment_tiles + tile) // (CHUNK // STEPS)
                m_save = m_state & (o_chunk < slots - 1)[:, None, None]
                _store_state(p_statef + (o_chunk * dim)[:, None, None], b_hf * _LN2, m_save, BC)
            b_rows, b_s = _load_route(
                p_dt, p_rows, k_f, o_nb, o_np, m_t, o_mb, o_mp, o_sc, m_map, b_wf, b_biasf,
                stride_dt_b, stride_dt_p, stride_dt_k, stride_row_b, stride_row_p, stride_row_k,
                BC, BR, RANK, ALIGN, STEPS, LOW_RANK, PRECISION, INDEX,
            )  # fmt: skip
            b_d = _steps(b_s, m_t, SOFTPLUS, EVEN, EXACT)
            b_dx = b_d * b_x
            b_B, b_C = _select(b_rows, RANK, BC, PRECISION)
            b_h, b_hf = _recur(b_hf, tl.exp2(b_d * b_Af[:, None]), b_dx * b_B, BC)
            b_sum += b_h * b_C
        if REVERSED:
            o_chunk = (o_segment * segment_tiles + tile) // (CHUNK // STEPS)
            m_save = m_state & (o_chunk < slots - 1)[:, None, None] & (tile % (CHUNK // STEPS) == CHUNK // STEPS - 1)
            b_rows, b_s = _load_route(
                p_dt, p_rows, k_r, o_nb, o_np, m_t, o_mb, o_mp, o_sc, m_map, b_wr, b_biasr,
                stride_dt_b, stride_dt_p, stride_dt_k, stride_row_b, stride_row_p, stride_row_k,
                BC, BR, RANK, ALIGN, STEPS, LOW_RANK, PRECISION, INDEX,
            )  # fmt: skip
            b_d = _steps(b_s, m_t, SOFTPLUS, EVEN, EXACT)
            b_dx = b_d * b_x
            _store_state(p_stater + (o_chunk * dim)[:, None, None], b_hr * _LN2, m_save, BC)
            b_B, b_C = _select(b_rows, RANK, BC, PRECISION)
            b_h, b_hr = _recur_reversed(b_hr, tl.exp2(b_d * b_Ar[:, None]), b_dx * b_B, BC)
            b_sum += b_h * b_C
        b_y += b_sum * _LN2
        b_y = _to_map(b_y, BC, STEPS)
        tl.store(p_partial + o_map, b_y.to(p_partial.dtype.element_ty), mask=_if(1 - done, m_map))
        tl.store(p_y + o_map, b_y.to(p_y.dtype.element_ty), mask=_if(done, m_map))
    if FORWARD and not TWO_LEVEL:
        _store_state(p_statef + (slots - 1) * dim, b_hf * _LN2, m_state, BC)

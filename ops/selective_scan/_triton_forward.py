"""Triton kernels of the selective scan: shared pieces and the forward pass. See triton_impl.py for the design."""

import inspect

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


# Pieces ----------------------------------------------------------------------------------------------------------


@triton.jit
def _split_time(b, CH: tl.constexpr, BC: tl.constexpr):
    """[4 * CH, BC] with row = time * CH + lane -> four [CH, BC]; a renaming of registers."""
    b = tl.permute(tl.reshape(b, (2, 2, CH, BC)), (2, 3, 0, 1))
    b_even, b_odd = tl.split(b)
    b_0, b_2 = tl.split(b_even)
    b_1, b_3 = tl.split(b_odd)
    return b_0, b_1, b_2, b_3


@triton.jit
def _join_time(b_0, b_1, b_2, b_3, CH: tl.constexpr, BC: tl.constexpr):
    """The inverse of ``_split_time``."""
    return tl.reshape(tl.permute(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), (2, 3, 0, 1)), (4 * CH, BC))


@triton.jit
def _sum_time(b, CH: tl.constexpr, BC: tl.constexpr):
    """[4 * CH, BC] -> [CH, BC]."""
    b_0, b_1, b_2, b_3 = _split_time(b, CH, BC)
    return (b_0 + b_1) + (b_2 + b_3)


@triton.jit
def _load_pixels(p_pixels, o_t, o_rend):
    """Pixels of steps ``o_t`` [T] of a path; -1 beyond its ends.

    Loaded from a table: computing them costs a division in each of the layouts that addresses are needed in.
    """
    return tl.load(p_pixels + o_t, mask=(o_t >= 0) & (o_t < o_rend), other=-1)


@triton.jit
def _exp_minus_abs(b_s):
    return tl.exp2(-tl.abs(b_s) * _LOG2E)


@triton.jit
def _softplus(b_s, b_e):
    """log(1 + exp(s)) = max(s, 0) + log1p(e) with e = exp(-|s|).

    log1p(e) / e is a degree-6 minimax polynomial on [0, 1], relative error 1.3e-6: tl.log2 costs about 20 instructions,
    and 1 + e loses the small steps.
    """
    b_p = 0.014141007326543331 * b_e - 0.06640174984931946
    b_p = b_p * b_e + 0.14922381937503815
    b_p = b_p * b_e - 0.23503857851028442
    b_p = b_p * b_e + 0.3310944736003876
    b_p = b_p * b_e - 0.4998696446418762
    b_p = b_p * b_e + 0.9999987483024597
    return tl.maximum(b_s, 0.0) + b_p * b_e


@triton.jit
def _load_rows(p_rows, o_row, m_t, o_r, WIDTH: tl.constexpr):
    """Packed rows of pixels, [T, BR]: R low-rank steps, then N of B and N of C; ``o_row`` [T] are their offsets."""
    return tl.load(p_rows + o_row[:, None] + o_r[None, :], mask=m_t[:, None] & (o_r < WIDTH)[None, :], other=0.0)


@triton.jit
def _column(b_rows, column, BR: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr):
    """One column of ``b_rows`` [T, BR] broadcast over channels, [T, BC] in float32.

    A product with a unit vector is exact and arrives in the layout of the step sizes; loading the column would touch
    every row's cache line again, which is what bounds these kernels.
    """
    b_unit = tl.where(tl.arange(0, BR)[:, None] == column, 1.0, 0.0)
    b_unit = tl.broadcast_to(b_unit, (BR, BC)).to(b_rows.dtype)
    return tl.dot(b_rows, b_unit, input_precision=PRECISION)


@triton.jit
def _load_states(p_rows, o_row, m_t, first, N: tl.constexpr, NP: tl.constexpr):
    """N columns of packed rows from ``first`` on, [T, NP]."""
    o_n = tl.arange(0, NP)
    return tl.load(p_rows + o_row[:, None] + (first + o_n)[None, :], mask=m_t[:, None] & (o_n < N)[None, :], other=0.0)


@triton.jit
def _raw_steps(
    p_dt, o_dt, b_rows, m_t, b_w, b_bias, o_c, m_c, LOW_RANK: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Step sizes before softplus, [T, BC]: rows times weight, or the full-rank steps at offsets ``o_dt`` [T]."""
    if LOW_RANK:
        b_s = tl.dot(b_rows, b_w, input_precision=PRECISION)
    else:
        b_s = tl.load(p_dt + o_dt[:, None] + o_c[None, :], mask=m_t[:, None] & m_c[None, :], other=0.0).to(tl.float32)
    return b_s + b_bias[None, :]


@triton.jit
def _steps(
    p_dt, o_dt, b_rows, m_t, b_w, b_bias, o_c, m_c,
    LOW_RANK: tl.constexpr, SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Step sizes [T, BC]; 0 beyond the path's end, where the state must stay as it is."""
    b_d = _raw_steps(p_dt, o_dt, b_rows, m_t, b_w, b_bias, o_c, m_c, LOW_RANK, PRECISION)
    if SOFTPLUS:
        b_d = _softplus(b_d, _exp_minus_abs(b_d))
    return tl.where(m_t[:, None], b_d, 0.0)


@triton.jit
def _load_weight(p_weight, o_e, m_c, o_r, rank, dtype: tl.constexpr):
    """dt_weight of a route and channel block, [BR, BC]."""
    return tl.load(
        p_weight + o_e[None, :] * rank + o_r[:, None], mask=(o_r < rank)[:, None] & m_c[None, :], other=0.0
    ).to(dtype)


@triton.jit
def _recur(b_h, b_a, b_b, CH: tl.constexpr, BC: tl.constexpr):
    """h <- a h + b over the 4 steps of a tile: the states after each step."""
    a_0, a_1, a_2, a_3 = _split_time(b_a, CH, BC)
    b_0, b_1, b_2, b_3 = _split_time(b_b, CH, BC)
    h_0 = a_0 * b_h + b_0
    h_1 = a_1 * h_0 + b_1
    h_2 = a_2 * h_1 + b_2
    h_3 = a_3 * h_2 + b_3
    return h_0, h_1, h_2, h_3


# Forward ---------------------------------------------------------------------------------------------------------


# Numbers that say nothing about alignment: compiling a kernel for each of their special values (1, multiples of 16)
# would only multiply the time of the first call.
_PLAIN = {
    *("n_lanes", "length", "segments", "chunks", "slots", "stride_row_b", "stride_row_p", "stride_row_k"),
    *("n_routes", "k_forward", "k_reversed", "add", "blocks", "images", "reversed_routes"),
}


def _kernel(function):
    """``triton.jit`` without specialisation on the numbers in ``_PLAIN``."""
    names = [name for name in inspect.signature(function).parameters if name in _PLAIN]
    return triton.jit(do_not_specialize=names)(function)


@_kernel
def selective_scan_fwd_kernel(
    p_x, p_dt, p_rows, p_weight, p_bias, p_A, p_D, p_initial,
    p_states, p_ends, p_sums, p_partial, p_y, p_scratch, p_pixels,
    n_lanes, length, segments, segment_chunks, chunks, slots, dim,
    stride_dt_b, stride_dt_p, stride_dt_k, stride_row_b, stride_row_p, stride_row_k,
    n_routes, k_forward, k_reversed, add,
    N: tl.constexpr, CH: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr,
    WIDTH: tl.constexpr, ALIGN: tl.constexpr, TILES: tl.constexpr, LOW_RANK: tl.constexpr, SOFTPLUS: tl.constexpr,
    ENTRY: tl.constexpr, AGGREGATE: tl.constexpr,
    OUTPUT: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """h_t = exp(d_t A) h_{t-1} + d_t B_t x_t;  y_t = C_t . h_t + D x_t, summed over the routes of one group.

    Grid (E / BC, lanes / CH), one warp. On chip: the state [CH, BC] and a tile of 4 steps; with N > 1 the N states wait
    in ``p_scratch`` (L1) between tiles. With AGGREGATE only the state at the segment's end (from a zero state) and the
    sum of its steps are written; without it the state entering each chunk, and y, added up in the fp32 ``p_partial``;
    with OUTPUT the second walk writes ``p_y`` in its dtype. All arithmetic is fp32.
    """
    T: tl.constexpr = 4 * CH
    o_ch = tl.arange(0, CH)
    o_lane = tl.program_id(1) * CH + o_ch
    m_lane = o_lane < n_lanes
    o_batch = (o_lane // segments).to(INDEX)
    o_segment = o_lane % segments
    # The same for each row of a tile.
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
            b_D = tl.load(p_D + o_e, mask=m_c, other=0.0)
            b_w = 0.0
            if LOW_RANK:
                b_w = _load_weight(p_weight, o_e, m_c, o_r, RANK, p_x.dtype.element_ty)
            b_A = tl.load(p_A + o_e * N, mask=m_c, other=0.0) * _LOG2E
            o_dtrow = o_rbatch * stride_dt_b + k * stride_dt_k
            o_first = o_rbatch * stride_row_b + k * stride_row_k
            o_path = o_batch * n_routes + k
            p_state = p_states + (o_path * slots * dim)[:, None] * N + (o_c * N)[None, :]
            o_entry = o_segment * segment_chunks
            o_entry = tl.where(direction == 0, o_entry, tl.minimum(o_entry + segment_chunks, chunks) - 1)
            b_h = tl.zeros((CH, BC), dtype=tl.float32)
            for n in range(N):
                if ENTRY == 1:
                    b_h = tl.load(p_state + (o_entry * dim)[:, None] * N + n, mask=m_state, other=0.0)
                elif ENTRY == 2:
                    p_given = p_initial + (o_path * dim)[:, None] * N + (o_c * N)[None, :]
                    b_h = tl.load(p_given + n, mask=m_state, other=0.0)
                if N > 1:
                    tl.store(p_slot + n * (CH * BC), b_h)
            b_sum = tl.zeros((CH, BC), dtype=tl.float32)
            # The rows' steps in the order of the walk: 4 steps forwards from the start, or backwards from the end.
            move = 4 - 8 * direction
            o_t = o_rstart + (n_tiles * 4 - 1) * direction + (o_row // CH) * (1 - 2 * direction)
            added = tl.maximum(add, tl.where(k_forward >= 0, direction, 0))
            o_next = _load_pixels(p_pixels, o_t, o_rend)
            for step in range(n_tiles):
                if not AGGREGATE:  # noqa: SIM102
                    if step % TILES == 0:
                        o_chunk = (
                            o_segment * segment_chunks + tl.where(direction == 0, step, n_tiles - 1 - step) // TILES
                        )
                        m_save = m_state & (o_chunk < chunks)[:, None]
                        for n in range(N):
                            if N > 1:
                                b_h = tl.load(p_slot + n * (CH * BC))
                            tl.store(p_state + (o_chunk * dim)[:, None] * N + n, b_h, mask=m_save)
                o_p = o_next
                o_t += move
                o_next = _load_pixels(p_pixels, o_t, o_rend)
                m_t = o_p >= 0
                m_x = m_t[:, None] & m_c[None, :]
                o_x = ((o_rbatch * length + o_p) * dim)[:, None] + o_c[None, :]
                # Strides come divided by ALIGN: that lets the compiler see how wide it can load.
                o_prow = (o_first + o_p * stride_row_p) * ALIGN
                b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)  # [T, BC]
                b_rows = _load_rows(p_rows, o_prow, m_t, o_r, WIDTH)
                if N > 1:
                    b_Bs = _load_states(p_rows, o_prow, m_t, RANK, N, NP)
                    b_Cs = _load_states(p_rows, o_prow, m_t, RANK + N, N, NP)
                if not AGGREGATE:
                    # The second walk, and every walk of a later group, adds to what is there.
                    m_add = m_t[:, None] & (o_c < dim * added)[None, :]
                    b_before = tl.load(p_partial + o_x, mask=m_add, other=0.0)
                b_d = _steps(
                    p_dt, o_dtrow + o_p * stride_dt_p, b_rows, m_t, b_w, b_bias, o_c, m_c, LOW_RANK, SOFTPLUS, PRECISION
                )
                b_dx = b_d * b_x
                b_y = b_D[None, :] * b_x
                if AGGREGATE:
                    b_sum += _sum_time(b_d, CH, BC)
                for n in range(N):
                    if N > 1:
                        b_A = tl.load(p_A + o_e * N + n, mask=m_c, other=0.0) * _LOG2E
                        b_h = tl.load(p_slot + n * (CH * BC))
                        b_B = _column(b_Bs, n, NP, BC, PRECISION)
                    else:
                        b_B = _column(b_rows, RANK, BR, BC, PRECISION)
                    h_0, h_1, h_2, b_h = _recur(b_h, tl.exp2(b_d * b_A[None, :]), b_dx * b_B, CH, BC)
                    if N > 1:
                        tl.store(p_slot + n * (CH * BC), b_h)
                    if not AGGREGATE:
                        if N > 1:
                            b_C = _column(b_Cs, n, NP, BC, PRECISION)
                        else:
                            b_C = _column(b_rows, RANK + 1, BR, BC, PRECISION)
                        b_y += _join_time(h_0, h_1, h_2, b_h, CH, BC) * b_C
                if not AGGREGATE:
                    b_y += b_before
                    if OUTPUT:
                        m_out = m_t[:, None] & (o_c < dim * direction)[None, :]
                        tl.store(p_y + o_x, b_y.to(p_y.dtype.element_ty), mask=m_out)
                        m_x = m_t[:, None] & (o_c < dim * (1 - direction))[None, :]
                    tl.store(p_partial + o_x, b_y, mask=m_x)
            o_end = (o_path * segments + o_segment) * dim
            o_last = tl.where(direction == 0, segments - 1, 0)
            m_keep = m_state & (o_segment == o_last)[:, None]
            if AGGREGATE:
                tl.store(p_sums + o_end[:, None] + o_c[None, :], b_sum, mask=m_state)
            for n in range(N):
                if N > 1:
                    b_h = tl.load(p_slot + n * (CH * BC))
                if AGGREGATE:
                    tl.store(p_ends + o_end[:, None] * N + (o_c * N)[None, :] + n, b_h, mask=m_state)
                else:
                    tl.store(p_state + (chunks * dim) * N + n, b_h, mask=m_keep)
        # The second walk adds to what other threads of this program stored in the first.
        tl.debug_barrier()


@triton.jit
def _after(a1, b1, a2, b2):
    """Compose the affine maps h -> a1 h + b1 and then h -> a2 h + b2."""
    return a1 * a2, a2 * b1 + b2


@_kernel
def selective_scan_chain_kernel(
    p_sums, p_A, p_ends, p_given, p_entries,
    segments, segment_chunks, chunks, slots, dim, n_routes, reversed_routes,
    N: tl.constexpr, BS: tl.constexpr, BJ: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """entry[s + 1] = exp(A * sum of segment s's steps) * entry[s] + (end of segment s from zero), along each route.

    Grid (B * K, E * N / BJ). The state entering the next segment goes into the slot of that segment's first chunk.
    ``reversed_routes`` is a bit mask of the routes walked from the last segment to the first.
    """
    o_path = tl.program_id(0).to(tl.int64)
    k = tl.program_id(0) % n_routes
    is_reversed = (reversed_routes >> k) & 1
    o_j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    m_j = o_j < dim * N
    o_s = tl.arange(0, BS)
    b_A = tl.load(p_A + k * dim * N + o_j, mask=m_j, other=0.0) * _LOG2E
    b_h = tl.zeros((BJ,), dtype=tl.float32)
    if GIVEN:
        b_h = tl.load(p_given + o_path * dim * N + o_j, mask=m_j, other=0.0)
    p_entry = p_entries + o_path * slots * dim * N + o_j
    first = (chunks - 1) * is_reversed
    tl.store(p_entry + first * dim * N, b_h, mask=m_j)
    for start in range(0, segments, BS):
        o_walk = start + o_s
        m_walk = o_walk < segments
        o_segment = o_walk + is_reversed * (segments - 1 - 2 * o_walk)
        m_tile = m_walk[:, None] & m_j[None, :]
        o_end = (o_path * segments + o_segment) * dim
        b_sum = tl.load(p_sums + o_end[:, None] + (o_j // N)[None, :], mask=m_tile, other=0.0)  # [BS, BJ]
        b_end = tl.load(p_ends + o_end[:, None] * N + o_j[None, :], mask=m_tile, other=0.0)
        b_a, b_b = tl.associative_scan((tl.exp2(b_sum * b_A[None, :]), b_end), 0, _after)
        b_after = b_a * b_h[None, :] + b_b
        # The next segment of the walk; a reversed route enters it through its last chunk.
        o_next = o_segment + 1 - 2 * is_reversed
        o_last = tl.minimum((o_next + 1) * segment_chunks, chunks) - 1
        o_slot = tl.where(is_reversed != 0, o_last, o_next * segment_chunks)
        m_next = (o_walk + 1 < segments)[:, None] & m_j[None, :]
        tl.store(p_entry[None, :] + (o_slot.to(tl.int64) * dim * N)[:, None], b_after, mask=m_next)
        b_h = tl.sum(tl.where((o_s == BS - 1)[:, None], b_after, 0.0), 0)

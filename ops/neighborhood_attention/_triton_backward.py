"""Triton kernels of neighborhood attention: the backward pass. See triton_impl.py for the design."""

import triton
import triton.language as tl

from subquad.ops._triton_attention import LOG2E, store_rows
from subquad.ops.neighborhood_attention._triton_tiles import (
    _NOWHERE,
    _area,
    _bias,
    _corner,
    _first,
    _in_volume,
    _kernel,
    _keys,
    _load_extra,
    _load_rows,
    _program,
    _queries,
    _sees,
    _tokens,
)


@triton.jit
def _parts(b):
    """A float32 block as the sum of two that tf32 holds, up to 2^-22 of it."""
    b_high = (b.to(tl.int32, bitcast=True) & -(1 << 13)).to(tl.float32, bitcast=True)
    return b_high, b - b_high


@triton.jit
def _add_to_table(
    b_table, b_ds, o_y, o_x, NY: tl.constexpr, NX: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, BY: tl.constexpr,
    BX: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Add a slab's gradients of logits [TY * TX, BY * BX] to the table's [NY, NX]: sums along diagonals as products.

    The first with the 0-1 matrix of the pairs of columns at each relative position, the second likewise with the rows.
    o_y, o_x: relative position of the slab's first key and the tile's first query. DOT: operands of the first product;
    float32 ones are taken apart, so that tf32 loses nothing.
    """
    b_ds = tl.permute(tl.reshape(b_ds.to(DOT), (TY, TX, BY, BX)), (0, 2, 1, 3))
    b_ds = tl.reshape(b_ds, (TY * BY, TX * BX))
    o_pair = tl.arange(0, TX * BX)
    b_is = ((o_x + o_pair % BX - o_pair // BX)[:, None] == tl.arange(0, NX)[None, :]).to(DOT)
    o_pair = tl.arange(0, TY * BY)
    b_is_y = (tl.arange(0, NY)[:, None] == (o_y + o_pair % BY - o_pair // BY)[None, :]).to(tl.float32)
    if DOT.is_fp32():
        b_high, b_low = _parts(b_ds)
        b_rows = tl.dot(b_low, b_is, tl.dot(b_high, b_is, input_precision="tf32"), input_precision="tf32")
        b_high, b_low = _parts(b_rows)
        b_table = tl.dot(b_is_y, b_low, b_table, input_precision="tf32")
        return tl.dot(b_is_y, b_high, b_table, input_precision="tf32")
    return tl.dot(b_is_y, tl.dot(b_ds, b_is), b_table, input_precision="tf32")


@triton.jit
def _store_table(p_tables, b_table, head, heads, i_plane, KZ: tl.constexpr, NY: tl.constexpr, NX: tl.constexpr):
    """Store a plane of this program's table."""
    i_table = head.to(tl.int64) * (tl.num_programs(0) // heads) + tl.program_id(0) // heads
    o_table = tl.arange(0, NY)[:, None] * NX + tl.arange(0, NX)[None, :]
    tl.store(p_tables + (i_table * (2 * KZ - 1) + i_plane) * (NY * NX) + o_table, b_table)


@_kernel
def neighborhood_attention_bwd_kernel_queries(
    p_q, p_k, p_v, p_rpb, p_o, p_do, p_lse, p_dlse, p_rows, p_dq, p_tables, scale,
    stride_qb, stride_qy, stride_qx, stride_qh, stride_kb, stride_ky, stride_kx, stride_kh,
    stride_vb, stride_vy, stride_vx, stride_vh, heads, height, width, dilation_y, dilation_x, tiles_y, tiles_x,
    stride_qz, stride_kz, stride_vz, depth, dilation_z, p_extrak, p_extrav, extra,
    REPEATS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    STRIDE_Z: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    CAUSAL_Z: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr, DEEP: tl.constexpr,
    TY: tl.constexpr, TX: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr, BM: tl.constexpr, NY: tl.constexpr,
    NX: tl.constexpr, WIDE: tl.constexpr, BIAS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """dq, delta = <do, o> - dlse, and a tile's part of the bias' gradient, with the grid and tiles of the forward pass.

    With P = exp(logits - lse): dS = P (do v^T - delta), dq = scale dS k, drpb = sums of dS over equal relative places.
    Writes p_rows, pairs of lse log2(e) and delta, and p_tables (heads, programs, 2 KZ - 1, NY, NX), summed over
    programs outside: of a program's table the planes that it sees, one on chip at a time. On chip: q, do, dq (float32).
    """
    head, plane, g_y, g_x, n_y, n_x, y_0, x_0 = _program(
        heads, height, width, dilation_y, dilation_x, tiles_y, tiles_x, TY, TX
    )
    image, z, n_z, z_0 = _in_volume(plane, depth, dilation_z, DEEP)
    o_qy, o_qx = _area(y_0, x_0, TY, TX)
    m_q = (o_qy < n_y) & (o_qx < n_x)
    o_firsty = tl.where(o_qy < n_y, _first(o_qy, n_y, KY, STRIDE_Y, CAUSAL_Y), _NOWHERE)
    o_firstx = tl.where(o_qx < n_x, _first(o_qx, n_x, KX, STRIDE_X, CAUSAL_X), _NOWHERE)
    o_y, o_x = _tokens(o_qy, o_qx, n_y, n_x, g_y, g_x, dilation_y, dilation_x)
    p_q += (image * stride_qb + z.to(INDEX) * stride_qz + head * stride_qh) * ALIGN
    p_k += (image * stride_kb + z.to(INDEX) * stride_kz + head // REPEATS * stride_kh) * ALIGN
    p_v += (image * stride_vb + z.to(INDEX) * stride_vz + head // REPEATS * stride_vh) * ALIGN
    b_q = _load_rows(p_q, (o_y.to(INDEX) * stride_qy + o_x.to(INDEX) * stride_qx) * ALIGN, D, BD)
    o_out = (o_y.to(INDEX) * width + o_x) * heads + head
    o_plane = plane * height * width * heads
    b_do = _load_rows(p_do + o_plane * E, o_out * E, E, BE)
    b_o = _load_rows(p_o + o_plane * E, o_out * E, E, BE)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1) - tl.load(p_dlse + o_plane + o_out)
    b_lse = tl.load(p_lse + o_plane + o_out) * LOG2E
    p_row = p_rows + o_plane * 2 + (o_out * 2)[:, None] + tl.arange(0, 2)[None, :]
    tl.store(p_row, tl.join(b_lse, b_delta), mask=m_q[:, None])
    p_rpb += head * ((2 * KZ - 1) * (2 * KY - 1) * (2 * KX - 1))

    b_dq = tl.zeros((TY * TX, BD), tl.float32)
    b_table = tl.zeros((NY, NX), tl.float32)
    key_z, behind_z = _keys(z_0, n_z, 1, KZ, STRIDE_Z, CAUSAL_Z)
    key_y, behind_y = _keys(y_0, n_y, TY, KY, STRIDE_Y, CAUSAL_Y)
    key_x, behind_x = _keys(x_0, n_x, TX, KX, STRIDE_X, CAUSAL_X)
    slabs_x = tl.cdiv(behind_x - key_x, BX) if WIDE else 1
    slabs = tl.cdiv(behind_y - key_y, BY) * slabs_x
    for s in range(slabs * (behind_z - key_z)):
        key_sz, key_sy, key_sx = _corner(s, slabs, slabs_x, key_z, key_y, key_x, BY, BX, WIDE, DEEP)
        o_ky, o_kx = _area(key_sy, key_sx, BY, BX)
        o_sy, o_sx = _tokens(o_ky, o_kx, n_y, n_x, g_y, g_x, dilation_y, dilation_x)
        o_sz = (key_sz - z_0).to(INDEX) * dilation_z  # planes from the tile's
        p_sk = p_k + o_sz * stride_kz * ALIGN
        p_sv = p_v + o_sz * stride_vz * ALIGN
        b_k = _load_rows(p_sk, (o_sy.to(INDEX) * stride_ky + o_sx.to(INDEX) * stride_kx) * ALIGN, D, BD)
        b_v = _load_rows(p_sv, (o_sy.to(INDEX) * stride_vy + o_sx.to(INDEX) * stride_vx) * ALIGN, E, BE)
        m_y = _sees(o_firsty[:, None], o_qy[:, None], o_ky[None, :], KY, CAUSAL_Y)
        m_x = _sees(o_firstx[:, None], o_qx[:, None], o_kx[None, :], KX, CAUSAL_X)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2E)
        b_s += tl.where(m_x, -b_lse[:, None], float("-inf"))  # one instruction with the product; the same for all slabs
        if BIAS:
            o_rz, o_ry, o_rx = key_sz - z_0 + (KZ - 1), key_sy - y_0 + (KY - 1), key_sx - x_0 + (KX - 1)
            p_table = p_rpb + o_rz * ((2 * KY - 1) * (2 * KX - 1))
            b_s += _bias(p_table, o_ry, o_rx, KY, KX, TY, TX, BY, BX, False)
        b_s = tl.where(m_y, b_s, float("-inf"))
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = tl.exp2(b_s) * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
        if BIAS:
            b_table = _add_to_table(b_table, b_ds, o_ry, o_rx, NY, NX, TY, TX, BY, BX, b_k.dtype)
            if DEEP:
                last = s % slabs == slabs - 1  # of a plane
                if last:
                    _store_table(p_tables, b_table, head, heads, o_rz, KZ, NY, NX)
                b_table = tl.where(last, 0.0, b_table)
    if BM:
        for m_0 in range(0, extra, BM):
            b_k, b_v, m_m = _load_extra(
                p_extrak, p_extrav, m_0, extra, image, head // REPEATS, heads // REPEATS, D, E, BD, BE, BM
            )
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2E) - b_lse[:, None]
            b_s = tl.where(m_m[None, :], b_s, float("-inf"))
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
            b_ds = tl.exp2(b_s) * (b_dp - b_delta[:, None])
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    store_rows(p_dq + o_plane * D, o_out * D, b_dq * scale, m_q, D, BD)
    if BIAS and not DEEP:
        _store_table(p_tables, b_table, head, heads, 0, KZ, NY, NX)


@_kernel
def neighborhood_attention_bwd_kernel_keys(
    p_q, p_k, p_v, p_rpb, p_do, p_rows, p_dk, p_dv, scale,
    stride_qb, stride_qy, stride_qx, stride_qh, stride_kb, stride_ky, stride_kx, stride_kh,
    stride_vb, stride_vy, stride_vx, stride_vh, heads, height, width, dilation_y, dilation_x, tiles_y, tiles_x,
    stride_qz, stride_kz, stride_vz, depth, dilation_z,
    REPEATS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    STRIDE_Z: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    CAUSAL_Z: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr, DEEP: tl.constexpr,
    TY: tl.constexpr, TX: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr, WIDE: tl.constexpr, BIAS: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """dk = scale dS^T q and dv = P^T do of a tile of TY x TX keys, gathered from the queries that see any of them.

    Grid: heads of k and v x groups x tiles x planes x images. Reads slabs of BY x BX queries with their do, lse and
    delta, of all planes that see the tile's and all query heads that share the keys; on chip: k, v and both gradients
    (float32).
    """
    head, plane, g_y, g_x, n_y, n_x, y_0, x_0 = _program(
        heads, height, width, dilation_y, dilation_x, tiles_y, tiles_x, TY, TX
    )
    image, z, n_z, z_0 = _in_volume(plane, depth, dilation_z, DEEP)
    o_ky, o_kx = _area(y_0, x_0, TY, TX)
    o_y, o_x = _tokens(o_ky, o_kx, n_y, n_x, g_y, g_x, dilation_y, dilation_x)
    p_q += (image * stride_qb + z.to(INDEX) * stride_qz) * ALIGN
    p_k += (image * stride_kb + z.to(INDEX) * stride_kz + head * stride_kh) * ALIGN
    p_v += (image * stride_vb + z.to(INDEX) * stride_vz + head * stride_vh) * ALIGN
    b_k = _load_rows(p_k, (o_y.to(INDEX) * stride_ky + o_x.to(INDEX) * stride_kx) * ALIGN, D, BD)
    b_v = _load_rows(p_v, (o_y.to(INDEX) * stride_vy + o_x.to(INDEX) * stride_vx) * ALIGN, E, BE)
    o_out = (o_y.to(INDEX) * width + o_x) * heads + head
    o_plane = plane * height * width * heads
    p_do += o_plane * (REPEATS * E)
    p_rows += o_plane * (REPEATS * 2)
    m_k = (o_ky < n_y) & (o_kx < n_x)

    b_dk = tl.zeros((TY * TX, BD), tl.float32)
    b_dv = tl.zeros((TY * TX, BE), tl.float32)
    query_z, behind_z = _queries(z_0, n_z, 1, KZ, STRIDE_Z, CAUSAL_Z)
    query_y, behind_y = _queries(y_0, n_y, TY, KY, STRIDE_Y, CAUSAL_Y)
    query_x, behind_x = _queries(x_0, n_x, TX, KX, STRIDE_X, CAUSAL_X)
    slabs_x = tl.cdiv(behind_x - query_x, BX) if WIDE else 1
    slabs = tl.cdiv(behind_y - query_y, BY) * slabs_x
    slabs_head = slabs * (behind_z - query_z)
    for i in range(slabs_head * REPEATS):
        repeat = i // slabs_head if REPEATS > 1 else 0
        query_head = head * REPEATS + repeat
        query_sz, query_sy, query_sx = _corner(
            i - repeat * slabs_head, slabs, slabs_x, query_z, query_y, query_x, BY, BX, WIDE, DEEP
        )
        o_qy, o_qx = _area(query_sy, query_sx, BY, BX)
        o_sy, o_sx = _tokens(o_qy, o_qx, n_y, n_x, g_y, g_x, dilation_y, dilation_x)
        o_q = (o_sy.to(INDEX) * stride_qy + o_sx.to(INDEX) * stride_qx + query_head.to(INDEX) * stride_qh) * ALIGN
        o_row = (o_sy.to(INDEX) * width + o_sx) * (heads * REPEATS) + query_head
        o_sz = (query_sz - z_0).to(INDEX) * dilation_z  # planes from the tile's
        o_away = o_sz * height * width * (heads * REPEATS)
        b_q = _load_rows(p_q + o_sz * stride_qz * ALIGN, o_q, D, BD)
        b_do = _load_rows(p_do + o_away * E, o_row * E, E, BE)
        b_lse, b_delta = tl.split(tl.load(p_rows + o_away * 2 + (o_row * 2)[:, None] + tl.arange(0, 2)[None, :]))
        m_z = _sees(_first(query_sz, n_z, KZ, STRIDE_Z, CAUSAL_Z), query_sz, z_0, KZ, CAUSAL_Z)
        o_firsty = tl.where((o_qy < n_y) & m_z, _first(o_qy, n_y, KY, STRIDE_Y, CAUSAL_Y), _NOWHERE)
        o_firstx = tl.where(o_qx < n_x, _first(o_qx, n_x, KX, STRIDE_X, CAUSAL_X), _NOWHERE)
        m_y = _sees(o_firsty[None, :], o_qy[None, :], o_ky[:, None], KY, CAUSAL_Y)
        m_x = _sees(o_firstx[None, :], o_qx[None, :], o_kx[:, None], KX, CAUSAL_X)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * (scale * LOG2E) - b_lse[None, :]
        if BIAS:
            o_table = query_head * (2 * KZ - 1) + z_0 - query_sz + (KZ - 1)
            p_table = p_rpb + o_table * ((2 * KY - 1) * (2 * KX - 1))
            b_s += _bias(p_table, y_0 - query_sy + (KY - 1), x_0 - query_sx + (KX - 1), KY, KX, TY, TX, BY, BX, True)
        b_s = tl.where(m_y & m_x, b_s, float("-inf"))
        b_p = tl.exp2(b_s)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    store_rows(p_dk + o_plane * D, o_out * D, b_dk * scale, m_k, D, BD)
    store_rows(p_dv + o_plane * E, o_out * E, b_dv, m_k, E, BE)


@_kernel
def neighborhood_attention_bwd_kernel_extra(
    p_q, p_do, p_rows, p_dk, p_dv, scale, stride_qb, stride_qz, stride_qy, stride_qx, stride_qh,
    heads, depth, height, width, p_extrak, p_extrav, extra,
    REPEATS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, BT: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """dk = scale dS^T q and dv = P^T do of BM additional keys, which all queries see, from a part of the queries.

    Grid: (heads of k and v x images, blocks of keys, parts). A program takes every parts-th slab of BT queries, in the
    order of the map, of the query heads that share the keys, and writes its part of p_dk and p_dv (parts, images,
    extra, heads, channels), summed over parts outside. On chip: k, v and both gradients (float32).
    """
    head = tl.program_id(0) % heads
    image = (tl.program_id(0) // heads).to(tl.int64)
    m_0 = tl.program_id(1) * BM
    b_k, b_v, m_m = _load_extra(p_extrak, p_extrav, m_0, extra, image, head, heads, D, E, BD, BE, BM)
    tokens = depth * height * width
    p_q += image * stride_qb * ALIGN
    p_do += image * tokens * heads * (REPEATS * E)
    p_rows += image * tokens * heads * (REPEATS * 2)

    b_dk = tl.zeros((BM, BD), tl.float32)
    b_dv = tl.zeros((BM, BE), tl.float32)
    for i in range(tl.program_id(2), tl.cdiv(tokens, BT) * REPEATS, tl.num_programs(2)):
        query_head = head * REPEATS + i % REPEATS
        o_n = i // REPEATS * BT + tl.arange(0, BT)
        m_n = o_n < tokens
        o_n = tl.minimum(o_n, tokens - 1)
        o_line = o_n // width
        o_z, o_y, o_x = o_line // height, o_line % height, o_n % width
        o_q = o_z.to(INDEX) * stride_qz + o_y.to(INDEX) * stride_qy + o_x.to(INDEX) * stride_qx
        o_row = o_n.to(INDEX) * (heads * REPEATS) + query_head
        b_q = _load_rows(p_q, (o_q + query_head.to(INDEX) * stride_qh) * ALIGN, D, BD)
        b_do = _load_rows(p_do, o_row * E, E, BE)
        b_lse, b_delta = tl.split(tl.load(p_rows + (o_row * 2)[:, None] + tl.arange(0, 2)[None, :]))
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * (scale * LOG2E) - b_lse[None, :]
        b_p = tl.exp2(tl.where(m_m[:, None] & m_n[None, :], b_s, float("-inf")))
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    o_m = m_0 + tl.arange(0, BM)
    images = tl.num_programs(0) // heads
    o_out = ((tl.program_id(2) * images + image) * extra + o_m) * heads + head
    store_rows(p_dk, o_out * D, b_dk * scale, m_m, D, BD)
    store_rows(p_dv, o_out * E, b_dv, m_m, E, BE)

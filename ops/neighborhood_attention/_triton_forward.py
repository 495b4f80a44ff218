"""Triton kernel of neighborhood attention: the forward pass. See triton_impl.py for the design."""

import triton.language as tl

from subquad.ops._triton_attention import LN2, LOG2E, NOTHING_YET, softmax_step, store_rows
from subquad.ops.neighborhood_attention._triton_tiles import (
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
    _sees,
    _tokens,
)


@_kernel
def neighborhood_attention_fwd_kernel(
    p_q, p_k, p_v, p_rpb, p_o, p_lse, scale,
    stride_qb, stride_qy, stride_qx, stride_qh, stride_kb, stride_ky, stride_kx, stride_kh,
    stride_vb, stride_vy, stride_vx, stride_vh, heads, height, width, dilation_y, dilation_x, tiles_y, tiles_x,
    stride_qz, stride_kz, stride_vz, depth, dilation_z, p_extrak, p_extrav, extra,
    REPEATS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    STRIDE_Z: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    CAUSAL_Z: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr, DEEP: tl.constexpr,
    TY: tl.constexpr, TX: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr, BM: tl.constexpr, WIDE: tl.constexpr,
    BIAS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """o = softmax(scale q k^T + bias) v and lse of a tile of TY x TX queries of a dilation group.

    Grid: heads x groups x tiles x planes x images. The keys that any of the queries sees are read in place, in slabs of
    BY x BX tokens, of a volume (DEEP) one plane after the other, then additional keys in blocks of BM (0 for none); on
    chip: q, the running maximum, sum and output (float32). Strides count ALIGN numbers.
    Bytes: q, k, v once from memory (keys that neighbouring tiles share: from the cache), o and lse once.
    """
    head, plane, g_y, g_x, n_y, n_x, y_0, x_0 = _program(
        heads, height, width, dilation_y, dilation_x, tiles_y, tiles_x, TY, TX
    )
    image, z, n_z, z_0 = _in_volume(plane, depth, dilation_z, DEEP)
    o_qy, o_qx = _area(y_0, x_0, TY, TX)
    m_q = (o_qy < n_y) & (o_qx < n_x)
    o_firsty = _first(o_qy, n_y, KY, STRIDE_Y, CAUSAL_Y)
    o_firstx = _first(o_qx, n_x, KX, STRIDE_X, CAUSAL_X)
    o_y, o_x = _tokens(o_qy, o_qx, n_y, n_x, g_y, g_x, dilation_y, dilation_x)
    p_q += (image * stride_qb + z.to(INDEX) * stride_qz + head * stride_qh) * ALIGN
    p_k += (image * stride_kb + z.to(INDEX) * stride_kz + head // REPEATS * stride_kh) * ALIGN
    p_v += (image * stride_vb + z.to(INDEX) * stride_vz + head // REPEATS * stride_vh) * ALIGN
    b_q = _load_rows(p_q, (o_y.to(INDEX) * stride_qy + o_x.to(INDEX) * stride_qx) * ALIGN, D, BD)
    o_out = (o_y.to(INDEX) * width + o_x) * heads + head
    o_plane = plane * height * width * heads
    p_rpb += head * ((2 * KZ - 1) * (2 * KY - 1) * (2 * KX - 1))

    b_max = tl.full((TY * TX,), NOTHING_YET, tl.float32)
    b_sum = tl.zeros((TY * TX,), tl.float32)
    b_o = tl.zeros((TY * TX, BE), tl.float32)
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
        b_s += tl.where(m_x, 0.0, float("-inf"))  # one instruction with the product; the same for all slabs
        if BIAS:
            o_rz, o_ry, o_rx = key_sz - z_0 + (KZ - 1), key_sy - y_0 + (KY - 1), key_sx - x_0 + (KX - 1)
            p_table = p_rpb + o_rz * ((2 * KY - 1) * (2 * KX - 1))
            b_s += _bias(p_table, o_ry, o_rx, KY, KX, TY, TX, BY, BX, False)
        b_s = tl.where(m_y, b_s, float("-inf"))
        b_p, b_decay, b_max, b_sum = softmax_step(b_s, b_max, b_sum)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_decay[:, None], input_precision=PRECISION)
    if BM:
        for m_0 in range(0, extra, BM):
            b_k, b_v, m_m = _load_extra(
                p_extrak, p_extrav, m_0, extra, image, head // REPEATS, heads // REPEATS, D, E, BD, BE, BM
            )
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2E)
            b_s = tl.where(m_m[None, :], b_s, float("-inf"))
            b_p, b_decay, b_max, b_sum = softmax_step(b_s, b_max, b_sum)
            b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_decay[:, None], input_precision=PRECISION)
    store_rows(p_o + o_plane * E, o_out * E, b_o / b_sum[:, None], m_q, E, BE)
    tl.store(p_lse + o_plane + o_out, (b_max + tl.log2(b_sum)) * LN2, mask=m_q)

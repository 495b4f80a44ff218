"""Triton kernels of region attention. See triton_impl.py for the design."""

import triton
import triton.language as tl

from subquad.ops._triton_attention import (
    LN2,
    LOG2E,
    NOTHING_YET,
    gradient_step,
    load_gradient,
    load_keys,
    load_rows,
    softmax_step,
    store_row,
    store_rows,
    sum_rows,
)

# Numbers that only take part in index arithmetic: no variant of a kernel for each of their divisors. Sizes of regions
# are among them, so that images of all sizes share a kernel.
_PLAIN = [
    *("height", "width", "columns", "size_y", "size_x", "regions", "heads", "lists", "topk", "tiles"),
    *("kv_height", "kv_width", "kv_columns", "kv_size_y", "kv_size_x", "kv_regions"),
]


@triton.jit
def _quotient(o, n):
    """o // n for 0 <= o < 2^20, without the twenty instructions of an integer division.

    (o + 1/2) / n is at least 1 / 2n away from every integer, and rounding moves it by less than 2^-21 o / n.
    """
    return ((o + 0.5) * (1.0 / n)).to(tl.int32)


@triton.jit
def _listed(i_first, tokens, BLOCK: tl.constexpr):
    """Place in the list, and token in its region, of the rows from i_first on of listed regions; each [BLOCK]."""
    i_entry = i_first // tokens
    o_t = i_first - i_entry * tokens + tl.arange(0, BLOCK)
    o_entry = _quotient(o_t, tokens)
    return i_entry + o_entry, o_t - o_entry * tokens


@triton.jit
def _places(o_region, o_t, height, width, columns, size_y, size_x):
    """Pixel of the tokens o_t of regions, and whether it is on the map."""
    o_row = _quotient(o_region, columns)
    o_dy = _quotient(o_t, size_x)
    o_y = o_row * size_y + o_dy
    o_x = (o_region - o_row * columns) * size_x + o_t - o_dy * size_x
    return o_y * width + o_x, (o_y < height) & (o_x < width)


@triton.jit
def _program(regions, heads, lists, tiles):
    """This program's head, tile of the region, region, image, and list of regions: heads vary fastest."""
    i = tl.program_id(0)
    i_h = i % heads
    i = i // heads
    i_tile = i % tiles
    i = i // tiles
    i_b = (i // regions).to(tl.int64)
    return i_h, i_tile, i % regions, i_b, i_b * lists + i_h % lists


@triton.jit
def _chosen(p_regions, i_first, topk, height, width, columns, size_y, size_x, BLOCK: tl.constexpr, HIDE: tl.constexpr):
    """Keys i_first .. of the topk regions at p_regions.

    Returns slot, pixel, whether on the map, whether padding, and what to add to logits (0 or minus infinity) [BLOCK].
    """
    o_slot, o_t = _listed(i_first, size_y * size_x, BLOCK)
    m_in = o_slot < topk
    o_region = tl.load(p_regions + o_slot, mask=m_in, other=0).to(tl.int32)
    o_token, m_map = _places(o_region, o_t, height, width, columns, size_y, size_x)
    m_map = m_in & m_map
    b_hidden = tl.where(m_map if HIDE else m_in, 0.0, -float("inf"))
    return o_slot, o_token, m_map, m_in & (m_map == 0), b_hidden


@triton.jit(do_not_specialize=_PLAIN)
def region_attention_fwd_kernel(
    p_q, p_k, p_v, p_regions, p_weights, p_padk, p_padv, p_o, p_lse, scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    height, width, columns, size_y, size_x, kv_height, kv_width, kv_columns, kv_size_y, kv_size_x,
    regions, kv_regions, heads, lists, topk, tiles,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WEIGHTS: tl.constexpr, PADK: tl.constexpr, PADV: tl.constexpr, HIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o = softmax(scale w q k^T) w v over the keys of the chosen regions, and lse.

    Grid heads * tiles * regions * images: a program takes BM queries of a region in a head and walks over the keys of
    its regions, side by side, in blocks of BN: a block has keys of several small regions. On chip: q, o, the maximum
    and the sum (float32). Bytes: q, o and lse once, k and v once for each program, mostly from the cache.
    """
    i_h, i_tile, i_r, i_b, i_list = _program(regions, heads, lists, tiles)
    p_regions += (i_list * regions + i_r) * topk
    p_weights += (i_list * regions + i_r) * topk
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    o_q = i_tile * BM + tl.arange(0, BM)
    o_tokenq, m_q = _places(i_r, o_q, height, width, columns, size_y, size_x)
    m_q = m_q & (o_q < size_y * size_x)
    b_q = load_rows(p_q + i_b * stride_qb + i_h * stride_qh, o_tokenq * stride_qt, m_q, D, BD)
    b_top = tl.full((BM,), NOTHING_YET, tl.float32)
    b_sum = tl.zeros((BM,), tl.float32)
    b_o = tl.zeros((BM, BE), tl.float32)
    for i_block in range(tl.cdiv(topk * kv_size_y * kv_size_x, BN)):
        o_slot, o_token, m_map, m_pad, b_hidden = _chosen(
            p_regions, i_block * BN, topk, kv_height, kv_width, kv_columns, kv_size_y, kv_size_x, BN, HIDE
        )
        b_k, b_v = load_keys(
            p_k, p_v, p_padk + i_h * D, p_padv + i_h * E, o_token, stride_kt, stride_vt, m_map, m_pad, D, E, BD, BE,
            PADK, PADV,
        )  # fmt: skip
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2E)
        if WEIGHTS:
            b_w = tl.load(p_weights + o_slot, mask=o_slot < topk, other=0.0).to(tl.float32)
            b_s *= b_w[None, :]
        b_p, b_decay, b_top, b_sum = softmax_step(b_s + b_hidden[None, :], b_top, b_sum)
        if WEIGHTS:
            b_p *= b_w[None, :]
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_decay[:, None], input_precision=PRECISION)
    i_first = i_b * height * width * heads + i_h
    store_rows(p_o + i_first * E, o_tokenq * (heads * E), b_o / b_sum[:, None], m_q, E, BE)
    tl.store(p_lse + i_first + o_tokenq * heads, (b_top + tl.log2(b_sum)) * LN2, mask=m_q)


@triton.jit(do_not_specialize=_PLAIN)
def region_attention_bwd_kernel_queries(
    p_q, p_k, p_v, p_regions, p_weights, p_padk, p_padv, p_o, p_lse, p_do, p_dq, p_dw, p_rows, scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    height, width, columns, size_y, size_x, kv_height, kv_width, kv_columns, kv_size_y, kv_size_x,
    regions, kv_regions, heads, lists, topk, tiles,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WEIGHTS: tl.constexpr, PADK: tl.constexpr, PADV: tl.constexpr, HIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and each key's part of the weights' gradients, from lse; grid and blocks of the forward pass.

        P = exp(logits - lse)   dS = P (w do v^T - delta)   delta = <do, o>   dq = scale w dS k
        dw_s = sum over queries and keys of slot s of scale dS q k^T + P do v^T

    Writes p_rows, pairs of lse log2 e and delta of each query, and p_dw (images, regions, tiles, heads, keys), each a
    sum over the tile's queries. On chip: q, do and dq (float32).
    """
    i_h, i_tile, i_r, i_b, i_list = _program(regions, heads, lists, tiles)
    keys = topk * kv_size_y * kv_size_x
    p_regions += (i_list * regions + i_r) * topk
    p_weights += (i_list * regions + i_r) * topk
    p_dw += tl.program_id(0).to(tl.int64) * keys
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    o_q = i_tile * BM + tl.arange(0, BM)
    o_tokenq, m_q = _places(i_r, o_q, height, width, columns, size_y, size_x)
    m_q = m_q & (o_q < size_y * size_x)
    b_q = load_rows(p_q + i_b * stride_qb + i_h * stride_qh, o_tokenq * stride_qt, m_q, D, BD)
    i_first = i_b * height * width * heads + i_h
    b_do, b_delta = load_gradient(p_do + i_first * E, p_o + i_first * E, o_tokenq * (heads * E), m_q, E, BE)
    # What has no query gets no weight.
    b_lse = tl.load(p_lse + i_first + o_tokenq * heads, mask=m_q, other=float("inf")) * LOG2E
    p_row = p_rows + i_first * 2 + (o_tokenq * (heads * 2))[:, None] + tl.arange(0, 2)[None, :]
    tl.store(p_row, tl.join(b_lse, b_delta), mask=m_q[:, None])
    b_dq = tl.zeros((BM, BD), tl.float32)
    for i_block in range(tl.cdiv(keys, BN)):
        o_slot, o_token, m_map, m_pad, b_hidden = _chosen(
            p_regions, i_block * BN, topk, kv_height, kv_width, kv_columns, kv_size_y, kv_size_x, BN, HIDE
        )
        b_k, b_v = load_keys(
            p_k, p_v, p_padk + i_h * D, p_padv + i_h * E, o_token, stride_kt, stride_vt, m_map, m_pad, D, E, BD, BE,
            PADK, PADV,
        )  # fmt: skip
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2E)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        if WEIGHTS:
            b_w = tl.load(p_weights + o_slot, mask=o_slot < topk, other=0.0).to(tl.float32)
            b_p, b_ds = gradient_step(b_s * b_w[None, :] + b_hidden[None, :], b_dp * b_w[None, :], b_lse, b_delta)
            o_key = i_block * BN + tl.arange(0, BN)
            tl.store(p_dw + o_key, tl.sum(b_ds * b_s * LN2 + b_p * b_dp, 0), mask=o_key < keys)
            b_ds *= b_w[None, :]
        else:
            _b_p, b_ds = gradient_step(b_s + b_hidden[None, :], b_dp, b_lse, b_delta)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    store_rows(p_dq + i_first * D, o_tokenq * (heads * D), b_dq * scale, m_q, D, BD)


@triton.jit(do_not_specialize=_PLAIN)
def region_attention_bwd_kernel_keys(
    p_q, p_k, p_v, p_entries, p_starts, p_weights, p_padk, p_padv, p_rows, p_do, p_dk, p_dv, p_dpadk, p_dpadv, scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    height, width, columns, size_y, size_x, kv_height, kv_width, kv_columns, kv_size_y, kv_size_x,
    regions, kv_regions, heads, lists, topk, tiles,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WEIGHTS: tl.constexpr, PADK: tl.constexpr, PADV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk = scale w dS^T q and dv = w P^T do of BM keys of a region, from the queries of all regions that look at it.

    Grid heads * tiles * regions of keys * images. Which regions those are say the entries region * topk + slot, in the
    order of the regions of keys that they name, and where those of each start, (lists, kv_regions + 1). Their queries
    are taken side by side in blocks of BN. On chip: k, v and both gradients (float32). Sums over the padding of the
    tile go to p_dpadk and p_dpadv (programs, D or E); hidden padding has none.
    """
    i_h, i_tile, i_r, i_b, i_list = _program(kv_regions, heads, lists, tiles)
    p_starts += i_list * (kv_regions + 1) + i_r
    i_start = tl.load(p_starts)
    count = tl.load(p_starts + 1) - i_start
    p_entries += i_list * (regions * topk) + i_start
    p_weights += i_list * (regions * topk)
    p_q += i_b * stride_qb + i_h * stride_qh
    i_first = i_b * height * width * heads + i_h
    p_do += i_first * E
    p_rows += i_first * 2
    o_k = i_tile * BM + tl.arange(0, BM)
    o_tokenk, m_map = _places(i_r, o_k, kv_height, kv_width, kv_columns, kv_size_y, kv_size_x)
    m_in = o_k < kv_size_y * kv_size_x
    m_map = m_in & m_map
    m_pad = m_in & (m_map == 0)
    b_k, b_v = load_keys(
        p_k + i_b * stride_kb + i_h * stride_kh, p_v + i_b * stride_vb + i_h * stride_vh, p_padk + i_h * D,
        p_padv + i_h * E, o_tokenk, stride_kt, stride_vt, m_map, m_pad, D, E, BD, BE, PADK, PADV,
    )  # fmt: skip
    b_dk = tl.zeros((BM, BD), tl.float32)
    b_dv = tl.zeros((BM, BE), tl.float32)
    for i_block in range(tl.cdiv(count * (size_y * size_x), BN)):
        o_place, o_t = _listed(i_block * BN, size_y * size_x, BN)
        m_q = o_place < count
        o_entry = tl.load(p_entries + o_place, mask=m_q, other=0).to(tl.int32)
        o_token, m_map_q = _places(_quotient(o_entry, topk), o_t, height, width, columns, size_y, size_x)
        m_q = m_q & m_map_q
        b_q = load_rows(p_q, o_token * stride_qt, m_q, D, BD)
        b_do = load_rows(p_do, o_token * (heads * E), m_q, E, BE)
        p_row = p_rows + (o_token * (heads * 2))[:, None] + tl.arange(0, 2)[None, :]
        b_lse, b_delta = tl.split(tl.load(p_row, mask=m_q[:, None], other=0.0))
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * (scale * LOG2E)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        if WEIGHTS:
            b_w = tl.load(p_weights + o_entry, mask=m_q, other=0.0).to(tl.float32)
            b_s *= b_w[None, :]
            b_dp *= b_w[None, :]
        b_p = tl.exp2(b_s + tl.where(m_q, -b_lse, -float("inf"))[None, :])
        b_ds = b_p * (b_dp - b_delta[None, :])
        if WEIGHTS:
            b_p *= b_w[None, :]
            b_ds *= b_w[None, :]
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    b_dk *= scale
    i_first = i_b * kv_height * kv_width * heads + i_h
    store_rows(p_dk + i_first * D, o_tokenk * (heads * D), b_dk, m_map, D, BD)
    store_rows(p_dv + i_first * E, o_tokenk * (heads * E), b_dv, m_map, E, BE)
    if PADK:
        store_row(p_dpadk + tl.program_id(0).to(tl.int64) * D, sum_rows(b_dk, m_pad), D, BD)
    if PADV:
        store_row(p_dpadv + tl.program_id(0).to(tl.int64) * E, sum_rows(b_dv, m_pad), E, BE)

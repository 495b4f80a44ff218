"""Pieces of neighborhood attention's Triton kernels: tiles, windows, addresses. See triton_impl.py for the design."""

import inspect

import triton
import triton.language as tl

from subquad.ops._triton_attention import LOG2E, load_rows

_NOWHERE = tl.constexpr(1 << 30)  # a window that no key is in

# Numbers that say nothing about alignment: compiling a kernel for each of their special values (1, multiples of 16)
# would only multiply the time of the first call.
_PLAIN = {
    *(f"stride_{tensor}{axis}" for tensor in "qkv" for axis in "bzyxh"),
    *("heads", "depth", "height", "width", "dilation_z", "dilation_y", "dilation_x", "tiles_y", "tiles_x", "extra"),
    *("stride_wb", "stride_wy", "stride_wx", "stride_wh", "blocks", "tokens"),  # of the split forms
}


def _kernel(function):
    """``triton.jit`` without specialisation on the numbers in ``_PLAIN``."""
    names = [name for name in inspect.signature(function).parameters if name in _PLAIN]
    return triton.jit(do_not_specialize=names)(function)


# Places ----------------------------------------------------------------------------------------------------------


@triton.jit
def _program(heads, height, width, dilation_y, dilation_x, tiles_y, tiles_x, TY: tl.constexpr, TX: tl.constexpr):
    """This program's head, plane of the batch, group, tokens of the group on both axes, and first token.

    Neighbours in memory are taken at the same time: heads of a token, then groups and tiles of a row.
    """
    i = tl.program_id(0)
    head = i % heads
    i = i // heads
    g_x = i % dilation_x
    i = i // dilation_x
    x_0 = i % tiles_x * TX
    i = i // tiles_x
    g_y = i % dilation_y
    i = i // dilation_y
    y_0 = i % tiles_y * TY
    plane = (i // tiles_y).to(tl.int64)
    n_y = (height - g_y + dilation_y - 1) // dilation_y
    n_x = (width - g_x + dilation_x - 1) // dilation_x
    return head, plane, g_y, g_x, n_y, n_x, y_0, x_0


@triton.jit
def _in_volume(plane, depth, dilation_z, DEEP: tl.constexpr):
    """Image of a plane of the batch, its place in the volume, tokens of its group on that axis, and place among them.

    Without DEEP an image is one plane, and all that follows from its place is a constant.
    """
    if not DEEP:
        depth = 1
        dilation_z = 1
    i = plane.to(tl.int32)
    z = i % depth
    n_z = (depth - z % dilation_z + dilation_z - 1) // dilation_z
    return (i // depth).to(tl.int64), z, n_z, z // dilation_z


@triton.jit
def _tokens(o_y, o_x, n_y, n_x, g_y, g_x, dilation_y, dilation_x):
    """Rows and columns of the map of tokens of a group; one behind the group's end gives the last."""
    return tl.minimum(o_y, n_y - 1) * dilation_y + g_y, tl.minimum(o_x, n_x - 1) * dilation_x + g_x


@triton.jit
def _corner(
    s, slabs, slabs_x, z_0, y_0, x_0, BY: tl.constexpr, BX: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr
):  # fmt: skip
    """First token of the s-th slab of a region from (z_0, y_0, x_0), of which a row has slabs_x and a plane slabs."""
    if DEEP:
        z_0 += s // slabs
        s = s % slabs
    if WIDE:
        return z_0, y_0 + s // slabs_x * BY, x_0 + s % slabs_x * BX
    return z_0, y_0 + s * BY, x_0


@triton.jit
def _area(y_0, x_0, BY: tl.constexpr, BX: tl.constexpr):
    """The tokens [BY * BX] of a rectangle."""
    o = tl.arange(0, BY * BX)
    return y_0 + o // BX, x_0 + o % BX


@triton.jit
def _load_rows(p, o, D: tl.constexpr, BD: tl.constexpr):
    """[tokens, BD] of rows at offsets o; zeros behind the D numbers of a row."""
    o_d = tl.arange(0, BD)
    if D == BD:
        return tl.load(p + o[:, None] + o_d[None, :])
    return tl.load(p + o[:, None] + o_d[None, :], mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def _load_extra(
    p_k, p_v, m_0, extra, image, head, heads,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """BM additional keys [BM, BD] and values [BM, BE] of a head from m_0 on, and which of them there are [BM]."""
    o_m = m_0 + tl.arange(0, BM)
    m_m = o_m < extra
    o_row = (image * extra + o_m) * heads + head
    return load_rows(p_k, o_row * D, m_m, D, BD), load_rows(p_v, o_row * E, m_m, E, BE), m_m


# Windows ---------------------------------------------------------------------------------------------------------


@triton.jit
def _first(o, n, K: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """First key that token o of a group of n sees."""
    leader = o
    if STRIDE > 1:
        leader = tl.minimum(o // STRIDE * STRIDE + (STRIDE - 1 if CAUSAL else STRIDE // 2), n - 1)
    if CAUSAL:
        return tl.maximum(leader - (K - 1), 0)
    return tl.minimum(tl.maximum(leader - K // 2, 0), n - K)


@triton.jit
def _keys(o_0, n, T: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """First key, and the one behind the last, that any of T queries from o_0 sees."""
    behind = tl.minimum(o_0 + T, n)
    if CAUSAL:
        return _first(o_0, n, K, STRIDE, CAUSAL), behind
    return _first(o_0, n, K, STRIDE, CAUSAL), _first(behind - 1, n, K, STRIDE, CAUSAL) + K


@triton.jit
def _queries(o_0, n, T: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """First query, and the one behind the last, that sees any of T keys from o_0; with a stride perhaps a few more."""
    last = tl.minimum(o_0 + T, n) - 1
    if CAUSAL:
        return tl.maximum(o_0 - (0 if STRIDE == 1 else K - 1), 0), tl.minimum(last + K, n)
    if STRIDE > 1:
        return tl.maximum(o_0 - (K - 1), 0), tl.minimum(last + K, n)
    # All up to the border where the windows are shifted inwards.
    return tl.where(o_0 < K, 0, o_0 - (K - 1 - K // 2)), tl.where(last >= n - K, n, last + K // 2 + 1)


@triton.jit
def _sees(o_first, o_query, o_key, K: tl.constexpr, CAUSAL: tl.constexpr):
    """Whether a key is in a query's window, by the window's first key."""
    inside = (o_key - o_first).to(tl.uint32) < K  # below the first it wraps round
    if CAUSAL:
        inside = inside & (o_key <= o_query)
    return inside


# Bias ------------------------------------------------------------------------------------------------------------


@triton.jit
def _bias(
    p_rpb, o_y, o_x, KY: tl.constexpr, KX: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, CY: tl.constexpr,
    CX: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """[RY * RX, CY * CX] of a table [2 KY - 1, 2 KX - 1], times log2(e): entry o + c - r on both axes, or o - c + r.

    The part of the table that the tile meets is one small block, which all pairs pick their entry from on chip.
    """
    NY: tl.constexpr = triton.next_power_of_2(RY + CY - 1)
    NX: tl.constexpr = triton.next_power_of_2(RX + CX - 1)
    o = tl.arange(0, NY * NX)
    if FLIP:
        o_row = o_y - (CY - 1) + o // NX
        o_column = o_x - (CX - 1) + o % NX
    else:
        o_row = o_y - (RY - 1) + o // NX
        o_column = o_x - (RX - 1) + o % NX
    m = (o_row >= 0) & (o_row < 2 * KY - 1) & (o_column >= 0) & (o_column < 2 * KX - 1)
    b_part = tl.load(p_rpb + o_row * (2 * KX - 1) + o_column, mask=m, other=0.0).to(tl.float32) * LOG2E
    o = tl.arange(0, RY * RX * CY * CX)
    o_r = o // (CY * CX)
    o_c = o % (CY * CX)
    if FLIP:
        o_pick = (o_r // RX - o_c // CX + (CY - 1)) * NX + (o_r % RX - o_c % CX + (CX - 1))
    else:
        o_pick = (o_c // CX - o_r // RX + (RY - 1)) * NX + (o_c % CX - o_r % RX + (RX - 1))
    return tl.reshape(tl.gather(b_part, o_pick, 0), (RY * RX, CY * CX))

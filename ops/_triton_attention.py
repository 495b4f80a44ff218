"""What the attention kernels in Triton share: rows of tokens at their places on a map, and softmax block by block."""

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:  # the processes that compile kernels do without PyTorch
    from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NOTHING_YET = tl.constexpr(-1e30)  # the maximum of no logits: finite, because a block may have no key for a query


# Rows ------------------------------------------------------------------------------------------------------------


@triton.jit
def load_rows(p_x, o_row, m_row, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of DIM channels at offsets o_row [T], [T, BLOCK]; zeros behind them and where m_row [T] is not."""
    o_c = tl.arange(0, BLOCK)
    m = m_row[:, None]
    if BLOCK > DIM:
        m = m & (o_c < DIM)[None, :]
    return tl.load(p_x + o_row[:, None] + o_c[None, :], mask=m, other=0.0)


@triton.jit
def store_rows(p_x, o_row, b_x, m_row, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of ``load_rows``."""
    o_c = tl.arange(0, BLOCK)
    m = m_row[:, None]
    if BLOCK > DIM:
        m = m & (o_c < DIM)[None, :]
    tl.store(p_x + o_row[:, None] + o_c[None, :], b_x.to(p_x.dtype.element_ty), mask=m)


@triton.jit
def load_keys(
    p_k, p_v, p_padk, p_padv, o_token, stride_kt, stride_vt, m_map, m_pad,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, PADK: tl.constexpr, PADV: tl.constexpr,
):  # fmt: skip
    """Keys [T, BD] and values [T, BE] of the tokens o_token [T] where m_map [T]; those of padding where m_pad [T]."""
    b_k = load_rows(p_k, o_token * stride_kt, m_map, D, BD)
    b_v = load_rows(p_v, o_token * stride_vt, m_map, E, BE)
    if PADK:
        b_k = tl.where(m_pad[:, None], _load_row(p_padk, D, BD)[None, :].to(b_k.dtype), b_k)
    if PADV:
        b_v = tl.where(m_pad[:, None], _load_row(p_padv, E, BE)[None, :].to(b_v.dtype), b_v)
    return b_k, b_v


@triton.jit
def _load_row(p_x, DIM: tl.constexpr, BLOCK: tl.constexpr):
    o_c = tl.arange(0, BLOCK)
    return tl.load(p_x + o_c, mask=o_c < DIM, other=0.0)


@triton.jit
def store_row(p_x, b_x, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The first DIM of BLOCK numbers."""
    o_c = tl.arange(0, BLOCK)
    tl.store(p_x + o_c, b_x, mask=o_c < DIM)


@triton.jit
def sum_rows(b_x, m_row):
    """The sum of the rows of b_x [T, C] where m_row [T], [C]."""
    return tl.sum(tl.where(m_row[:, None], b_x, 0.0), 0)


@triton.jit
def load_gradient(p_do, p_o, o_row, m_row, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """do [T, BLOCK] and delta = <do, o> [T], of rows at the same offsets."""
    b_do = load_rows(p_do, o_row, m_row, DIM, BLOCK)
    b_o = load_rows(p_o, o_row, m_row, DIM, BLOCK)
    return b_do, tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)


# Softmax ---------------------------------------------------------------------------------------------------------


@triton.jit
def softmax_step(b_s, b_top, b_sum):
    """One more block of logits [Tq, Tk], in base 2, for queries with maximum b_top and sum b_sum [Tq] so far.

    Returns the block's weights [Tq, Tk], relative to the new maximum, what earlier sums are to be multiplied by, and
    the new maximum and sum. The maximum starts as NOTHING_YET.
    """
    b_new = tl.maximum(b_top, tl.max(b_s, 1))
    b_p = tl.exp2(b_s - b_new[:, None])
    b_decay = tl.exp2(b_top - b_new)
    return b_p, b_decay, b_new, b_sum * b_decay + tl.sum(b_p, 1)


@triton.jit
def gradient_step(b_s, b_dp, b_lse, b_delta):
    """P = exp2(s - lse) and dS = P (dP - delta), each [Tq, Tk]; s and lse [Tq] in base 2."""
    b_p = tl.exp2(b_s - b_lse[:, None])
    return b_p, b_p * (b_dp - b_delta[:, None])


# Before and after the kernels ------------------------------------------------------------------------------------


def with_rows(x: "Tensor") -> "Tensor":
    """``x`` (B, H, W, heads, channels), copied if a pixel's number does not lead to its address by one stride."""
    if x.stride(-1) != 1 or (x.shape[1] > 1 and x.stride(1) != x.shape[2] * x.stride(2)):
        return x.contiguous()
    return x


def strides_of(x: "Tensor") -> tuple[int, int, int]:
    """Strides of an image, a pixel and a head of (B, H, W, heads, channels)."""
    return x.stride(0), x.stride(2) if x.shape[2] > 1 else x.stride(1), x.stride(3)


def pad_gradient(pad: "Tensor", partials: "Tensor") -> "Tensor":
    """The gradient of padding's key or value (heads, channels) from sums of programs; zeros if the map has none."""
    return partials.sum(0).to(pad.dtype) if partials.numel() else pad.new_zeros(pad.shape)

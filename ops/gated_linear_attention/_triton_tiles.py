"""Pieces of the kernels of gated linear attention: rows of tokens, decays, decay factors. See triton_impl.py."""

import inspect

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_FAR = tl.constexpr(-80.0)
"""Base-2 logarithm of a chunk's decay from which on its reciprocal is not used: far from overflow for any k."""

# Numbers that say nothing about alignment: compiling a kernel for each of their special values (1, multiples of 16)
# would only multiply the time of the first call.
_PLAIN = {"length", "heads", "chunks", "segments", "segment_chunks", "groups", "kinds"}


def _kernel(function):
    """``triton.jit`` without specialisation on the numbers in ``_PLAIN``."""
    names = [name for name in inspect.signature(function).parameters if name in _PLAIN]
    return triton.jit(do_not_specialize=names)(function)


@triton.jit
def _load_rows(p, o_n, m_n, o_d, stride):
    """Rows o_n of (N, d), zeros where m_n is not set: [len(o_n), len(o_d)]."""
    return tl.load(p + o_n.to(tl.int64)[:, None] * stride + o_d[None, :], mask=m_n[:, None], other=0.0)


@triton.jit
def _log2_of_one_plus(b):
    """log2(1 + b) for b in [0, 1], to 3e-7 of the value: half the instructions of a logarithm of any number."""
    b_p = -0.01207702 * b + 0.06274843
    b_p = b_p * b - 0.154152
    b_p = b_p * b + 0.25517635
    b_p = b_p * b - 0.35309635
    b_p = b_p * b + 0.48001246
    b_p = b_p * b - 0.72130676
    return (b_p * b + 1.4426947) * b


@triton.jit
def _log_decays(b_gates, INVERSE: tl.constexpr, LOGITS: tl.constexpr):
    """Base-2 logarithms of the decays from log decays, or from logits with INVERSE = 1 / gate_normalizer."""
    b = b_gates.to(tl.float32) * _LOG2E
    if LOGITS:
        b = (tl.minimum(b, 0.0) - _log2_of_one_plus(tl.exp2(-tl.abs(b)))) * INVERSE
    return b


@triton.jit
def _load_log_decays(p, o_n, m_n, o_d, stride, INVERSE: tl.constexpr, LOGITS: tl.constexpr):
    """Rows o_n of a direction's gates as ``_log_decays``, 0 (no decay) where m_n is not set."""
    b = _log_decays(_load_rows(p, o_n, m_n, o_d, stride), INVERSE, LOGITS)
    return tl.where(m_n[:, None], b, 0.0)


@triton.jit
def _sigmoid_of_negative(b):
    """1 / (1 + exp(b)), without overflow."""
    b_small = tl.exp2(-tl.abs(b) * _LOG2E)
    return tl.where(b > 0, b_small, 1.0) / (1.0 + b_small)


@triton.jit
def _dot(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """a b with operands rounded to DOT, summed in float32."""
    return tl.dot(a.to(DOT), b.to(DOT), input_precision=PRECISION)


@triton.jit
def _ones_where(m, DOT: tl.constexpr):
    """A matrix of ones and zeros, without a conversion from float32."""
    return tl.where(m, tl.full(m.shape, 1.0, DOT), tl.full(m.shape, 0.0, DOT))


@triton.jit
def _sums(b_rows, b_g, DOT: tl.constexpr):
    """b_rows b_g for a matrix of ones and zeros, b_g with 16 bits or more: sums over rows by tensor cores."""
    if DOT.primitive_bitwidth == 32:
        return tl.dot(b_rows, b_g, input_precision="tf32x3")
    b_high = b_g.to(DOT)
    return tl.dot(b_rows, b_high) + tl.dot(b_rows, (b_g - b_high.to(tl.float32)).to(DOT))


@triton.jit
def _may_invert(b_f, b_b):
    """Whether no sum of log decays of a chunk, of either direction, is too far below 0 for a reciprocal."""
    return tl.min(tl.minimum(b_f, b_b)) > _FAR


@triton.jit
def _double(b_pf, b_sf, b_pb, b_sb, o_t, level):
    """Decay factors of all rows, from blocks of 2 ** level rows to blocks of twice as many.

    With a the decays, of the forward direction (f) and the backward direction (b), and t a row of a block:

        pf_t = product of a over the block's rows r <= t        sf_s = product of a over its rows r > s
        pb_t = product of a over the block's rows r >= t        sb_s = product of a over its rows r < s

    so that p s is the product over the whole block, and each row needs that of the neighbour block. Products of factors
    that are at most 1: nothing overflows and no digits cancel.
    """
    o_other = tl.broadcast_to((o_t ^ (tl.full((), 1, tl.int32) << level))[:, None], b_pf.shape)
    b_f = tl.gather(b_pf * b_sf, o_other, 0)
    b_b = tl.gather(b_pb * b_sb, o_other, 0)
    m_upper = ((o_t >> level) & 1 == 1)[:, None]
    return (
        tl.where(m_upper, b_pf * b_f, b_pf),
        tl.where(m_upper, b_sf, b_sf * b_f),
        tl.where(m_upper, b_pb, b_pb * b_b),
        tl.where(m_upper, b_sb * b_b, b_sb),
    )


@triton.jit
def _load_state(
    p_tiles, p_sums, p_entries, kind, i_group, chunk, o_c, o_v, chunks, segments, segment_chunks, groups,
    K: tl.constexpr, V: tl.constexpr, TWO_LEVEL: tl.constexpr,
):  # fmt: skip
    """State of a kind that enters a chunk, rows o_c and columns o_v: as its segment left it, and what entered that."""
    o_state = o_c[:, None] * V + o_v[None, :]
    i_chunk = (kind * groups + i_group).to(tl.int64) * chunks + chunk
    b = tl.load(p_tiles + i_chunk * (K * V) + o_state).to(tl.float32)
    if TWO_LEVEL:
        i_entry = (kind * groups + i_group).to(tl.int64) * segments + chunk // segment_chunks
        b_since = tl.exp2(tl.load(p_sums + i_chunk * K + o_c))
        b += b_since[:, None] * tl.load(p_entries + i_entry * (K * V) + o_state)
    return b

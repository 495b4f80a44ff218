"""Pieces of the Triton kernels of linear attention: programs, tiles, features. See triton_impl.py for the design."""

import inspect

import triton
import triton.language as tl

# Numbers that say nothing about alignment: compiling a kernel for each of their special values (1, multiples of 16)
# would only multiply the time of the first call.
_PLAIN = {"queries", "keys", "heads", "splits", "query_chunk", "key_chunk", "columns"}


def _kernel(function):
    """``triton.jit`` without specialisation on the numbers in ``_PLAIN``."""
    names = [name for name in inspect.signature(function).parameters if name in _PLAIN]
    return triton.jit(do_not_specialize=names)(function)


@triton.jit
def _program(heads, splits):
    """Image, head, and number of the split; neighbouring programs share tokens, so that memory is read in long runs."""
    i = tl.program_id(0)
    return (i // (heads * splits)).to(tl.int64), (i % heads).to(tl.int64), i // heads % splits


@triton.jit
def _mask(start, end, C: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr):
    """[BN, BC]: tokens before ``end`` and channels that exist."""
    m = (start + tl.arange(0, BN) < end)[:, None]
    if C != BC:
        return m & (tl.arange(0, BC) < C)[None, :]
    return m & tl.full((1, BC), True, tl.int1)


@triton.jit
def _at(p, start, stride, BN: tl.constexpr, BC: tl.constexpr):
    """Addresses [BN, BC] of the tokens from ``start``."""
    p_start = p + tl.full((), start, tl.int64) * stride
    return p_start + tl.arange(0, BN)[:, None] * stride + tl.arange(0, BC)[None, :]


@triton.jit
def _load_vector(p, C: tl.constexpr, BC: tl.constexpr):
    """[BC] in float32, zeros beyond C."""
    o = tl.arange(0, BC)
    return tl.load(p + o, mask=o < C, other=0.0)


@triton.jit
def _store_vector(p, b, C: tl.constexpr, BC: tl.constexpr):
    o = tl.arange(0, BC)
    tl.store(p + o, b, mask=o < C)


@triton.jit
def _load_state(p, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr):
    """[BD, BE] in float32, zeros beyond D and E."""
    return tl.load(_at(p, 0, E, BD, BE), mask=_mask(0, D, E, BD, BE), other=0.0)


@triton.jit
def _store_state(p, b, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr):
    tl.store(_at(p, 0, E, BD, BE), b, mask=_mask(0, D, E, BD, BE))


# Features --------------------------------------------------------------------------------------------------------


@triton.jit
def _features(b_x, m, MAP: tl.constexpr):
    """The feature map in float32, 0 where the mask is off."""
    b = b_x.to(tl.float32)
    if MAP == "elu1":
        b = tl.where(m, tl.exp(tl.minimum(b, 0.0)) + tl.maximum(b, 0.0), 0.0)
    if MAP == "relu":
        b = tl.maximum(b, 0.0)
    return b


@triton.jit
def _through_map(b_features, b_grad, MAP: tl.constexpr):
    """The slope of a feature map is a function of the feature itself."""
    if MAP == "elu1":
        return b_grad * tl.minimum(b_features, 1.0)
    if MAP == "relu":
        return tl.where(b_features > 0.0, b_grad, 0.0)
    return b_grad


@triton.jit
def _load_angles(p_cos, p_sin, start, end, stride, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """Cosines and sines of a tile's pairs of channels, each [BN, BD / 2]."""
    o = _at(tl.full((), 0, tl.int64), start, stride, BN, BD // 2)
    m = _mask(start, end, D // 2, BN, BD // 2)
    return tl.load(p_cos + o, mask=m, other=0.0), tl.load(p_sin + o, mask=m, other=0.0)


@triton.jit
def _rotate(b, b_cos, b_sin, BN: tl.constexpr, BD: tl.constexpr):
    """Turn the pairs of channels (2t, 2t + 1) of [BN, BD]; with -sin, back."""
    b_0, b_1 = tl.split(tl.reshape(b, (BN, BD // 2, 2)))
    return tl.reshape(tl.join(b_0 * b_cos - b_1 * b_sin, b_1 * b_cos + b_0 * b_sin), (BN, BD))


# Products --------------------------------------------------------------------------------------------------------
# Operands have the dtype DOT: bfloat16 (with PRECISION "ieee"), or float32 in that precision. A state from whose
# products a mean is subtracted is the sum of two operands (PARTS = 2): rounded once, its error would be magnified.


@triton.jit
def _operand(b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """A tile as an operand, rounded to nearest: tensor cores cut what tf32 cannot hold off, which would be a bias."""
    if PRECISION == "tf32":
        b_rounded = ((b.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(b == b, b_rounded, b)
    return b.to(DOT)


@triton.jit
def _parts(b, DOT: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr):
    """A state as an operand and, with two parts, its remainder."""
    b_high = _operand(b, DOT, PRECISION)
    if PARTS == 2:
        return b_high, _operand(b - b_high.to(tl.float32), DOT, PRECISION)
    return b_high, b_high


@triton.jit
def _times_state(b, b_high, b_low, PRECISION: tl.constexpr, PARTS: tl.constexpr):
    """[BN, .] @ state, float32."""
    b_product = tl.dot(b, b_high, input_precision=PRECISION)
    if PARTS == 2:
        b_product = tl.dot(b, b_low, b_product, input_precision=PRECISION)
    return b_product


@triton.jit
def _fold(b, BN: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr):
    """[BN, BC] -> [ROWS, BC]: sums of tokens that one thread holds, in the layout of a load."""
    return tl.sum(tl.reshape(b, (BN // ROWS, ROWS, BC)), axis=0)


@triton.jit
def _fold_product(b, BN: tl.constexpr, BC: tl.constexpr):
    """[BN, BC] -> [BN / 16, 8, BC]: likewise, in the layout of a tensor core product."""
    return tl.sum(tl.reshape(b, (BN // 16, 2, 8, BC)), axis=1)


@triton.jit
def _sum_tokens(b):
    """The vector that a sum of ``_fold_product`` stands for."""
    return tl.sum(tl.sum(b, axis=0), axis=0)


@triton.jit
def _beside(b, b_product):
    """``b`` itself, held by the same threads as a product of its shape.

    The compiler would compute features twice, as loaded and as the product is held, and move whole tiles between both.
    """
    return b + 0.0 * b_product

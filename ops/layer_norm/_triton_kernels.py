"""The kernels of the layer norm; ``triton_impl`` launches them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(block, rows, dim, BM: tl.constexpr, BC: tl.constexpr, INDEX: tl.constexpr):
    """Offsets of a block's rows in a (rows, dim) tensor, and which are inside."""
    row = tl.arange(0, BM).to(INDEX) + block * BM
    channel = tl.arange(0, BC)
    return row[:, None] * dim + channel[None, :], (row < rows)[:, None] & (channel < dim)[None, :]


@triton.jit
def _center(total, inside, dim, eps):
    """Deviations from the means of the rows, zero outside, and the inverse of their size."""
    mean = tl.sum(total, 1) / dim
    centered = tl.where(inside, total - mean[:, None], 0.0)
    return centered, tl.rsqrt(tl.sum(centered * centered, 1) / dim + eps)[:, None]


@triton.jit(do_not_specialize=["rows"])
def layer_norm_fwd_kernel(
    x,
    branch,
    weight,
    bias,
    total,
    y,
    rows,
    dim,
    eps,
    BRANCH: tl.constexpr,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    INDEX: tl.constexpr,
):
    """total = x + branch (with BRANCH) and y, for a block of rows."""
    at, inside = _tile(tl.program_id(0), rows, dim, BM, BC, INDEX)
    channel = tl.arange(0, BC)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if BRANCH:
        value += tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    centered, scale = _center(value, inside, dim, eps)
    result = centered * scale * tl.load(weight + channel, mask=channel < dim, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        result += tl.load(bias + channel, mask=channel < dim, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "blocks"])
def layer_norm_bwd_kernel(
    total,
    weight,
    grad_total,
    grad_y,
    grad_x,
    grad_branch,
    partials,
    rows,
    dim,
    blocks,
    eps,
    ENTERING: tl.constexpr,
    BRANCH: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Gradients of x and branch, and a program's sums for those of weight and bias: (programs, 2, dim)."""
    channel = tl.arange(0, BC)
    factor = tl.load(weight + channel, mask=channel < dim, other=0.0).to(tl.float32)[None, :]
    sum_weight = tl.zeros([BM, BC], tl.float32)
    sum_bias = tl.zeros([BM, BC], tl.float32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        at, inside = _tile(block, rows, dim, BM, BC, INDEX)
        value = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32)
        centered, scale = _center(value, inside, dim, eps)
        normed = centered * scale
        sum_weight += grad * normed
        sum_bias += grad
        grad *= factor
        along = tl.sum(grad * normed, 1) / dim
        grad = (grad - (tl.sum(grad, 1) / dim)[:, None] - normed * along[:, None]) * scale
        if ENTERING:
            grad += tl.load(grad_total + at, mask=inside, other=0.0).to(tl.float32)
        if BRANCH:
            tl.store(grad_branch + at, grad.to(grad_branch.dtype.element_ty), mask=inside)
        tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=inside)
    to = partials + tl.program_id(0) * 2 * dim + channel
    tl.store(to, tl.sum(sum_weight, 0), mask=channel < dim)
    tl.store(to + dim, tl.sum(sum_bias, 0), mask=channel < dim)


@triton.jit(do_not_specialize=["programs"])
def layer_norm_bwd_kernel_sums(
    partials, grad_weight, grad_bias, programs, dim, BIAS: tl.constexpr, BP: tl.constexpr, BJ: tl.constexpr
):
    """Gradients of weight (first programs) and bias, in a fixed order of programs."""
    channel = tl.program_id(0) * BJ + tl.arange(0, BJ)
    which = tl.program_id(1)
    found = tl.zeros([BP, BJ], tl.float32)
    for first in range(0, programs, BP):
        program = first + tl.arange(0, BP)
        inside = (program < programs)[:, None] & (channel < dim)[None, :]
        found += tl.load(partials + (program[:, None] * 2 + which) * dim + channel[None, :], mask=inside, other=0.0)
    result = tl.sum(found, 0)
    if which == 0:
        tl.store(grad_weight + channel, result.to(grad_weight.dtype.element_ty), mask=channel < dim)
    elif BIAS:
        tl.store(grad_bias + channel, result.to(grad_bias.dtype.element_ty), mask=channel < dim)

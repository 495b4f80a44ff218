"""Triton kernels of the selective scan: sums of what the programs of the backward pass leave. See triton_impl.py."""

import triton
import triton.language as tl

from subquad.ops.selective_scan._triton_tiles import _kernel


@_kernel
def selective_scan_bwd_kernel_rows(
    p_grows,
    p_gdt,
    p_gB,
    p_gC,
    rows,
    programs,
    RANK: tl.constexpr,
    ROW: tl.constexpr,
    BT: tl.constexpr,
    BW: tl.constexpr,
):
    """Sum [programs, rows, ROW] over programs, in order, and part it into gradients of dt (rows, R), B and C (rows).

    Grid (rows / BT).
    """
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_w = tl.arange(0, BW)
    m_t = (o_t < rows)[:, None]
    p_row = p_grows + (o_t * ROW)[:, None] + o_w[None, :]
    b = tl.zeros((BT, BW), dtype=tl.float32)
    for _ in range(programs):
        b += tl.load(p_row, mask=m_t & (o_w < ROW)[None, :], other=0.0).to(tl.float32)
        p_row += rows.to(tl.int64) * ROW
    b = b.to(p_gB.dtype.element_ty)
    tl.store(p_gdt + (o_t * RANK)[:, None] + o_w[None, :], b, mask=m_t & (o_w < RANK)[None, :])
    o_none = tl.zeros((1, BW), tl.int32)
    tl.store(p_gB + o_t[:, None] + o_none, b, mask=m_t & (o_w == RANK)[None, :])
    tl.store(p_gC + o_t[:, None] + o_none, b, mask=m_t & (o_w == RANK + 1)[None, :])


@_kernel
def selective_scan_bwd_kernel_parameters(
    p_params, p_weights, p_gA, p_gD, p_gbias, p_gweight, programs, channels,
    N: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """Sum [programs, K * E, N + 2] over programs into gA, gD and gbias; for programs 1 of the second axis of the grid,
    [programs, K * E, BR] into gweight (K * E, R). In a fixed order.

    Grid (numbers of a row / BJ, 2 with low-rank steps).
    """
    o_j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    if tl.program_id(1) == 0:
        o_e = o_j // (N + 2)
        o_n = o_j % (N + 2)
        b = _sum_programs(p_params, o_j, o_e < channels, programs, channels * (N + 2), BP, BJ)
        tl.store(p_gA + o_e * N + o_n, b, mask=(o_e < channels) & (o_n < N))
        tl.store(p_gD + o_e, b, mask=(o_e < channels) & (o_n == N))
        tl.store(p_gbias + o_e, b, mask=(o_e < channels) & (o_n == N + 1))
    else:
        o_e = o_j // BR
        o_r = o_j % BR
        b = _sum_programs(p_weights, o_j, (o_e < channels) & (o_r < RANK), programs, channels * BR, BP, BJ)
        tl.store(p_gweight + o_e * RANK + o_r, b, mask=(o_e < channels) & (o_r < RANK))


@triton.jit
def _sum_programs(p, o_j, m_j, programs, stride, BP: tl.constexpr, BJ: tl.constexpr):
    """Column sums [BJ] of a matrix with ``programs`` rows."""
    b_sum = tl.zeros((BP, BJ), dtype=tl.float32)
    for start in range(0, programs, BP):
        o_p = start + tl.arange(0, BP)
        p_tile = p + o_p.to(tl.int64)[:, None] * stride + o_j[None, :]
        b_sum += tl.load(p_tile, mask=(o_p < programs)[:, None] & m_j[None, :], other=0.0)
    return tl.sum(b_sum, 0)

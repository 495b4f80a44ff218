"""Triton kernels of the gate behind the selective scan. See _triton_gate.py."""

import triton.language as tl

from subquad.ops.selective_scan._triton_tiles import _kernel


@_kernel
def selective_scan_fwd_kernel_gate(
    p_sum, p_z, p_addend, p_y, numbers, scale, ADD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y = scale (sum + addend) silu(z). Grid (numbers / BLOCK). All arithmetic is fp32."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numbers
    b_sum = tl.load(p_sum + o, mask=m, other=0.0).to(tl.float32)
    if ADD:
        b_sum += tl.load(p_addend + o, mask=m, other=0.0).to(tl.float32)
    b_z = tl.load(p_z + o, mask=m, other=0.0).to(tl.float32)
    tl.store(p_y + o, (scale * b_sum * (b_z * tl.sigmoid(b_z))).to(p_y.dtype.element_ty), mask=m)


@_kernel
def selective_scan_bwd_kernel_gate(
    p_gy, p_z, p_addend, p_sum, p_gsum, p_gz, numbers, scale,
    ADD: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gsum = scale gy silu(z), and gz = scale gy (sum + addend) silu'(z) if the sum was kept.

    Grid (numbers / BLOCK). All arithmetic is fp32.
    """
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numbers
    b_gy = tl.load(p_gy + o, mask=m, other=0.0).to(tl.float32) * scale
    b_z = tl.load(p_z + o, mask=m, other=0.0).to(tl.float32)
    b_sigmoid = tl.sigmoid(b_z)
    b_silu = b_z * b_sigmoid
    b_sum = b_z
    if KEPT:  # before anything is stored, so that all loads are on their way at once
        b_sum = tl.load(p_sum + o, mask=m, other=0.0).to(tl.float32)
        if ADD:
            b_sum += tl.load(p_addend + o, mask=m, other=0.0).to(tl.float32)
    tl.store(p_gsum + o, (b_gy * b_silu).to(p_gsum.dtype.element_ty), mask=m)
    if KEPT:
        b_gz = b_gy * b_sum * (b_sigmoid + b_silu * (1 - b_sigmoid))
        tl.store(p_gz + o, b_gz.to(p_gz.dtype.element_ty), mask=m)

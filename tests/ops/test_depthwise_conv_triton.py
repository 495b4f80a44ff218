"""The Triton kernels of the depthwise convolution against the float64 reference: values and every gradient.

The same cases run in Triton's interpreter on the CPU (``interpret``: fp32 and fp16, small shapes) and on a GPU
(``gpu``: bf16 too, and shapes with many programs).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from subquad import ops
from subquad.ops import causal_conv1d, depthwise_conv2d

# Relative L2 error per dtype: rounding of results, and of dz where there is an activation; weights are float32.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


class Case(NamedTuple):
    """(B, H, W, C) or (B, N, C), the kernel's size, and options of the op."""

    shape: tuple[int, ...]
    kernel: tuple[int, ...] = (3, 3)
    bias: bool = True
    options: dict[str, Any] = {}  # noqa: RUF012


SMALL = {
    "3x3": Case((2, 5, 7, 6)),
    "segments of rows": Case((2, 40, 3, 8), options={"activation": "silu"}),
    "two blocks of channels": Case((1, 9, 5, 40), bias=False, options={"residual": True}),
    "gelu of a sum": Case((2, 3, 4, 5), options={"activation": "gelu", "residual": True}),
    "silu": Case((1, 4, 9, 16), bias=False, options={"activation": "silu"}),
    "5x5": Case((2, 7, 6, 8), (5, 5), options={"residual": True}),
    "5x5, segments of rows": Case((1, 35, 2, 3), (5, 5)),
    "3x7": Case((1, 4, 5, 8), (3, 7), options={"activation": "gelu"}),
    "7x1": Case((1, 9, 2, 4), (7, 1)),
    "1x5": Case((1, 3, 9, 4), (1, 5), bias=False),
    "1x1": Case((1, 3, 2, 4), (1, 1)),
    "map below the kernel": Case((2, 1, 2, 3), (5, 5), options={"activation": "silu"}),
    "one row": Case((2, 1, 9, 4), options={"residual": True}),
    "one column": Case((2, 9, 1, 4)),
    "one pixel": Case((1, 1, 1, 1), (3, 3), bias=False),
    "sequence": Case((2, 9, 6), (4,), options={"activation": "silu"}),
    "reversed sequence": Case((2, 9, 6), (4,), options={"activation": "silu", "reverse": True}),
    "sequence, segments": Case((3, 53, 16), (4,), bias=False),
    "reversed sequence, segments": Case((3, 53, 16), (4,), bias=False, options={"reverse": True}),
    "8 taps": Case((2, 19, 8), (8,), options={"activation": "gelu"}),
    "reversed, below the kernel": Case((2, 2, 4), (8,), options={"reverse": True}),
    "one token": Case((1, 1, 5), (4,), options={"reverse": True, "activation": "silu"}),
    "one tap": Case((2, 3, 5), (1,)),
}
LARGE = {
    "vmamba stage 1": Case((16, 56, 56, 96), bias=False, options={"activation": "silu"}),
    "vmamba stage 4": Case((32, 7, 7, 768), bias=False, options={"activation": "silu"}),
    "position encoding": Case((8, 28, 28, 192), options={"residual": True}),
    "odd map": Case((3, 61, 45, 100), options={"activation": "gelu", "residual": True}),
    "large map": Case((1, 256, 256, 96)),
    "5x5": Case((8, 56, 56, 64), (5, 5)),
    "5x5, odd map": Case((3, 33, 47, 72), (5, 5), options={"residual": True}),
    "vim": Case((32, 197, 384), (4,), options={"activation": "silu"}),
    "vim, reversed": Case((32, 197, 384), (4,), options={"activation": "silu", "reverse": True}),
    "long sequence": Case((1, 5000, 200), (4,), options={"activation": "silu", "reverse": True}),
    "8 taps": Case((4, 501, 96), (8,)),
}


def inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random arguments in float64; x is exactly representable in ``dtype``, the parameters in float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.shape, generator=generator).to(dtype)
    arguments = {"x": x, "weight": torch.randn((case.shape[-1], *case.kernel), generator=generator)}
    if case.bias:
        arguments["bias"] = torch.randn(case.shape[-1:], generator=generator)
    return {name: value.double() for name, value in arguments.items()}


def run(case: Case, arguments: dict[str, Tensor], dtype: torch.dtype, backend: str, device: str) -> dict[str, Tensor]:
    """Output and all gradients, in float64 on the CPU."""
    leaves = {}
    for name, value in arguments.items():
        narrow = dtype if name == "x" or dtype == torch.float64 else torch.float32
        leaves[name] = value.to(device, narrow, copy=True).requires_grad_()
    op = depthwise_conv2d if len(case.shape) == 4 else causal_conv1d
    with ops.use_backend(backend):
        y = op(**leaves, **case.options)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).half().to(device, y.dtype))
    found = {"y": y} | {f"grad {name}": leaf.grad for name, leaf in leaves.items()}
    return {name: value.detach().double().cpu() for name, value in found.items() if value is not None}


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    arguments = inputs(case, dtype)
    # On a GPU by cuDNN in float64, which the reference would take long for.
    expected = run(case, arguments, torch.float64, "torch" if device == "cuda" else "reference", device)
    found = run(case, arguments, dtype, "triton", device)
    assert found.keys() == expected.keys()
    errors = {name: ((found[name] - value).norm() / value.norm()).item() for name, value in expected.items()}
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE[dtype]}
    assert not wrong, f"relative errors above {TOLERANCE[dtype]}: {wrong}"


@pytest.mark.interpret
@pytest.mark.parametrize("name", SMALL)
def test_interpreted_fp32(name: str, poisoned_memory: None) -> None:
    check(SMALL[name], torch.float32, "cpu")


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["segments of rows", "gelu of a sum", "5x5", "reversed sequence"])
def test_interpreted_fp16(name: str, poisoned_memory: None) -> None:
    check(SMALL[name], torch.float16, "cpu")


@pytest.mark.interpret
@pytest.mark.parametrize("columns", [4, 32])
def test_tiles_of_any_width(columns: int, poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from subquad.ops.depthwise_conv import triton_impl

    config = triton_impl.Config(columns=columns, warps=1, waves=1)
    monkeypatch.setattr(triton_impl, "_CONFIGS", dict.fromkeys(triton_impl._CONFIGS, config))
    for name in ("segments of rows", "5x5", "sequence, segments"):
        check(SMALL[name], torch.float32, "cpu")


@pytest.mark.interpret
def test_offsets_of_64_bits(poisoned_memory: None, wide_offsets: Callable[[str], None]) -> None:
    """As for a tensor of more than 2^31 elements."""
    wide_offsets("depthwise_conv")
    check(SMALL["gelu of a sum"], torch.float32, "cpu")


@pytest.mark.interpret
def test_strides_do_not_matter(poisoned_memory: None) -> None:
    """A slice of the channels runs as it is, any other layout as a copy."""
    arguments = {name: value.float() for name, value in inputs(SMALL["3x3"], torch.float32).items()}
    x = arguments["x"]
    with ops.use_backend("triton"):
        expected = depthwise_conv2d(**arguments)
        arguments["weight"] = arguments["weight"].mT.contiguous().mT
        for view in (
            torch.cat([x.new_full(x.shape, torch.nan), x], dim=-1)[..., x.shape[-1] :],
            x.transpose(0, -1).contiguous().transpose(0, -1),
            x.transpose(1, 2).contiguous().transpose(1, 2),
        ):
            assert torch.equal(depthwise_conv2d(**(arguments | {"x": view})), expected)


def test_what_the_kernels_do_not_serve_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subquad.ops._triton.why_not", lambda x: None)
    x, weight = torch.randn(2, 5, 7, 6), torch.randn(6, 3, 3)
    for arguments, reason in (
        ((x, torch.randn(6, 7, 7)), "a kernel of 7 x 7"),
        ((x.double(), weight), "float64"),
        ((x[:0], weight), "empty batch"),
    ):
        explanation = ops.explain(depthwise_conv2d, *arguments)
        assert explanation.chosen == "torch" and reason in explanation.passed_over["triton"]
    assert ops.explain(depthwise_conv2d, x, weight).chosen == "triton"
    assert "a kernel of 1 x 9" in ops.explain(causal_conv1d, x[0], torch.randn(6, 9)).passed_over["triton"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_small_on_gpu(name: str, dtype: torch.dtype, poisoned_memory: None) -> None:
    check(SMALL[name], dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_large_on_gpu(name: str, dtype: torch.dtype, poisoned_memory: None) -> None:
    check(LARGE[name], dtype, "cuda")


@pytest.mark.gpu
def test_slices_of_a_projection_on_gpu() -> None:
    """Rows that are longer than their channels, at addresses that are multiples of 16 bytes and of 2."""
    weight = torch.randn(96, 3, 3, device="cuda")
    for offset in (0, 96, 1):
        whole = torch.randn(4, 15, 13, 400, device="cuda", dtype=torch.bfloat16)
        x = whole[..., offset : offset + 96]
        assert torch.equal(depthwise_conv2d(x, weight), depthwise_conv2d(x.contiguous(), weight))


@pytest.mark.gpu
def test_results_are_the_same_to_the_bit() -> None:
    arguments = inputs(LARGE["odd map"], torch.bfloat16)
    first, second = (run(LARGE["odd map"], arguments, torch.bfloat16, "triton", "cuda") for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.gpu
def test_autocast_on_gpu() -> None:
    x, weight = torch.randn(2, 14, 14, 64, device="cuda"), torch.randn(64, 3, 3, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        y = depthwise_conv2d(x, weight, activation="silu")
        z = depthwise_conv2d(x, weight, residual=True)
    assert (y.dtype, z.dtype) == (torch.bfloat16, torch.float32)
    (y.float().sum() + z.sum()).backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32 and weight.grad.isfinite().all()

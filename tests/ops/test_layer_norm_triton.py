"""The Triton kernels of the layer norm against the float64 reference: values and every gradient.

The same cases run in Triton's interpreter on the CPU (``interpret``: fp32 and fp16, small shapes) and on a GPU
(``gpu``: bf16 too, and shapes with many programs).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from subquad import ops
from subquad.ops import add_layer_norm, layer_norm

# Relative L2 error by dtype of branch and result: their rounding; x, weight and bias are float32.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


class Case(NamedTuple):
    """(*, C), and what the call has."""

    shape: tuple[int, ...]
    add: bool = True
    bias: bool = True
    unused: bool = False  # the sum itself


SMALL = {
    "sum": Case((2, 5, 7, 96)),
    "norm": Case((2, 5, 7, 96), add=False),
    "no bias": Case((3, 40), bias=False),
    "norm, no bias": Case((130, 16), add=False, bias=False),
    "odd": Case((67, 7)),
    "unused sum": Case((5, 33), unused=True),
    "one row": Case((200,)),
    "one channel": Case((9, 1)),
    "wide": Case((3, 1300)),
    "widest": Case((2, 4096), add=False),
}
LARGE = {
    "vmamba stage 1": Case((16, 56, 56, 96)),
    "vmamba stage 1, norm": Case((16, 56, 56, 96), add=False),
    "nat stage 1": Case((16, 56, 56, 64)),
    "stage 2": Case((16, 28, 28, 192)),
    "stage 3": Case((32, 14, 14, 384)),
    "stage 4": Case((32, 7, 7, 768), add=False),
    "odd": Case((3, 61, 45, 100)),
    "patch merging": Case((8, 14, 14, 1536), add=False),
}


def inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random arguments in float64; exactly representable in the dtypes that they are given in."""
    generator = torch.Generator().manual_seed(0)
    arguments = {"x": torch.randn(case.shape, generator=generator) + 1}
    if case.add:
        arguments["branch"] = torch.randn(case.shape, generator=generator).to(dtype)
    arguments["weight"] = torch.randn(case.shape[-1:], generator=generator)
    if case.bias:
        arguments["bias"] = torch.randn(case.shape[-1:], generator=generator)
    return {name: value.double() for name, value in arguments.items()}


def run(case: Case, arguments: dict[str, Tensor], dtype: torch.dtype, backend: str, device: str) -> dict[str, Tensor]:
    """Results and all gradients, in float64 on the CPU."""
    leaves = {}
    for name, value in arguments.items():
        narrow = dtype if name == "branch" or dtype == torch.float64 else torch.float32
        leaves[name] = value.to(device, narrow, copy=True).requires_grad_()
    with ops.use_backend(backend):
        found = add_layer_norm(**leaves, dtype=dtype) if case.add else (layer_norm(**leaves, dtype=dtype),)
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(y.shape, generator=generator).half().to(device, y.dtype) for y in found]
        torch.autograd.backward(found[case.unused :], cotangents[case.unused :])
    results = {f"result {i}": y for i, y in enumerate(found)}
    results |= {f"grad {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert len(results) == len(found) + len(leaves)
    return {name: value.detach().double().cpu() for name, value in results.items()}


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    arguments = inputs(case, dtype)
    expected = run(case, arguments, torch.float64, "reference", device)
    found = run(case, arguments, dtype, "triton", device)
    assert found.keys() == expected.keys()
    # With one channel there is nothing but rounding in the gradient of x through the norm.
    errors = {n: ((found[n] - v).norm() / v.norm().clamp(min=1e-3)).item() for n, v in expected.items()}
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE[dtype]}
    assert not wrong, f"relative errors above {TOLERANCE[dtype]}: {wrong}"


@pytest.mark.interpret
@pytest.mark.parametrize("name", SMALL)
def test_interpreted_fp32(name: str, poisoned_memory: None) -> None:
    check(SMALL[name], torch.float32, "cpu")


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["sum", "norm", "odd"])
def test_interpreted_fp16(name: str, poisoned_memory: None) -> None:
    check(SMALL[name], torch.float16, "cpu")


@pytest.mark.interpret
def test_more_blocks_than_programs(poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of the backward pass goes through several blocks of rows, the last of them not full."""
    from subquad.ops import _triton
    from subquad.ops.layer_norm import triton_impl

    monkeypatch.setattr(triton_impl, "_WAVES", 1)
    monkeypatch.setattr(_triton, "multiprocessor_count", lambda device: 3)
    monkeypatch.setattr(triton_impl, "_plans", _triton.Plans())
    check(Case((333, 96)), torch.float32, "cpu")


@pytest.mark.interpret
def test_offsets_of_64_bits(poisoned_memory: None, wide_offsets: Callable[[str], None]) -> None:
    """As for a tensor of more than 2^31 elements."""
    wide_offsets("layer_norm")
    check(SMALL["sum"], torch.float32, "cpu")


@pytest.mark.interpret
def test_strides_do_not_matter() -> None:
    x, branch, weight = torch.randn(4, 6, 20), torch.randn(4, 6, 20), torch.randn(40)[::2]
    with ops.use_backend("triton"):
        expected = add_layer_norm(x, branch, weight.contiguous())
        turned = x.transpose(0, 1).contiguous().transpose(0, 1)
        for ours, theirs in zip(add_layer_norm(turned, branch, weight), expected, strict=True):
            assert torch.equal(ours, theirs) and ours.is_contiguous()


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
def test_results_are_the_same_to_the_bit() -> None:
    arguments = inputs(LARGE["odd"], torch.bfloat16)
    first, second = (run(LARGE["odd"], arguments, torch.bfloat16, "triton", "cuda") for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())

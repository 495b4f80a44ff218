"""The Triton kernels of neighborhood attention against the float64 reference: values and every gradient.

The same cases run in Triton's interpreter on the CPU (``interpret``: fp32 and fp16, small shapes) and on a GPU
(``gpu``: bf16 too, and maps of many tiles). What the interpreter cannot see (races, registers, layouts) needs the GPU.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from subquad import ops
from subquad.ops import na1d, na2d, na3d
from subquad.ops.neighborhood_attention import prepare

# Relative L2 error per dtype. fp32: three tf32 products for one, sums of some hundred terms. 16 bit: one rounding of
# the weights, of dS, and of the results.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}

OPS = {1: na1d, 2: na2d, 3: na3d}


class Case(NamedTuple):
    size: tuple[int, ...]
    kernel_size: Any = 3
    dilation: Any = 1
    stride: Any = 1
    is_causal: Any = False
    batch: int = 2
    heads: int = 2
    shared: int | None = None
    dim: int = 8
    values: int | None = None
    bias: bool = True
    scale: float | None = None
    extra: int | None = None


SMALL = {
    "several tiles": Case((19, 18), 7, batch=1, heads=1),
    "no bias": Case((18, 11), 7, batch=1, heads=1, bias=False),
    "even kernel": Case((11, 13), (4, 6), batch=1),
    "window of the map": Case((7, 9), (7, 9)),
    "narrow windows": Case((10, 23), (9, 2), batch=1),
    "dilated": Case((11, 17), 3, dilation=(2, 3), batch=1),
    "grid": Case((6, 12), 3, dilation=(2, 4), batch=1, bias=False),
    "kernel of one": Case((9, 5), (1, 3)),
    "column": Case((20, 1), (5, 1)),
    "row": Case((1, 20), (1, 5), bias=False),
    "one pixel": Case((1, 1), 1, bias=False),
    "wide windows": Case((19, 21), (9, 13), batch=1, heads=1),
    "stride": Case((15, 19), (6, 4), stride=(4, 3), batch=1),
    "causal": Case((11, 18), (4, 5), is_causal=(True, False), stride=(3, 1), batch=1),
    "causal dilated": Case((18, 11), 3, is_causal=True, dilation=2, batch=1, bias=False),
    "shared heads": Case((9, 8), 5, heads=4, shared=2, values=3, batch=1),
    "one channel": Case((9, 9), dim=1, heads=1),
    "wide heads": Case((9, 10), 5, heads=1, dim=40, values=17, batch=1, scale=-0.3),
    "sequence": Case((150,), 9, bias=False),
    "sequence with bias": Case((30,), 5, dilation=2),
    "causal sequence": Case((90,), 8, is_causal=True, dilation=2, stride=3, bias=False),
    "empty batch": Case((8, 9), batch=0),
    "extra key": Case((9, 10), 5, extra=1),
    "extra keys, shared heads": Case((7, 9), (4, 3), heads=4, shared=2, values=3, batch=1, stride=2, extra=5),
    "extra keys, several blocks": Case((12, 7), 5, heads=1, dim=9, is_causal=True, bias=False, extra=40),
    "extra keys, sequence": Case((70,), 5, dilation=2, batch=1, bias=False, extra=17),
    "no extra keys": Case((6, 5), heads=1, extra=0),
    "extra keys, empty batch": Case((6, 5), batch=0, extra=2),
    "volume": Case((4, 9, 7), 3, batch=1, heads=1),
    "volume, several images": Case((4, 6, 5), 3, bias=False),
    "volume, even kernel": Case((5, 3, 6), (4, 2, 5), heads=1, extra=2),
    "volume, window of it": Case((3, 5, 4), (3, 5, 4), batch=1),
    "volume, dilated": Case((7, 6, 5), (3, 2, 3), dilation=(2, 3, 1), batch=1, heads=1),
    "volume, stride": Case((8, 7, 6), (4, 3, 5), stride=(3, 2, 4), batch=1, heads=1),
    "volume, causal": Case((5, 6, 4), (3, 4, 2), is_causal=(True, False, True), batch=1, heads=1, extra=1),
    "volume, causal, stride, dilated": Case(
        (10, 5, 6), (4, 3, 3), dilation=(2, 1, 1), stride=(3, 1, 2), is_causal=(True, True, False), batch=1, heads=1
    ),
    "volume, shared heads": Case((3, 4, 5), (2, 3, 3), heads=4, shared=2, values=3, batch=1, scale=-0.3, extra=5),
    "volume of one plane": Case((1, 6, 7), (1, 3, 5), extra=1),
    "volume of one row": Case((5, 1, 20), (3, 1, 7), bias=False, batch=1),
    "volume of one column": Case((4, 10, 1), (3, 5, 1), batch=1, heads=1),
    "volume, only time": Case((7, 1, 1), (4, 1, 1), batch=1, heads=1),
    "volume, planes apart": Case((3, 9, 8), (1, 3, 3), heads=1),
    "volume, empty batch": Case((3, 5, 4), 3, batch=0),
}
LARGE = {
    "56": Case((56, 56), 7, batch=3, dim=32),
    "dilated": Case((56, 57), 7, dilation=(8, 7), batch=3, dim=32),
    "28": Case((28, 30), 7, batch=3, heads=4, dim=32, bias=False),
    "14": Case((14, 14), 7, batch=5, heads=8, dim=32),
    "7": Case((7, 7), 7, batch=9, heads=16, dim=32),
    "13": Case((50, 67), 13, batch=1, dim=64),
    "31": Case((70, 67), 31, batch=1, dim=32),
    "128 channels": Case((24, 30), 7, batch=1, dim=128),
    "shared heads": Case((30, 40), 5, heads=6, shared=2, dim=48, values=16),
    "sequence": Case((1000,), 49, dim=32, bias=False),
    "extra keys": Case((56, 57), 7, batch=2, heads=4, shared=2, dim=32, extra=100),
    "volume": Case((8, 20, 19), 7, batch=2, heads=2, dim=32),
    "volume, no bias": Case((16, 28, 30), (3, 7, 7), heads=2, dim=64, bias=False),
    "volume, everything": Case(
        (13, 17, 22),
        (4, 5, 6),
        dilation=(3, 1, 2),
        stride=(2, 3, 1),
        is_causal=(True, False, False),
        heads=6,
        shared=2,
        dim=48,
        values=16,
        extra=5,
    ),
    "volume, 128 channels": Case((5, 16, 18), 5, batch=1, dim=128, extra=40),
}


def inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random arguments, exactly representable in ``dtype`` where they are activations."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    lead, shared = (case.batch, *case.size), case.shared or case.heads
    result = {
        "q": normal(*lead, case.heads, case.dim),
        "k": normal(*lead, shared, case.dim),
        "v": normal(*lead, shared, case.values or case.dim),
    }
    result = {name: value.to(dtype).double() for name, value in result.items()}
    if case.extra is not None:
        result["additional_keys"] = normal(case.batch, case.extra, shared, case.dim).to(dtype).double()
        result["additional_values"] = normal(case.batch, case.extra, shared, case.values or case.dim).to(dtype).double()
    if case.bias:
        axes = len(case.size)
        kernels = case.kernel_size if isinstance(case.kernel_size, tuple) else (case.kernel_size,) * axes
        result["rpb"] = normal(case.heads, *(2 * kernel - 1 for kernel in kernels)).float().double()
    return result


def options(case: Case) -> dict[str, Any]:
    return {name: getattr(case, name) for name in ("kernel_size", "dilation", "stride", "is_causal", "scale")}


def run(case: Case, arguments: dict[str, Tensor], dtype: torch.dtype, backend: str, device: str) -> dict[str, Tensor]:
    """Output, lse and all gradients, in float64 on the CPU; the loss depends on both results."""
    leaves = {}
    for name, value in arguments.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        leaves[name] = value.to(device, wide if name == "rpb" else dtype, copy=True).requires_grad_()
    with ops.use_backend(backend):
        o, lse = OPS[len(case.size)](**leaves, **options(case), return_lse=True)
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64).bfloat16() for x in (o, lse)]
        grads = torch.autograd.grad(
            (o, lse), tuple(leaves.values()), [x.to(device, y.dtype) for x, y in zip(cotangents, (o, lse), strict=True)]
        )
    found = {"o": o, "lse": lse, **{f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}}
    return {name: value.detach().double().cpu() for name, value in found.items()}


def check(case: Case, dtype: torch.dtype, device: str, expected_from: tuple[str, str] = ("reference", "cpu")) -> None:
    arguments = inputs(case, dtype)
    expected = run(case, arguments, torch.float64, *expected_from)
    found = run(case, arguments, dtype, "triton", device)
    errors = {
        # A gradient that is zero but for rounding (q of a window of one key) is compared with a unit scale.
        name: ((found[name] - value).norm() / value.norm().clamp_min(1)).item()
        for name, value in expected.items()
    }
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE[dtype]}
    assert not wrong, f"relative errors above {TOLERANCE[dtype]}: {wrong}"
    assert {name: value.shape for name, value in found.items()} == {name: x.shape for name, x in expected.items()}


@pytest.mark.interpret
@pytest.mark.parametrize("name", SMALL)
def test_interpreted_fp32(name: str, poisoned_memory: None) -> None:
    check(SMALL[name], torch.float32, "cpu")


@pytest.mark.interpret
@pytest.mark.parametrize(
    "name", ["several tiles", "dilated", "causal", "extra keys, several blocks", "volume, even kernel"]
)
def test_interpreted_fp16(name: str, poisoned_memory: None) -> None:
    check(SMALL[name], torch.float16, "cpu")


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["even kernel", "volume, even kernel"])
def test_any_strides(name: str) -> None:
    """Views of one projection are read in place; channels that are not adjacent are copied."""
    case = SMALL[name]
    attend = OPS[len(case.size)]
    arguments = {name: value.float() for name, value in inputs(case, torch.float32).items()}
    packed = torch.stack([arguments[name] for name in "qkv"], dim=-3)
    views = dict(zip("qkv", packed.unbind(-3), strict=True))
    columns = {name: arguments[name].transpose(1, 2).contiguous().transpose(1, 2) for name in "qk"}
    apart = {name: torch.stack([x] * 2, dim=-1)[..., 0] for name, x in arguments.items() if name != "q"}
    with ops.use_backend("triton"):
        expected = attend(**arguments, **options(case))
        for changed in (views, columns, apart):
            assert torch.equal(attend(**(arguments | changed), **options(case)), expected)


@pytest.mark.interpret
def test_backward_in_torch_from_results_of_triton() -> None:
    """Forward and backward may run in different implementations: both save the output and the lse alone."""
    case = SMALL["narrow windows"]
    arguments = {name: value.float() for name, value in inputs(case, torch.float32).items()}
    q = arguments["q"].requires_grad_()
    grads = []
    for first, second in (("triton", "torch"), ("torch", "triton")):
        with ops.use_backend(first):
            o = na2d(**arguments, **options(case))
        with ops.use_backend(second):
            grads.append(torch.autograd.grad(o, q, torch.ones_like(o))[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)  # rounding of two orders of summation


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize(
    ("size", "heads", "bits"), [((4096, 4096), 4, 64), ((4096, 1024), 4, 32), ((9, 2048, 512), 4, 64)], ids=str
)
def test_offsets_are_wide_where_images_are_large(size: tuple[int, int], heads: int, bits: int) -> None:
    """Without memory: the plan of meta tensors, views of one projection."""
    from subquad.ops.neighborhood_attention import _triton_plan

    packed = torch.empty((2, *size, 3, heads, 32), dtype=torch.bfloat16, device="meta")
    call = prepare(len(size), *packed.unbind(-3), 7)
    plan = _triton_plan.plan_for("forward", call, _triton_plan.default_config("forward", call))
    assert plan.meta["INDEX"].primitive_bitwidth == bits
    assert plan.meta["ALIGN"] == 8


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("shape", "changes", "reason"),
    [
        ((1, 8, 8, 2, 64), {}, None),
        ((1, 8, 8, 2, 64), {"dtype": torch.float64}, "float64"),
        ((1, 8, 8, 8, 2, 64), {}, None),
        ((1, 8, 8, 2, 65), {}, "at most 64 channels, got 65"),
        ((1, 8, 8, 2, 128), {"dtype": torch.float16}, None),
        ((1, 8, 8, 2, 64), {"additional": 1}, None),
    ],
    ids=str,
)
def test_explain_says_what_the_kernels_do_not_serve(
    shape: tuple[int, ...], changes: dict[str, Any], reason: str | None
) -> None:
    q = torch.empty(shape, dtype=changes.get("dtype", torch.float32))
    tokens = dict.fromkeys(("additional_keys", "additional_values"), q[:, 0, :1]) if "additional" in changes else {}
    explanation = ops.explain(f"na{q.dim() - 3}d", q, q, q, 3, **tokens)
    assert explanation.chosen == ("triton" if reason is None else "torch")
    assert (reason or "") in explanation.passed_over.get("triton", "")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_gpu_small(name: str, dtype: torch.dtype, poisoned_memory: None) -> None:
    check(SMALL[name], dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_gpu_large(name: str, dtype: torch.dtype, poisoned_memory: None) -> None:
    """Against the PyTorch path in float64 on the GPU, which is tested against the reference on the CPU."""
    if dtype == torch.float32 and LARGE[name].dim > 64:
        pytest.skip("the float32 kernels serve 64 channels")
    check(LARGE[name], dtype, "cuda", ("torch", "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["56", "dilated", "extra keys", "volume", "volume, everything"])
def test_gpu_is_bitwise_reproducible(name: str) -> None:
    arguments = inputs(LARGE[name], torch.bfloat16)
    first, second = (run(LARGE[name], arguments, torch.bfloat16, "triton", "cuda") for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.gpu
def test_gpu_kernels_of_aligned_tensors_are_not_taken_for_others() -> None:
    """Compiled kernels are kept by shape class; where a tensor starts is part of it."""
    case = LARGE["28"]
    arguments = {name: value.bfloat16().cuda() for name, value in inputs(case, torch.bfloat16).items()}
    aligned = na2d(**arguments, **options(case))
    shifted = {
        name: torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape)
        for name, value in arguments.items()
    }
    # Wrong addresses would give something else altogether; narrow loads may be in another order.
    torch.testing.assert_close(na2d(**shifted, **options(case)), aligned, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_gpu_graph_capture() -> None:
    case = LARGE["14"]
    arguments = {name: value.bfloat16().cuda() for name, value in inputs(case, torch.bfloat16).items()}
    with torch.no_grad():
        expected = na2d(**arguments, **options(case))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = na2d(**arguments, **options(case))
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(o, expected)

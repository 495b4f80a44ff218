"""The Triton kernels against the float64 reference: values and every gradient.

The same cases run in Triton's interpreter on the CPU (``interpret``: fp32 and fp16, small shapes) and on a GPU
(``gpu``: bf16 too, and real shapes). What the interpreter cannot see (races, registers, layouts) needs the GPU.
"""

from __future__ import annotations

from importlib import import_module
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from subquad import ops
from subquad.ops import gated_linear_attention
from subquad.ops.gated_linear_attention import KERNEL_KEY_SIZES, KERNEL_VALUE_SIZES, prepare

Arguments = dict[str, Tensor]

# Relative L2 error per dtype. fp32: products of three tf32 parts, sums of some hundred terms. 16 bit: operands of the
# tensor core products are rounded once more (factors times q and k, states, weights), beside inputs and outputs.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}


class Case(NamedTuple):
    """Gates are logits or, with ``decay``, log decays: half of them about that large, half 0; -20 for "all"."""

    batch: int
    length: int
    heads: int
    d_k: int = 16
    d_v: int = 32
    decay: float | str | None = None
    out: torch.dtype | None = None


SMALL = {
    "one token": Case(1, 1, 1),
    "one chunk": Case(2, 15, 3),
    "one segment": Case(8, 40, 2),
    "a segment for each chunk": Case(1, 70, 1),
    "segments of chunks": Case(4, 130, 2),
    "two blocks of keys": Case(1, 33, 1, 64, 32),
    "two blocks of values": Case(2, 20, 1, 32, 128),
    "many keys": Case(1, 20, 1, 128, 64),
    "keys 16, values 128": Case(1, 9, 1, 16, 128),
    "keys 32, values 32": Case(1, 9, 1, 32, 32),
    "keys 64, values 128": Case(1, 9, 1, 64, 128),
    "keys 128, values 32": Case(1, 9, 1, 128, 32),
    "no decay": Case(1, 70, 1, decay=0.0),
    "e^-1 or none": Case(1, 70, 1, decay=1.0),
    "e^-20 or none": Case(1, 70, 1, decay=20.0),
    "e^-20 always": Case(1, 40, 1, decay="all"),
    "e^-1000 or none": Case(1, 40, 1, decay=1000.0),
}
LARGE = {
    "vig 224": Case(4, 196, 3, 32, 64),
    "vig 1024": Case(2, 4096, 3, 32, 64),
    "hierarchical": Case(2, 3136, 3, 16, 32),
    "one long image": Case(1, 20011, 1, 32, 64),
    "keys 64": Case(2, 777, 2, 64, 64),
    "keys 128": Case(2, 333, 2, 128, 128),
    "values 128": Case(2, 333, 2, 32, 128),
    "keys 16, values 64": Case(3, 50, 1, 16, 64),
    "strong and no decay": Case(2, 777, 2, 32, 64, decay=20.0),
}


def inputs(case: Case, dtype: torch.dtype) -> Arguments:
    """Random arguments in float64, exactly representable in ``dtype``."""
    generator = torch.Generator().manual_seed(case.length + case.d_k)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens = (case.batch, case.length, case.heads)
    gates = 3 * normal(case.batch, case.length, 2, case.heads, case.d_k)
    if case.decay == "all":
        gates = -20 + gates / 10
    elif isinstance(case.decay, float):
        gates = (gates / 3).clamp(max=0) * case.decay
    values = {"q": normal(*tokens, case.d_k), "k": normal(*tokens, case.d_k), "v": normal(*tokens, case.d_v)}
    return {name: value.to(dtype).double() for name, value in (values | {"gates": gates}).items()}


def options(case: Case) -> dict[str, Any]:
    return {"gate_normalizer": 16.0 if case.decay is None else None, "out_dtype": case.out}


def convert(arguments: Arguments, dtype: torch.dtype, device: str) -> Arguments:
    return {name: value.to(device, dtype, copy=True) for name, value in arguments.items()}


def run(arguments: Arguments, dtype: torch.dtype, backend: str, device: str, **given: Any) -> dict[str, Tensor]:
    """Output and all gradients, in float64 on the CPU."""
    leaves = {name: value.requires_grad_() for name, value in convert(arguments, dtype, device).items()}
    with ops.use_backend(backend):
        out = gated_linear_attention(**leaves, **given)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).bfloat16()
        out.backward(cotangent.to(device, out.dtype))
    found = {"out": out} | {f"grad {name}": leaf.grad for name, leaf in leaves.items()}
    return {name: value.detach().double().cpu() for name, value in found.items()}  # type: ignore[union-attr]


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    errors = {name: ((found[name] - value).norm() / (value.norm() or 1.0)).item() for name, value in expected.items()}
    wrong = {name: error for name, error in errors.items() if not error < tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    arguments = inputs(case, dtype)
    expected = run(arguments, torch.float64, "reference", "cpu", **options(case))
    assert_near(run(arguments, dtype, "triton", device, **options(case)), expected, TOLERANCE[dtype])


@pytest.mark.interpret
@pytest.mark.parametrize("name", SMALL)
def test_interpreted_fp32(name: str, poisoned_memory: None) -> None:
    check(SMALL[name], torch.float32, "cpu")


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["one chunk", "a segment for each chunk", "two blocks of values"])
def test_interpreted_fp16(name: str, poisoned_memory: None) -> None:
    check(SMALL[name], torch.float16, "cpu")


@pytest.mark.interpret
def test_interpreted_strong_decays_are_relatively_exact() -> None:
    """Gradients of the gates are of the order of e^-20, and right relative to that."""
    case = SMALL["e^-20 always"]
    arguments = inputs(case, torch.float32)
    expected = run(arguments, torch.float64, "reference", "cpu", **options(case))
    assert 0 < expected["grad gates"].abs().max() < 1e-6
    assert_near(run(arguments, torch.float32, "triton", "cpu", **options(case)), expected, 2e-6)


@pytest.mark.interpret
def test_interpreted_decays_that_never_act_have_no_gradient() -> None:
    grad = run(inputs(SMALL["one chunk"], torch.float32), torch.float32, "triton", "cpu")["grad gates"]
    assert (grad[:, 0, 0] == 0).all() and (grad[:, -1, 1] == 0).all()
    assert grad[:, 1:, 0].any() and grad[:, :-1, 1].any()


@pytest.mark.interpret
def test_interpreted_views_and_wide_gates_and_outputs() -> None:
    """q, k and v as views of one projection, gates that are not rows, float32 beside 16 bits."""
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(2, 21, 2 * 16 + 2 * 16 + 2 * 32, generator=generator).half()
    q, k, v = (part.unflatten(-1, (2, -1)) for part in projected.split([32, 32, 64], dim=-1))
    gates = torch.randn(2, 64, 21, generator=generator).mT.unflatten(-1, (2, 2, 16))
    with ops.use_backend("triton"):
        found = gated_linear_attention(q, k, v, gates, gate_normalizer=16.0, scale=0.3, out_dtype=torch.float32)
    with ops.use_backend("reference"):
        wide = (value.double() for value in (q, k, v, gates))
        expected = gated_linear_attention(*wide, gate_normalizer=16.0, scale=0.3)
    assert found.dtype == torch.float32
    assert_near({"out": found.double()}, {"out": expected}, TOLERANCE[torch.float16])


@pytest.mark.interpret
@pytest.mark.parametrize(("length", "decays"), [(16, (0.0, -0.1)), (40, (-0.1, -5.0))])
def test_interpreted_near_and_far_chunks_side_by_side(length: int, decays: tuple[float, float]) -> None:
    """Chunks that use reciprocals of decays hand states to chunks that do not, and back."""
    arguments = inputs(Case(1, 3 * length, 1, decay=0.0), torch.float32)
    arguments["gates"] = arguments["gates"] + decays[0]
    arguments["gates"][:, length : 2 * length] = decays[1]
    expected = run(arguments, torch.float64, "reference", "cpu")
    assert_near(run(arguments, torch.float32, "triton", "cpu"), expected, TOLERANCE[torch.float32])


def test_every_pair_of_head_sizes_that_has_kernels_has_a_case() -> None:
    cases = [*SMALL.values(), *LARGE.values()]
    assert {(case.d_k, case.d_v) for case in cases} == set(product(KERNEL_KEY_SIZES, KERNEL_VALUE_SIZES))


@pytest.mark.interpret
def test_interpreted_dispatch() -> None:
    def explain(d_k: int, dtype: torch.dtype) -> ops.Explanation:
        return ops.explain(gated_linear_attention, **convert(inputs(Case(1, 3, 1, d_k), dtype), dtype, "cpu"))

    assert explain(16, torch.float32).chosen == explain(128, torch.float16).chosen == "triton"
    assert "head sizes (48, 32)" in explain(48, torch.float32).passed_over["triton"]
    assert "float64" in explain(16, torch.float64).passed_over["triton"]


# Kernels are compiled for each dtype and head size: bfloat16 for everything, others where they differ.
OTHER_DTYPES = ("one chunk", "segments of chunks", "e^-20 or none")
LARGE_FP32 = ("vig 1024", "keys 128", "strong and no decay")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in SMALL]
    + [(name, dtype) for name in OTHER_DTYPES for dtype in (torch.float32, torch.float16)]
    + [("e^-20 always", torch.float32)],  # in float16 the gradients of gates, 1e-8, would be 0
    ids=str,
)
def test_gpu_small(name: str, dtype: torch.dtype, poisoned_memory: None) -> None:
    check(SMALL[name], dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in LARGE] + [(name, torch.float32) for name in LARGE_FP32],
    ids=str,
)
def test_gpu_large(name: str, dtype: torch.dtype, poisoned_memory: None) -> None:
    """Against the PyTorch path in float64 on the GPU, which is tested against the reference on the CPU."""
    case = LARGE[name]
    arguments = inputs(case, dtype)
    expected = run(arguments, torch.float64, "torch", "cuda", **options(case))
    assert_near(run(arguments, dtype, "triton", "cuda", **options(case)), expected, TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize(("keys", "values"), [(16, 64), (32, 32), (32, 64)])
@pytest.mark.parametrize(("chunk", "warps"), [(16, 2), (32, 2), (32, 4)])
def test_gpu_other_launch_choices(chunk: int, warps: int, keys: int, values: int) -> None:
    """What ``SUBQUAD_AUTOTUNE=1`` may pick is right too."""
    triton_impl = import_module("subquad.ops.gated_linear_attention.triton_impl")  # imports triton
    case = Case(2, 150, 2, 32, 64)
    arguments = inputs(case, torch.bfloat16)
    expected = run(arguments, torch.float64, "torch", "cuda", **options(case))
    call = prepare(**convert(arguments, torch.bfloat16, "cuda"), **options(case))
    config = triton_impl.Config(chunk, keys, values, warps, registers=255, waves=4)
    assert config in triton_impl._CANDIDATES
    found = {"out": triton_impl._forward(call, config).double().cpu()}
    assert_near(found, {"out": expected["out"]}, TOLERANCE[torch.bfloat16])


@pytest.mark.gpu
def test_gpu_100000_tokens() -> None:
    arguments = inputs(Case(1, 100_000, 1, 16, 32), torch.bfloat16)
    found = run(arguments, torch.bfloat16, "triton", "cuda", gate_normalizer=16.0)
    expected = run(arguments, torch.float32, "torch", "cuda", gate_normalizer=16.0)
    assert_near(found, expected, TOLERANCE[torch.bfloat16])


@pytest.mark.gpu
def test_gpu_is_bitwise_reproducible() -> None:
    case = LARGE["vig 1024"]
    arguments = inputs(case, torch.bfloat16)
    first, second = (run(arguments, torch.bfloat16, "triton", "cuda", **options(case)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
def test_gpu_kernels_of_aligned_tensors_are_not_taken_for_others() -> None:
    """Compiled kernels are kept by shape class; where a tensor starts is part of it."""
    arguments = convert(inputs(SMALL["one segment"], torch.float16), torch.float16, "cuda")
    aligned = gated_linear_attention(**arguments, gate_normalizer=16.0)
    shifted = {
        name: torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape)
        for name, value in arguments.items()
    }
    assert torch.equal(gated_linear_attention(**shifted, gate_normalizer=16.0), aligned)


@pytest.mark.gpu
def test_gpu_graph_capture_of_a_first_call() -> None:
    """Nothing that a capture fills is kept for later calls."""
    case = SMALL["segments of chunks"]
    arguments = convert(inputs(case, torch.float32), torch.float32, "cuda")
    expected = gated_linear_attention(**arguments, **options(case))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gated_linear_attention(**arguments, **options(case))
    graph.replay()
    assert torch.equal(captured, expected)
    assert torch.equal(gated_linear_attention(**arguments, **options(case)), expected)


@pytest.mark.gpu
def test_gpu_dispatch_takes_triton() -> None:
    arguments = convert(inputs(SMALL["one chunk"], torch.float32), torch.float32, "cuda")
    assert ops.explain(gated_linear_attention, **arguments).chosen == "triton"

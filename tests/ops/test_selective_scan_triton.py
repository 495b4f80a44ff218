"""The Triton kernels against the float64 reference: values and every gradient.

The same cases run in Triton's interpreter on the CPU (``interpret``: fp32 and fp16, small shapes) and on a GPU
(``gpu``: bf16 too, and shapes with several programs). What the interpreter cannot see (races, registers, layouts)
needs the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from subquad import ops
from subquad.ops.selective_scan import CROSS

ROWS = ("row", "row_reversed")
# Relative L2 error per dtype. fp32: rounding of a scan of some hundred steps. 16 bit: one rounding of the inputs of the
# tensor core products (the steps' expansion, bf16 for the gradients' products), as upstream's kernels round the steps.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 1e-2}


ACTIVATIONS = ("x", "dt", "B", "C", "z")


class Case(NamedTuple):
    shape: tuple[int, int, int, int]
    routes: Sequence[str] | Tensor = CROSS
    state: int = 1
    rank: int | None = 2
    options: bool = True
    softplus: bool = True
    last_state: bool = False
    initial: bool = False
    out: torch.dtype = torch.float32
    gate: bool = False
    addend: bool = False


SMALL = {
    "cross": Case((2, 3, 5, 8)),
    "cross several chunks": Case((1, 9, 15, 17)),
    "states in and out": Case((1, 9, 15, 8), last_state=True, initial=True),
    "N=4 one reversed route": Case(
        (1, 7, 11, 9), ("column_reversed",), state=4, rank=None, last_state=True, initial=True
    ),
    "N=16": Case((1, 5, 7, 6), state=16),
    "N=7": Case((1, 3, 5, 6), ROWS, state=7, rank=None),
    "N=16 several chunks": Case((1, 1, 130, 4), ROWS, state=16, last_state=True, initial=True),
    "full-rank steps": Case((2, 4, 6, 10), rank=None),
    "one pixel": Case((1, 1, 1, 5)),
    "one row, repeated route": Case((1, 1, 130, 8), ("row", "row_reversed", "row"), options=False),
    "batches of routes": Case((1, 9, 15, 5), ("row", "row_reversed", "column", "row"), last_state=True),
    "steps without softplus": Case((1, 4, 5, 8), ("column", "row"), softplus=False, options=False),
    "index table": Case(
        (2, 5, 14, 8), torch.stack([torch.randperm(70, generator=torch.Generator()) for _ in range(3)])
    ),
    "gate": Case((2, 3, 5, 8), gate=True),
    "gate, several chunks": Case(
        (1, 9, 15, 5), ("row", "row_reversed"), rank=None, gate=True, addend=True, initial=True
    ),
    "gate, N=16": Case((1, 1, 9, 6), ("row",), state=16, gate=True, addend=True),
    "gate, N=2 one reversed route": Case((1, 1, 3, 17), ("row_reversed",), state=2, rank=None, gate=True),
    "gate, N=3": Case((1, 5, 7, 6), ROWS, state=3, gate=True, addend=True, last_state=True),
    "gate, one pixel": Case((1, 1, 1, 5), ("row",), state=4, gate=True, addend=True),
    "gate, 16-bit output": Case((1, 5, 7, 8), gate=True, addend=True, out=torch.float16),
    "gate, 16-bit output, N=2": Case((1, 5, 7, 8), ("row",), state=2, gate=True, addend=True, out=torch.float16),
    "16-bit output": Case((1, 5, 7, 8), out=torch.float16),
    "16-bit output, forward routes": Case((1, 5, 7, 8), ("row", "column"), out=torch.float16),
}
LARGE = {
    "56x56": Case((2, 56, 56, 96), rank=6),
    "28x20 N=16": Case((3, 28, 20, 48), state=16, rank=6),
    "gate": Case((5, 28, 20, 96), rank=6, gate=True, addend=True),
    "gate, N=16": Case((3, 28, 20, 48), state=16, rank=6, gate=True),
    "gate, N=16 one route, 16-bit output": Case(
        (7, 1, 197, 96), ("row_reversed",), state=16, rank=12, gate=True, addend=True, out=torch.bfloat16
    ),
    "14x14": Case((9, 14, 14, 96), rank=24),
    "7x7": Case((19, 7, 7, 96), rank=48),
    "one long image": Case((1, 61, 67, 40), rank=5, last_state=True, initial=True),
}


def inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random arguments, exactly representable in ``dtype`` where they are activations."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    batch, dim = case.shape[0], case.shape[-1]
    k, n, lead = len(case.routes), case.state, case.shape[:3]
    result = {
        "x": normal(*case.shape),
        "dt": normal(*lead, k, case.rank or dim) * (1 if case.softplus else 0.1),
        "A": -torch.rand((k, dim, n), generator=generator, dtype=torch.float64) * 4 - 0.1,
        "B": normal(*lead, k, n),
        "C": normal(*lead, k, n),
    }
    if not case.softplus:
        result["dt"] = result["dt"].abs()
    if case.rank:
        weight = normal(k, dim, case.rank) * case.rank**-0.5
        result["dt_weight"] = weight if case.softplus else weight.abs()
    if case.options:
        result |= {"D": normal(k, dim), "dt_bias": normal(k, dim) - 2}
    if case.initial:
        result["initial_state"] = normal(batch, k, dim, n)
    if case.gate:
        result["z"] = normal(*case.shape)
    if case.addend:
        result["addend"] = normal(*case.shape)
    return result | {name: value.to(dtype).double() for name, value in result.items() if name in ACTIVATIONS}


def run(case: Case, arguments: dict[str, Tensor], dtype: torch.dtype, backend: str, device: str) -> dict[str, Tensor]:
    """Output, last state and all gradients, in float64 on the CPU."""
    leaves = {}
    for name, value in arguments.items():
        narrow = dtype if name in ACTIVATIONS or dtype == torch.float64 else torch.float32
        leaves[name] = value.to(device, narrow, copy=True).requires_grad_()
    with ops.use_backend(backend):
        y, state = ops.selective_scan(
            **leaves,
            routes=case.routes.to(device) if isinstance(case.routes, Tensor) else case.routes,
            dt_softplus=case.softplus,
            scale=0.5 if case.addend else 1.0,
            out_dtype=torch.float64 if dtype == torch.float64 else case.out,
            return_last_state=True,
        )
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64).half()
        loss = (y.double() * cotangent.to(device).double()).sum()
        if case.last_state:
            loss = loss + (state.double() * torch.randn(state.shape, generator=generator).to(device).double()).sum()
        loss.backward()
    found = {"y": y, "last_state": state} | {f"grad {name}": leaf.grad for name, leaf in leaves.items()}
    return {name: value.detach().double().cpu() for name, value in found.items()}


def tolerance_of(case: Case, dtype: torch.dtype) -> float:
    return TOLERANCE[dtype if case.out == torch.float32 else torch.bfloat16]


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    arguments = inputs(case, dtype)
    expected = run(case, arguments, torch.float64, "reference", "cpu")
    found = run(case, arguments, dtype, "triton", device)
    tolerance = tolerance_of(case, dtype)
    errors = {
        # A gradient that is zero but for rounding (A of a single step) is compared with a unit scale.
        name: ((found[name] - value).norm() / value.norm().clamp_min(1e-3)).item()
        for name, value in expected.items()
    }
    wrong = {name: error for name, error in errors.items() if not error < tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


@pytest.mark.interpret
@pytest.mark.parametrize("name", SMALL)
def test_interpreted_fp32(name: str, poisoned_memory: None) -> None:
    check(SMALL[name], torch.float32, "cpu")


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["cross", "N=16", "full-rank steps", "16-bit output", "gate, 16-bit output, N=2"])
def test_interpreted_fp16(name: str, poisoned_memory: None) -> None:
    check(SMALL[name], torch.float16, "cpu")


@pytest.mark.interpret
def test_views_of_one_projection_are_not_copied() -> None:
    """dt, B and C as slices of one projection, non-contiguous, give what separate tensors give."""
    arguments = {name: value.float() for name, value in inputs(SMALL["cross"], torch.float32).items()}
    packed = torch.cat([arguments["dt"], arguments["B"], arguments["C"]], dim=-1)
    views = dict(zip(("dt", "B", "C"), packed.split([2, 1, 1], dim=-1), strict=True))
    with ops.use_backend("triton"):
        separate = ops.selective_scan(**arguments, routes=CROSS)
        together = ops.selective_scan(**(arguments | views), routes=CROSS)
        transposed = arguments["x"].transpose(1, 2).contiguous().transpose(1, 2)
        strided = ops.selective_scan(**(arguments | {"x": transposed}), routes=CROSS)
        # Equal strides and adjacent offsets, but the numbers of a row are not adjacent.
        B, C, _ = torch.stack([arguments["B"], arguments["C"], arguments["B"]], dim=-1).unbind(-1)
        apart = ops.selective_scan(**(arguments | {"B": B, "C": C}), routes=CROSS)
        gated = ops.selective_scan(**arguments, z=arguments["x"], addend=arguments["x"], routes=CROSS)
        gated_strided = ops.selective_scan(**arguments, z=transposed, addend=transposed, routes=CROSS)
    assert torch.equal(separate, together)
    assert torch.equal(separate, apart)
    assert torch.equal(separate, strided)
    assert torch.equal(gated, gated_strided)


@pytest.mark.interpret
def test_a_gate_that_is_not_trained() -> None:
    """Then nothing is kept for it, and the other gradients are as ever."""
    case = Case((1, 3, 5, 6), ("row",), state=2, gate=True, addend=True)
    arguments = {name: value.float() for name, value in inputs(case, torch.float32).items()}
    leaves = [arguments[name].requires_grad_() for name in ("x", "addend")]
    grads = []
    with ops.use_backend("triton"):
        for trained in (False, True):
            y = ops.selective_scan(**(arguments | {"z": arguments["z"].requires_grad_(trained)}))
            grads.append(torch.autograd.grad(y.sum(), leaves))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.interpret
def test_backward_in_torch_from_what_triton_saved() -> None:
    """Forward and backward may run in different implementations: both save the same states and sum."""
    case = SMALL["cross several chunks"]._replace(gate=True)
    arguments = {name: value.float() for name, value in inputs(case, torch.float32).items()}
    leaves = [arguments[name].requires_grad_() for name in ("x", "z")]
    grads = []
    for first, second in (("triton", "torch"), ("torch", "triton")):
        with ops.use_backend(first):
            y = ops.selective_scan(**arguments, routes=case.routes)
        with ops.use_backend(second):
            grads.append(torch.autograd.grad(y, leaves, torch.ones_like(y)))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)  # rounding of two orders of summation


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize(
    ("shape", "rank", "bits"),
    [
        ((33, 256, 256, 256), 8, 64),  # rows of gradients, each padded to 16 entries, for 16 channel blocks
        ((33, 256, 256, 256), 6, 32),
        ((1, 1024, 1024, 768), None, 64),  # full-rank steps of four routes
    ],
)
def test_offsets_are_wide_where_buffers_are_large(
    shape: tuple[int, int, int, int], rank: int | None, bits: int
) -> None:
    """Without memory: the plan of meta tensors."""
    from subquad.ops.selective_scan import _triton_plan, prepare

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device="meta")

    lead, dim = shape[:3], shape[-1]
    call = prepare(
        empty(*shape), empty(*lead, 4, rank or dim), empty(4, dim, 1).float(), empty(*lead, 4, 1), empty(*lead, 4, 1),
        dt_weight=empty(4, dim, rank).float() if rank else None, routes=CROSS,
    )  # fmt: skip
    found = _triton_plan.kernel_inputs(call)
    config = _triton_plan.default_config("backward", call)
    plan = _triton_plan.plan_for("backward", call, found, config, on_new=lambda: None)
    assert plan.meta["INDEX"].primitive_bitwidth == bits


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
    case = LARGE[name]
    arguments = inputs(case, dtype)
    expected = run(case, arguments, torch.float64, "torch", "cuda")
    found = run(case, arguments, dtype, "triton", "cuda")
    for key, value in expected.items():
        error = ((found[key] - value).norm() / value.norm().clamp_min(1e-3)).item()
        assert error < tolerance_of(case, dtype), f"{key}: {error}"


@pytest.mark.gpu
def test_gpu_forward_is_bitwise_reproducible() -> None:
    arguments = {name: value.cuda() for name, value in inputs(LARGE["56x56"], torch.bfloat16).items()}
    for name in ("x", "dt", "B", "C"):
        arguments[name] = arguments[name].bfloat16()
    first, second = (ops.selective_scan(**arguments, routes=CROSS, out_dtype=torch.float32) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.gpu
def test_gpu_kernels_of_aligned_tensors_are_not_taken_for_others() -> None:
    """Compiled kernels are kept by shape class; where a tensor starts is part of it."""
    arguments = {name: value.cuda() for name, value in inputs(SMALL["cross several chunks"], torch.float32).items()}
    expected = ops.selective_scan(**arguments, routes=CROSS)
    arguments = {name: value.float() for name, value in arguments.items()}
    aligned = ops.selective_scan(**arguments, routes=CROSS)
    for name, value in arguments.items():
        arguments[name] = torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape)
    shifted = ops.selective_scan(**arguments, routes=CROSS)
    torch.testing.assert_close(aligned.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(aligned, shifted)


@pytest.mark.gpu
def test_gpu_graph_capture_of_a_first_call() -> None:
    """Nothing that a capture fills is kept for later calls."""
    arguments = {name: value.float().cuda() for name, value in inputs(SMALL["cross"], torch.float32).items()}
    with torch.no_grad():
        expected = ops.selective_scan(**arguments, routes=CROSS)  # compiles the kernels
        wide = {
            name: value.repeat(2, *[1] * (value.dim() - 1)) if name in ("x", "dt", "B", "C") else value
            for name, value in arguments.items()
        }
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ops.selective_scan(**arguments, routes=CROSS)
        graph.replay()
        torch.testing.assert_close(captured, expected, rtol=0, atol=0)
        assert torch.equal(ops.selective_scan(**wide, routes=CROSS)[:2], expected)


@pytest.mark.gpu
def test_gpu_reduce_overhead_on_a_first_shape() -> None:
    """Nothing that a call leaves behind lies in the memory pool of a graph."""
    arguments = {name: value.float().cuda() for name, value in inputs(SMALL["cross"], torch.float32).items()}
    arguments["x"] = arguments["x"][:, :, :3].contiguous()
    for name in ("dt", "B", "C"):
        arguments[name] = arguments[name][:, :, :3].contiguous()

    def scan(x: Tensor) -> Tensor:
        return ops.selective_scan(**(arguments | {"x": x}), routes=CROSS)

    compiled = torch.compile(scan, mode="reduce-overhead")
    with torch.no_grad():
        found = [compiled(arguments["x"]).clone() for _ in range(3)]
        expected = scan(arguments["x"])
    for value in found:
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_gpu_dispatch_takes_triton() -> None:
    arguments = {name: value.float().cuda() for name, value in inputs(SMALL["cross"], torch.float32).items()}
    assert ops.explain(ops.selective_scan, **arguments, routes=CROSS).chosen == "triton"

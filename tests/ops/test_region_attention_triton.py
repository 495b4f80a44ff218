"""The Triton kernels of region attention against the float64 reference: values and every gradient.

The same cases run in Triton's interpreter on the CPU (``interpret``: fp32 and fp16, small shapes) and on a GPU
(``gpu``: bf16 too, and shapes with many programs).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from subquad import ops
from subquad.ops import region_attention
from subquad.ops.region_attention import prepare

# Relative L2 error per dtype: rounding of operands of the products (fp32: of what three tf32 products leave) and of
# results. Weights' gradients are sums of products of two rounded numbers that partly cancel.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


class Case(NamedTuple):
    """(B, H, W, heads, D) of the queries, and what differs from keys of the same size and one choice for all heads."""

    shape: tuple[int, int, int, int, int]
    size: tuple[int, int]
    topk: int
    keys: tuple[int, int] | None = None
    kv_size: tuple[int, int] | None = None
    values: int | None = None
    per_head: bool = False
    weights: bool = False
    pad: bool = False
    hide: bool = False
    scale: float | None = None


SMALL = {
    "regions of 4": Case((2, 8, 6, 2, 8), (2, 2), 5),
    "regions of 1": Case((1, 4, 3, 2, 16), (1, 1), 7),
    "regions of 20": Case((1, 10, 8, 1, 8), (5, 4), 2),
    "ragged": Case((2, 7, 10, 2, 8), (3, 4), 3),
    "a choice a head": Case((1, 7, 10, 3, 8), (3, 4), 3, per_head=True, values=12),
    "pooled keys": Case((1, 8, 8, 2, 8), (4, 4), 1, (4, 6), (2, 2)),
    "padding of its own": Case((1, 7, 10, 2, 8), (3, 4), 3, pad=True),
    "weights": Case((2, 7, 10, 2, 8), (3, 4), 3, weights=True, pad=True),
    "weights a head": Case((1, 7, 10, 2, 8), (3, 4), 3, weights=True, per_head=True),
    "hidden padding": Case((1, 7, 10, 2, 8), (3, 4), 3, hide=True, weights=True),
    "padding of its own, none there": Case((1, 6, 8, 1, 8), (3, 4), 2, pad=True),
    "several tiles": Case((1, 18, 20, 1, 8), (9, 10), 2, weights=True),
    "several tiles, ragged": Case((1, 17, 15, 1, 8), (9, 8), 3, (12, 22), (11, 13), pad=True),
    "one row, odd channels": Case((1, 1, 11, 2, 5), (1, 3), 3),
    "one pixel": Case((1, 1, 1, 1, 1), (2, 2), 1),
    "scale": Case((1, 4, 4, 1, 8), (2, 2), 2, scale=0.0),
}
LARGE = {
    "biformer stage 1": Case((3, 56, 56, 2, 32), (8, 8), 1),
    "biformer stage 2": Case((3, 28, 28, 4, 32), (4, 4), 4),
    "biformer stage 3": Case((3, 14, 14, 8, 32), (2, 2), 16),
    "soft routing": Case((2, 28, 28, 4, 32), (4, 4), 4, weights=True),
    "detection, stage 1": Case((1, 208, 336, 2, 32), (13, 21), 1),
    "detection, stage 3": Case((1, 64, 96, 8, 32), (4, 6), 16),
    "ragged": Case((2, 61, 45, 4, 32), (9, 7), 4),
    "ragged, padding of its own, weights": Case((2, 61, 45, 4, 32), (9, 7), 4, pad=True, weights=True),
    "a choice a head, hidden padding": Case((2, 61, 45, 4, 32), (9, 7), 4, per_head=True, hide=True),
    "64 channels": Case((2, 28, 28, 2, 64), (4, 4), 6),
    "64 channels, large regions": Case((2, 40, 48, 2, 64), (8, 12), 3),
    "128 channels": Case((2, 28, 28, 2, 128), (4, 7), 3, weights=True),
    "128 channels, large regions": Case((2, 40, 48, 2, 128), (8, 12), 3),
    "odd channels": Case((2, 28, 21, 2, 40), (4, 7), 3, values=24),
}


def inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random arguments, exactly representable in ``dtype`` where they are activations; regions may repeat."""
    generator = torch.Generator().manual_seed(0)
    (batch, height, width, heads, dim), values = case.shape, case.values or case.shape[-1]
    (high, wide), (tall, broad) = case.keys or (height, width), case.kv_size or case.size
    shapes: dict[str, tuple[int, ...]] = {
        "q": case.shape,
        "k": (batch, high, wide, heads, dim),
        "v": (batch, high, wide, heads, values),
    }
    if case.pad:
        shapes |= {"pad_k": (heads, dim), "pad_v": (heads, values)}
    result = {name: torch.randn(shape, generator=generator).to(dtype).double() for name, shape in shapes.items()}
    choice = (batch, heads if case.per_head else 1, -(-height // case.size[0]) * -(-width // case.size[1]), case.topk)
    result["regions"] = torch.randint(-(-high // tall) * -(-wide // broad), choice, generator=generator)
    if case.weights:
        result["weights"] = torch.randn(choice, generator=generator).double()
    return result


def options(case: Case) -> dict[str, Any]:
    return {
        "region_size": case.size,
        "kv_region_size": case.kv_size,
        "hide_padding": case.hide,
        "scale": case.scale,
    }


def run(case: Case, arguments: dict[str, Tensor], dtype: torch.dtype, backend: str, device: str) -> dict[str, Tensor]:
    """Output and all gradients, in float64 on the CPU."""
    leaves = {}
    for name, value in arguments.items():
        if name != "regions":
            narrow = dtype if name != "weights" or dtype == torch.float64 else torch.float32
            leaves[name] = value.to(device, narrow, copy=True).requires_grad_()
    with ops.use_backend(backend):
        o = region_attention(**leaves, regions=arguments["regions"].to(device), **options(case))
        cotangent = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).half()
        o.backward(cotangent.to(device, o.dtype))
    found = {"o": o} | {f"grad {name}": leaf.grad for name, leaf in leaves.items()}
    return {name: value.detach().double().cpu() for name, value in found.items()}


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    arguments = inputs(case, dtype)
    expected = run(case, arguments, torch.float64, "torch" if device == "cuda" else "reference", "cpu")
    found = run(case, arguments, dtype, "triton", device)
    errors = {
        # A gradient that is zero but for rounding (q and k of a single key) is compared with a unit scale.
        name: ((found[name] - value).norm() / value.norm().clamp_min(1e-3 * value.numel() ** 0.5)).item()
        for name, value in expected.items()
    }
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE[dtype]}
    assert not wrong, f"relative errors above {TOLERANCE[dtype]}: {wrong}"


@pytest.mark.interpret
@pytest.mark.parametrize("name", SMALL)
def test_interpreted_fp32(name: str, poisoned_memory: None) -> None:
    check(SMALL[name], torch.float32, "cpu")


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["ragged", "weights", "pooled keys"])
def test_interpreted_fp16(name: str, poisoned_memory: None) -> None:
    check(SMALL[name], torch.float16, "cpu")


@pytest.mark.interpret
def test_strides_do_not_matter(poisoned_memory: None) -> None:
    """Views of one projection run as they are, any other layout as a copy."""
    case = SMALL["weights"]
    arguments = {
        name: value.float() if value.is_floating_point() else value
        for name, value in inputs(case, torch.float32).items()
    }
    strided = dict(arguments)
    strided["q"], strided["k"] = torch.stack([arguments["q"], arguments["k"]], dim=3).unbind(3)
    strided["v"] = arguments["v"].permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    strided["regions"] = arguments["regions"].int().mT.contiguous().mT
    strided["weights"] = arguments["weights"].mT.contiguous().mT
    with ops.use_backend("triton"):
        mine, expected = (region_attention(**x, **options(case)) for x in (strided, arguments))
    assert torch.equal(mine, expected)


@pytest.mark.interpret
def test_regions_that_nobody_looks_at_have_no_gradient(poisoned_memory: None) -> None:
    case = SMALL["regions of 4"]
    arguments = inputs(case, torch.float32)
    arguments["regions"] = torch.zeros_like(arguments["regions"])
    found = run(case, arguments, torch.float32, "triton", "cpu")
    for name in ("grad k", "grad v"):
        assert found[name][:, :2, :2].any()
        found[name][:, :2, :2] = 0
        assert not found[name].any()


def test_what_the_kernels_do_not_serve_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subquad.ops._triton.why_not", lambda x: None)
    case = SMALL["regions of 4"]
    arguments = {
        name: value.float() if value.is_floating_point() else value
        for name, value in inputs(case, torch.float32).items()
    }
    maps = {name: arguments[name] for name in ("q", "k", "v")}
    plain = options(case) | arguments
    many = torch.zeros(2, 1, 12, 90000, dtype=torch.int64)
    for changed, reason in (
        ({name: value.repeat(1, 1, 1, 1, 17) for name, value in maps.items()}, "heads of 136 channels"),
        ({name: value.double() for name, value in maps.items()}, "float64"),
        ({name: arguments[name][:0] for name in ("q", "k", "v", "regions")}, "empty batch"),
        ({"regions": many}, "1080000 chosen regions"),
        ({"regions": many[..., :80000], "kv_region_size": 60}, "lists of up to 3456000000 tokens"),
        ({"region_size": 1024, "kv_region_size": None, "regions": many[:, :, :1, :1]}, "regions of 1048576 tokens"),
    ):
        explanation = ops.explain(region_attention, **(plain | changed))
        assert explanation.chosen == "torch" and reason in explanation.passed_over["triton"]
    assert ops.explain(region_attention, **plain).chosen == "triton"
    assert prepare(**plain).counts == (4, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_small_on_gpu(name: str, dtype: torch.dtype, poisoned_memory: None) -> None:
    check(SMALL[name], dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_large_on_gpu(name: str, dtype: torch.dtype, poisoned_memory: None) -> None:
    if dtype == torch.float32 and LARGE[name].shape[-1] > 64:
        dtype = torch.float16  # float32 of wide heads runs in PyTorch
    check(LARGE[name], dtype, "cuda")


@pytest.mark.gpu
def test_results_are_the_same_to_the_bit() -> None:
    case = LARGE["ragged, padding of its own, weights"]
    arguments = inputs(case, torch.bfloat16)
    first, second = (run(case, arguments, torch.bfloat16, "triton", "cuda") for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.gpu
def test_graphs_capture_both_passes() -> None:
    """Another choice in the same memory, replayed: nothing of the first one was kept on the host."""
    case = LARGE["biformer stage 2"]
    arguments = inputs(case, torch.float16)
    static = {name: value.cuda() for name, value in arguments.items()}
    leaves = {name: static[name].half().requires_grad_() for name in ("q", "k", "v")}

    def step() -> tuple[Tensor, ...]:
        o = region_attention(**leaves, regions=static["regions"], **options(case))
        return o, *torch.autograd.grad(o, list(leaves.values()), torch.ones_like(o))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    static["regions"].copy_(static["regions"].flip(2))
    graph.replay()
    assert all(torch.equal(mine, expected) for mine, expected in zip(captured, step(), strict=True))

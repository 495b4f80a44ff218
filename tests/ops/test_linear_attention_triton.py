"""The Triton kernels of linear attention against the float64 reference: values and every gradient.

The same cases run in Triton's interpreter on the CPU (``interpret``: fp32 and fp16, small shapes) and on a GPU
(``gpu``: bf16 too, and the models' shapes). What the interpreter cannot see (races, registers, layouts) needs the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from subquad import ops
from subquad.ops import linear_attention
from subquad.ops.linear_attention import NORMALIZERS, prepare

# Relative L2 error per dtype. fp32: rounding of sums. 16 bit: one rounding of features, of a state in products and of
# results (1.7e-3 in bfloat16); 2.5 times that where a mean is subtracted.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
# Tensor cores cut sums off where others round: a bias of up to 2^-24 a step, and S G may cancel against dz kbar.
TOLERANCE_GPU = TOLERANCE | {torch.float32: 1e-4}

Arguments = dict[str, Any]


class Case(NamedTuple):
    """Images, queries, keys, heads, features, values; ``rotary`` is "shared" or "heads", ``content`` gives features."""

    shape: tuple[int, int, int, int, int, int]
    normalizer: str = "divide"
    feature_map: str = "elu1"
    rotary: str | None = None
    content: bool = False
    eps: float = 1e-6


SMALL = {
    **{f"{name}": Case((2, 37, 37, 2, 8, 5), name) for name in NORMALIZERS},
    **{f"{name}, split": Case((2, 70, 70, 1, 12, 16), name, rotary="shared") for name in NORMALIZERS},
    **{f"{name}, queries": Case((1, 70, 150, 2, 8, 6), name, "relu") for name in NORMALIZERS},
    "weighted, content": Case((2, 21, 37, 2, 8, 8), "softmax_weighted", "identity", content=True),
    "magnitude, content": Case((2, 21, 37, 2, 8, 8), "magnitude", "identity", content=True),
    "none, content": Case((1, 37, 37, 2, 8, 8), "none", content=True),
    "rotary by head": Case((2, 33, 33, 3, 16, 16), rotary="heads"),
    "fewer values": Case((1, 20, 20, 1, 48, 20)),
    "no eps": Case((1, 5, 5, 1, 8, 8), eps=0.0),
    "clamp, some": Case((2, 37, 37, 2, 8, 8), "clamp", eps=1.1),
}
LARGE = {
    "MLLA stage 1": Case((4, 3136, 3136, 2, 32, 32), rotary="heads"),
    "MLLA stage 3": Case((16, 196, 196, 8, 32, 32), rotary="heads"),
    "MLLA stage 4": Case((9, 49, 49, 16, 32, 32), rotary="heads"),
    "RAVLT": Case((3, 3136, 3136, 1, 64, 64), "softmax_weighted", rotary="shared"),
    "RAVLT-B": Case((40, 784, 784, 2, 96, 96), "softmax_weighted", rotary="shared"),
    "MAViT": Case((3, 3136, 3136, 1, 64, 64), "magnitude", rotary="shared"),
    "MAViT-B": Case((300, 196, 196, 1, 96, 96), "magnitude", rotary="shared"),
    "NaLaFormer": Case((3, 3136, 3136, 1, 128, 64), feature_map="identity", rotary="shared"),
    "InLine": Case((3, 784, 784, 6, 32, 32), "subtract", "identity"),
    "PVT": Case((2, 3136, 49, 2, 64, 64), feature_map="relu"),
    "head of 8": Case((3, 1000, 1000, 3, 8, 8)),
    "detection map": Case((1, 67200, 67200, 2, 32, 32), rotary="shared"),
}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(case: Case, dtype: torch.dtype) -> Arguments:
    """Random arguments in float64, exactly representable in ``dtype``; the values have a mean."""
    batch, queries, keys, heads, dim, values = case.shape
    q, k = normal(1, batch, queries, heads, dim), normal(2, batch, keys, heads, dim)
    if case.feature_map == "identity" and case.normalizer not in ("subtract", "none"):
        q, k = q.abs(), k.abs()
    arguments: Arguments = {"q": q, "k": k, "v": normal(3, batch, keys, heads, values) + 0.25}
    if case.content:
        arguments |= {"q_content": normal(4, *q.shape), "k_content": normal(5, *k.shape)}
    arguments = {name: value.to(dtype).double() for name, value in arguments.items()}
    if case.rotary:
        angle = normal(6, keys, heads if case.rotary == "heads" else 1, dim // 2).float()
        arguments["rotary"] = (angle.cos(), angle.sin())
    scale = 1.0 if case.normalizer == "divide" else dim**-0.5
    return arguments | {
        "normalizer": case.normalizer,
        "feature_map": case.feature_map,
        "scale": scale,
        "eps": case.eps,
    }


def place(arguments: Arguments, dtype: torch.dtype, device: str) -> Arguments:
    """Tensors as leaves in ``dtype``; tables stay in float32."""
    moved: Arguments = {
        name: value.to(device, dtype, copy=True).requires_grad_() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    if "rotary" in moved:
        moved["rotary"] = tuple(table.to(device) for table in moved["rotary"])
    return moved


def run(arguments: Arguments, dtype: torch.dtype, backend: str, device: str) -> dict[str, Tensor]:
    """The output and every gradient, in float64; cotangents depend on shapes only."""
    moved = place(arguments, dtype, device)
    leaves = {name: value for name, value in moved.items() if isinstance(value, Tensor)}
    with ops.use_backend(backend):
        o = linear_attention(**moved)
        cotangent = normal(7, *o.shape).bfloat16().to(o)  # exact in every dtype
        # q and k themselves have no part in ``none`` with content features
        grads = torch.autograd.grad(o, tuple(leaves.values()), cotangent, materialize_grads=True)
    return {"o": o.detach().double(), **{name: grad.double() for name, grad in zip(leaves, grads, strict=True)}}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    errors = {
        name: ((found[name].to(value.device) - value).norm() / value.norm().clamp_min(1e-3)).item()
        for name, value in expected.items()
    }
    wrong = {name: error for name, error in errors.items() if not error < tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    arguments = inputs(case, dtype)
    expected = run(arguments, torch.float64, "reference", "cpu")
    compare(run(arguments, dtype, "triton", device), expected, (TOLERANCE if device == "cpu" else TOLERANCE_GPU)[dtype])


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are split from 17 on, into tiles of 32 and less."""
    pytest.importorskip("triton")
    from subquad.ops import _triton
    from subquad.ops.linear_attention import _triton_plan

    monkeypatch.setattr(_triton_plan, "_FEW_TOKENS", 16)
    monkeypatch.setattr(_triton_plan, "_plans", _triton.Plans())
    default = _triton_plan.default_config
    monkeypatch.setattr(_triton_plan, "default_config", lambda *args: default(*args)._replace(tokens=32))


@pytest.mark.interpret
@pytest.mark.parametrize("name", SMALL)
def test_interpreted_fp32(name: str, poisoned_memory: None) -> None:
    check(SMALL[name], torch.float32, "cpu")


@pytest.mark.interpret
@pytest.mark.parametrize("name", [name for name in SMALL if "split" in name or "queries" in name or "some" in name])
def test_interpreted_fp32_in_splits(name: str, short_splits: None, poisoned_memory: None) -> None:
    check(SMALL[name], torch.float32, "cpu")


@pytest.mark.interpret
@pytest.mark.parametrize("name", [*NORMALIZERS, "divide, split", "magnitude, content"])
def test_interpreted_fp16(name: str, short_splits: None, poisoned_memory: None) -> None:
    check(SMALL[name], torch.float16, "cpu")


@pytest.mark.interpret
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_one_token(normalizer: str) -> None:
    """Gradients of q and k vanish but for rounding, of terms of size 1."""
    arguments = inputs(Case((2, 1, 1, 2, 8, 5), normalizer), torch.float32)
    found, expected = run(arguments, torch.float32, "triton", "cpu"), run(arguments, torch.float64, "reference", "cpu")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.interpret
def test_views_of_one_projection() -> None:
    """q and k as slices of one tensor, a transposed v, and a gradient that is expanded."""
    arguments = inputs(SMALL["rotary by head"], torch.float32)
    plain = place(arguments, torch.float32, "cpu")
    q, k = torch.stack([plain["q"], plain["k"]], dim=2).unbind(2)
    v = plain["v"].transpose(1, 2).contiguous().transpose(1, 2)
    with ops.use_backend("triton"):
        expected = linear_attention(**plain)
        found = linear_attention(**(plain | {"q": q, "k": k, "v": v}))
        found.sum().backward()
    assert torch.equal(found, expected)
    with ops.use_backend("reference"):
        again = place(arguments, torch.float32, "cpu")
        linear_attention(**again).sum().backward()
    for name in ("q", "k", "v"):
        torch.testing.assert_close(plain[name].grad, again[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.interpret
def test_channels_that_are_not_adjacent() -> None:
    arguments = place(inputs(SMALL["divide"], torch.float32), torch.float32, "cpu")
    with ops.use_backend("triton"):
        expected = linear_attention(**arguments)
        strided = {name: torch.stack([arguments[name]] * 2, dim=-1)[..., 0] for name in ("q", "k", "v")}
        assert torch.equal(linear_attention(**(arguments | strided)), expected)


@pytest.mark.interpret
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_either_implementation_continues_from_the_other(normalizer: str) -> None:
    """Forward and backward may run in different implementations: both save the same statistics."""
    arguments = inputs(SMALL[f"{normalizer}, queries"], torch.float32)
    grads = []
    for first, second in (("triton", "torch"), ("torch", "triton")):
        leaves = place(arguments, torch.float32, "cpu")
        with ops.use_backend(first):
            o = linear_attention(**leaves)
        with ops.use_backend(second):
            grads.append(torch.autograd.grad(o, [leaves[name] for name in "qkv"], torch.ones_like(o)))
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)  # rounding of two orders of summation


@pytest.mark.interpret
def test_features_of_zero_stay_finite() -> None:
    """No padding token divides 0 by 0, and 0 / eps is 0."""
    arguments = inputs(Case((1, 37, 37, 1, 8, 8), feature_map="relu"), torch.float16)
    arguments["q"] = -arguments["q"].abs()
    found = run(arguments, torch.float16, "triton", "cpu")
    assert not found["o"].any()
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((0, 4, 4, 1, 8, 8), torch.float32, "empty batch"),
        ((1, 4, 4, 1, 8, 8), torch.float64, "float64 runs in PyTorch"),
        ((1, 4, 4, 1, 8, 130), torch.float32, "heads of 8 features and 130 values"),
        ((1, 4, 4, 1, 192, 96), torch.float16, "heads of 192 features and 96 values"),
    ],
)
def test_what_the_kernels_decline(shape: tuple[int, ...], dtype: torch.dtype, reason: str) -> None:
    arguments = inputs(Case(shape), dtype)  # type: ignore[arg-type]
    arguments = {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    explanation = ops.explain(linear_attention, **arguments)
    assert explanation.chosen == "torch"
    assert explanation.passed_over["triton"].startswith(reason)


def _plan_of(shape: tuple[int, ...]) -> Any:
    from subquad.ops.linear_attention import _triton_plan

    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for _ in range(3))
    call = prepare(q, k, v, feature_map="elu1")
    return _triton_plan.plan_for("forward", call, _triton_plan.default_config("forward", call))


def test_splits_cover_all_tokens() -> None:
    """Every token is in exactly one split, whatever the size."""
    pytest.importorskip("triton")
    for tokens in (1, 49, 256, 257, 1000, 3136, 67200):
        for heads in (1, 3, 500):
            plan = _plan_of((1, tokens, heads, 32))
            _, _, _, splits, query_chunk, key_chunk = plan.sizes
            assert plan.programs == splits * heads
            assert (splits - 1) * key_chunk < tokens <= splits * key_chunk
            assert query_chunk == key_chunk
            assert key_chunk % plan.meta["BN"] == 0


# On a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_gpu_small(name: str, dtype: torch.dtype, poisoned_memory: None) -> None:
    check(SMALL[name], dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", [f"{name}, queries" for name in NORMALIZERS])
def test_gpu_in_splits(name: str, short_splits: None, poisoned_memory: None) -> None:
    check(SMALL[name], torch.bfloat16, "cuda")


def check_large(case: Case, dtype: torch.dtype) -> None:
    """Against the PyTorch path in float64 on the GPU, which is tested against the reference on the CPU."""
    arguments = inputs(case, dtype)
    expected = run(arguments, torch.float64, "torch", "cuda")
    compare(run(arguments, dtype, "triton", "cuda"), expected, TOLERANCE_GPU[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_gpu_large(name: str, dtype: torch.dtype, poisoned_memory: None) -> None:
    check_large(LARGE[name], dtype)


@pytest.mark.gpu
def test_gpu_doubled_features_of_large_heads(poisoned_memory: None) -> None:
    check_large(Case((3, 784, 784, 2, 192, 96), feature_map="identity", rotary="shared"), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["MLLA stage 1", "RAVLT", "MLLA stage 3"])
def test_gpu_results_are_reproducible_to_the_bit(name: str) -> None:
    arguments = inputs(LARGE[name], torch.bfloat16)
    first, second = (run(arguments, torch.bfloat16, "triton", "cuda") for _ in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.gpu
def test_gpu_kernels_of_aligned_tensors_are_not_taken_for_others() -> None:
    """Compiled kernels are kept by shape class; where a tensor starts is part of it."""
    arguments = place(inputs(SMALL["divide"], torch.float32), torch.float32, "cuda")
    with torch.no_grad():
        aligned = linear_attention(**arguments)
        for name in ("q", "k", "v"):
            value = arguments[name]
            arguments[name] = torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape)
        torch.testing.assert_close(linear_attention(**arguments), aligned, rtol=0, atol=0)


@pytest.mark.gpu
def test_gpu_graph_capture() -> None:
    arguments = place(inputs(LARGE["MLLA stage 1"], torch.bfloat16), torch.bfloat16, "cuda")
    with torch.no_grad():
        expected = linear_attention(**arguments)  # compiles the kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = linear_attention(**arguments)
        graph.replay()
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_gpu_compiled_by_inductor() -> None:
    arguments = place(inputs(LARGE["MLLA stage 3"], torch.float32), torch.float32, "cuda")
    compiled: Callable[..., Tensor] = torch.compile(linear_attention, fullgraph=True)
    torch.testing.assert_close(compiled(**arguments), linear_attention(**arguments), rtol=0, atol=0)


@pytest.mark.gpu
def test_gpu_dispatch_takes_triton() -> None:
    arguments = place(inputs(SMALL["divide"], torch.float32), torch.float32, "cuda")
    assert ops.explain(linear_attention, **arguments).chosen == "triton"

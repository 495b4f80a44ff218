"""Gated linear attention: the PyTorch path against the reference, and what the operator promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from subquad import ops
from subquad.ops import gated_linear_attention
from subquad.ops.gated_linear_attention import prepare, reference, torch_impl
from subquad.ops.gated_linear_attention.export_form import export_form

Arguments = dict[str, Tensor]
OPERATOR = torch.ops.subquad.gated_linear_attention
NAMES = ("q", "k", "v", "gates")

# batch, length, heads, d_k, d_v
SIZES = [
    (1, 1, 1, 16, 32),
    (2, 2, 1, 3, 5),
    (2, 15, 3, 16, 32),
    (1, 16, 2, 32, 64),
    (3, 49, 2, 5, 7),
    (1, 130, 1, 64, 32),
    (1, 33, 1, 128, 128),
]
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))

HALF_ERROR = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Relative L2 error of a result rounded to 16 bits; twice that on gradients."""


def _inputs(batch: int, length: int, heads: int, d_k: int, d_v: int, decay: float | None = None) -> Arguments:
    """In float64: gates are logits, or with ``decay`` log decays, half of them about that large and half exactly 0."""
    generator = torch.Generator().manual_seed(length + d_k)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    gates = 3 * normal(batch, length, 2, heads, d_k)
    if decay is not None:
        gates = (gates / 3).clamp(max=0) * decay
    return {
        "q": normal(batch, length, heads, d_k),
        "k": normal(batch, length, heads, d_k),
        "v": normal(batch, length, heads, d_v),
        "gates": gates,
    }


def _to(inputs: Arguments, dtype: torch.dtype) -> Arguments:
    return {name: value.to(dtype) for name, value in inputs.items()}


def _run(inputs: Arguments, backend: str = "torch", **options: Any) -> dict[str, Tensor]:
    """Output and every gradient, for a cotangent that depends on the shape alone."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    with ops.use_backend(backend):
        out = gated_linear_attention(**leaves, **options)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
        grads = torch.autograd.grad(out, tuple(leaves.values()), cotangent)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def _error(value: Tensor, expected: Tensor) -> float:
    """Relative L2 error; absolute where nothing is expected."""
    return float((value.double() - expected.double()).norm() / (expected.double().norm() or 1.0))


def _assert_near(ours: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    for name, value in expected.items():
        assert ours[name].shape == value.shape
        assert (error := _error(ours[name], value)) <= limit, f"{name}: relative L2 error {error:.3g}"


@sizes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_equals_the_reference(size: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = _inputs(*size)
    expected = _run(inputs, "reference", gate_normalizer=16.0)
    # Sums of some hundred terms in another order.
    limit = 1e-13 if dtype == torch.float64 else 2e-6
    _assert_near(_run(_to(inputs, dtype), gate_normalizer=16.0), expected, limit)


@pytest.mark.parametrize("decay", [0.0, 1e-4, 1.0, 20.0, 80.0])
def test_any_decay(decay: float) -> None:
    """In half of the entries no decay at all, in the others of the order of exp(-decay) a step."""
    inputs = _inputs(2, 70, 2, 16, 32, decay=decay)
    expected = _run(inputs, "reference")
    for dtype, limit in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        _assert_near(_run(_to(inputs, dtype)), expected, limit)


def test_every_step_decays_strongly() -> None:
    """Gradients of the gates are of the order of e^-20, and right relative to that."""
    inputs = _inputs(1, 64, 1, 32, 32)
    inputs["gates"] = -20 + 0.1 * inputs["gates"]
    expected = _run(inputs, "reference")
    assert 0 < expected["gates"].abs().max() < 1e-6
    _assert_near(_run(_to(inputs, torch.float32)), expected, 2e-6)


@pytest.mark.parametrize("dtype", HALF_ERROR, ids=str)
@pytest.mark.parametrize("decay", [None, 20.0])
def test_16_bits(dtype: torch.dtype, decay: float | None) -> None:
    inputs = _to(_inputs(2, 67, 2, 32, 64, decay), dtype)
    options: dict[str, Any] = {"gate_normalizer": 16.0 if decay is None else None}
    expected = _run(_to(inputs, torch.float64), "reference", **options)
    ours = _run(inputs, **options)
    assert all(value.dtype == dtype for value in ours.values())
    assert _error(ours.pop("out"), expected.pop("out")) <= HALF_ERROR[dtype]
    _assert_near(ours, expected, 2 * HALF_ERROR[dtype])
    wide = _run(inputs | {"gates": inputs["gates"].float()}, out_dtype=torch.float32, **options)
    assert wide["out"].dtype == wide["gates"].dtype == torch.float32 and wide["q"].dtype == dtype


@pytest.mark.parametrize("working_set", [1, 2**14, 2**17])
def test_segments_hand_on_states(working_set: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one chunk of one image at a time to everything at once."""
    inputs = _inputs(3, 149, 2, 5, 7)
    expected = _run(inputs, "reference", gate_normalizer=2.0)
    monkeypatch.setattr(torch_impl, "_WORKING_SET_CPU", working_set)
    _assert_near(_run(inputs, gate_normalizer=2.0), expected, 1e-13)


def test_strided_arguments() -> None:
    """q, k and v as views of one projection, gates of another, as models make them."""
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(2, 21, 2 * 8 + 16, generator=generator, dtype=torch.float64)
    q, k, v = projected.split([8, 8, 16], dim=-1)
    gates = torch.randn(2, 2 * 8, 21, generator=generator, dtype=torch.float64).mT
    views = {name: value.unflatten(-1, (2, -1)) for name, value in (("q", q), ("k", k), ("v", v))}
    views["gates"] = gates.unflatten(-1, (2, 2, 4))
    dense = {name: value.contiguous() for name, value in views.items()}
    before = projected.clone()
    _assert_near(_run(views, gate_normalizer=16.0), _run(dense, "reference", gate_normalizer=16.0), 1e-13)
    assert torch.equal(projected, before)


def test_decays_that_never_act_have_no_gradient() -> None:
    grad = _run(_inputs(2, 21, 2, 4, 6), gate_normalizer=16.0)["gates"]
    assert (grad[:, 0, 0] == 0).all() and (grad[:, -1, 1] == 0).all()
    assert grad[:, 1:, 0].any() and grad[:, :-1, 1].any()


@pytest.mark.parametrize("gate_normalizer", [None, 4.0])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck(backend: str, gate_normalizer: float | None) -> None:
    decay = 1.0 if gate_normalizer is None else None
    inputs = [value.requires_grad_() for value in _inputs(2, 19, 1, 2, 3, decay).values()]

    def function(*tensors: Tensor) -> Tensor:
        return gated_linear_attention(*tensors, gate_normalizer=gate_normalizer, scale=0.7)

    with ops.use_backend(backend):
        assert torch.autograd.gradcheck(function, inputs)


def test_empty_batch() -> None:
    results = _run(_inputs(0, 5, 2, 4, 6))
    assert results["out"].shape == (0, 5, 2, 6) and results["gates"].shape == (0, 5, 2, 2, 4)


class _LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that anything inside returns."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        self.elements = max([self.elements, *(value.untyped_storage().nbytes() // 4 for value in tensors)])
        return result


def test_100000_tokens_need_no_tensor_beyond_the_arguments_sizes() -> None:
    """Least of all the states of all chunks, which would be twice as large."""
    batch, length, heads, d_k, d_v = 1, 100_000, 1, 32, 64
    inputs = _to(_inputs(batch, length, heads, d_k, d_v), torch.float32)
    call = prepare(**inputs, gate_normalizer=16.0)
    with _LargestTensor() as largest:
        out = torch_impl.forward(call)
        grads = torch_impl.backward(call, torch.ones_like(out))
    assert all(value.isfinite().all() for value in (out, *grads))
    assert largest.elements <= max(value.numel() for value in inputs.values()) < length // 16 * d_k * d_v


def test_100003_tokens_equal_the_reference() -> None:
    inputs = _inputs(1, 100_003, 1, 2, 3)
    with ops.use_backend("reference"), torch.no_grad():
        expected = gated_linear_attention(**inputs, gate_normalizer=16.0)
    # Errors do not add up over the sequence: the limits are those of short ones.
    assert _error(gated_linear_attention(**inputs, gate_normalizer=16.0), expected) <= 1e-13
    assert _error(gated_linear_attention(**_to(inputs, torch.float32), gate_normalizer=16.0), expected) <= 2e-6


# The operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate_normalizer", [None, 16.0])
def test_opcheck(dtype: torch.dtype, gate_normalizer: float | None) -> None:
    call = prepare(**_to(_inputs(2, 5, 2, 3, 4, 1.0), dtype), gate_normalizer=gate_normalizer)
    differentiable = [value.requires_grad_() for value in call[:4]]
    torch.library.opcheck(OPERATOR.default, (*differentiable, *call[4:]))
    grad = torch.ones(2, 5, 2, 4, dtype=dtype)
    torch.library.opcheck(
        torch.ops.subquad.gated_linear_attention_backward.default, (grad, *(v.detach() for v in call[:4]), *call[4:])
    )


def test_flop_counts() -> None:
    inputs = _to(_inputs(2, 21, 3, 4, 6), torch.float32)
    inputs["q"].requires_grad_()
    with FlopCounterMode(display=False) as forward:
        out = gated_linear_attention(**inputs)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    # Two directions; of a state's entry 1 for the decay, 2 for the outer product, 2 for reading it.
    expected = 2 * 21 * 3 * 2 * (4 * 6) * 5
    assert forward.get_total_flops() == expected
    assert backward.get_total_flops() == 3 * expected


def test_meta_tensors_have_shapes_and_gradients() -> None:
    inputs = {n: v.to("meta").requires_grad_() for n, v in _to(_inputs(2, 21, 2, 16, 32), torch.bfloat16).items()}
    out = gated_linear_attention(**inputs, out_dtype=torch.float32)
    assert out.is_meta and out.shape == (2, 21, 2, 32) and out.dtype == torch.float32
    out.sum().backward()
    for value in inputs.values():
        assert value.grad is not None and value.grad.is_meta
        assert value.grad.shape == value.shape and value.grad.dtype == value.dtype


def test_autocast_casts_activations_and_leaves_gates() -> None:
    inputs = _to(_inputs(2, 21, 2, 16, 32), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = gated_linear_attention(**inputs, gate_normalizer=16.0)
    assert out.dtype == torch.bfloat16
    low = {name: value if name == "gates" else value.bfloat16() for name, value in inputs.items()}
    assert torch.equal(out, gated_linear_attention(**low, gate_normalizer=16.0))


def test_compiles_in_one_graph_for_every_length(assert_compiles: Any) -> None:
    def function(tensors: Arguments) -> Tensor:
        return gated_linear_attention(**tensors, gate_normalizer=16.0).sin()

    assert_compiles(function, *(_inputs(2, length, 2, 4, 6) for length in (15, 40, 33)))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 50])
def test_export_form_equals_the_reference(length: int) -> None:
    call = prepare(**_inputs(2, length, 2, 3, 5), gate_normalizer=16.0)
    torch.testing.assert_close(export_form(*call), reference.attend(call), rtol=1e-12, atol=1e-12)
    strong = prepare(**_to(_inputs(2, length, 2, 3, 5, decay=80.0), torch.float32), out_dtype=torch.float64)
    torch.testing.assert_close(export_form(*strong), reference.attend(strong), rtol=1e-5, atol=1e-5)


def test_export_form_of_a_program_takes_other_lengths(assert_exports: Any) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        return gated_linear_attention(q, k, v, gates, gate_normalizer=16.0)

    def tensors(batch: int, length: int) -> tuple[Tensor, ...]:
        return tuple(_to(_inputs(batch, length, 2, 4, 6), torch.float32).values())

    forms = {OPERATOR.default: export_form}
    assert_exports(attend, forms, tensors, (2, 20), (2, 20), (1, 65), (3, 3), tolerance=1e-5)


# What is refused -------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"k": None}, TypeError, "k must be a tensor, got NoneType"),
    "flat q": ({"q": torch.zeros(2, 5, 8)}, ValueError, r"q must be \(B, N, H, d_k\).*\(2, 5, 8\)"),
    "no tokens": ({"q": torch.zeros(2, 0, 2, 4)}, ValueError, r"q must be .*\(2, 0, 2, 4\)"),
    "length of k": (
        {"k": torch.zeros(2, 6, 2, 4)},
        ValueError,
        r"k must have shape .*got \(2, 6, 2, 4\)",
    ),
    "length of v": ({"v": torch.zeros(2, 4, 2, 6)}, ValueError, r"v must have shape .*got \(2, 4, 2, 6\)"),
    "heads of v": ({"v": torch.zeros(2, 5, 3, 6)}, ValueError, r"v must have shape .*got \(2, 5, 3, 6\)"),
    "empty v": ({"v": torch.zeros(2, 5, 2, 0)}, ValueError, r"v must have shape .*got \(2, 5, 2, 0\)"),
    "one direction": ({"gates": torch.zeros(2, 5, 2, 4)}, ValueError, r"gates must have shape \(B, N, 2, H, d_k\)"),
    "integers": ({"q": torch.zeros(2, 5, 2, 4, dtype=torch.int64)}, TypeError, "q must be of dtype .*got int64"),
    "mixed": (
        {"v": torch.zeros(2, 5, 2, 6, dtype=torch.bfloat16)},
        TypeError,
        "v must be of dtype float32, got bfloat16",
    ),
    "narrow gates": ({"gates": torch.zeros(2, 5, 2, 2, 4).half()}, TypeError, "gates must be of dtype float32"),
    "device": ({"k": torch.zeros(2, 5, 2, 4, device="meta")}, ValueError, "k is on meta, expected cpu"),
    "normalizer": ({"gate_normalizer": 0.0}, ValueError, "gate_normalizer must be positive, got 0.0"),
    "infinite normalizer": ({"gate_normalizer": float("inf")}, ValueError, "gate_normalizer must be finite, got inf"),
    "scale": ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    "scale of text": ({"scale": "a"}, TypeError, "scale must be a number, got 'a'"),
    "out_dtype": ({"out_dtype": torch.int32}, TypeError, "out_dtype must be a floating dtype.*int32"),
}


@pytest.mark.parametrize(("given", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(given: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs: dict[str, Any] = dict(_to(_inputs(2, 5, 2, 4, 6), torch.float32))
    with pytest.raises(error, match=message):
        gated_linear_attention(**inputs | given)


def test_explain_says_why_not_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUBQUAD_BACKEND", raising=False)
    explanation = ops.explain(gated_linear_attention, **_inputs(1, 2, 1, 16, 32))
    assert explanation.chosen == "torch" and set(explanation.passed_over) == {"triton"}
    with ops.use_backend("triton"), pytest.raises(ValueError, match="no implementation can serve this call"):
        gated_linear_attention(**_inputs(1, 2, 1, 16, 32))

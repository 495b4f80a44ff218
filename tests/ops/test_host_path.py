"""Calls without the dispatcher: who watches still sees the operators, and what is refused is refused each time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from subquad import ops
from subquad.ops import _library

Case = tuple[Callable[..., Tensor], Callable[[], tuple[Tensor, ...]]]


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return ops.selective_scan(x, dt, -A.abs(), B, C)  # type: ignore[return-value]


def _windows(q: Tensor, table: Tensor) -> Tensor:
    return ops.window_attention_packed(q, 2, 1, table=table)


def _regions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.region_attention(q, k, v, torch.tensor([[[[0], [3], [1], [2]]]]), 2)


MAP = (1, 4, 4, 2, 2)
CASES: dict[str, Case] = {
    "selective_scan": (
        _scan,
        lambda: tuple(_random(*s) for s in ((1, 6, 3), (1, 6, 1, 3), (1, 3, 2)) + ((1, 6, 1, 2),) * 2),
    ),
    "linear_attention": (
        lambda q, k, v: ops.linear_attention(q, k, v, feature_map="elu1"),
        lambda: tuple(_random(1, 5, 2, 4) for _ in range(3)),
    ),
    "gated_linear_attention": (
        lambda q, k, v, gates: ops.gated_linear_attention(q, k, v, gates, gate_normalizer=16.0),
        lambda: (*(_random(1, 5, 2, 4) for _ in range(3)), _random(1, 5, 2, 2, 4)),
    ),
    "depthwise_conv": (
        lambda x, weight: ops.depthwise_conv2d(x, weight, activation="silu"),
        lambda: (_random(1, 4, 5, 3), _random(3, 3, 3)),
    ),
    "layer_norm": (
        lambda x, weight, bias: ops.layer_norm(x, weight, bias),
        lambda: (_random(2, 3, 5), _random(5), _random(5)),
    ),
    "window_attention": (_windows, lambda: (_random(1, 4, 4, 3, 2, 2), _random(9, 2))),
    "region_attention": (_regions, lambda: tuple(_random(*MAP) for _ in range(3))),
    "neighborhood_attention": (
        lambda q, k, v: ops.na2d(q, k, v, 3),  # type: ignore[return-value]
        lambda: tuple(_random(*MAP) for _ in range(3)),
    ),
}
every_op = pytest.mark.parametrize("name", CASES)


class _Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class _Tagged(Tensor):
    pass


def _grads(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y)))


@every_op
def test_nobody_watches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The direct call gives the operator's numbers, and results as free to be changed in place."""
    function, make = CASES[name]
    direct = _grads(function, make())
    results = [function(*(tensor.requires_grad_() for tensor in make())).add_(1)]
    monkeypatch.setattr(_library, "is_traced", lambda tensors: True)
    through = _grads(function, make())
    results.append(function(*(tensor.requires_grad_() for tensor in make())).add_(1))
    assert torch.equal(*results) and results[0]._is_view() == results[1]._is_view()
    for ours, theirs in zip(direct, through, strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


@every_op
def test_plain_calls_leave_the_dispatcher_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other tests would not notice: that there is a direct call at all."""
    function, make = CASES[name]

    def refuse(*args: Any) -> Any:
        raise AssertionError("the operator was called")

    monkeypatch.setattr(_library.Operator, "_below", refuse)
    _grads(function, make())
    for context in (nullcontext(), torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            function(*make())


@every_op
def test_modes_see_both_passes(name: str) -> None:
    function, make = CASES[name]
    with _Dispatched() as dispatched:
        _grads(function, make())
    assert f"subquad::{name}" in dispatched.seen and f"subquad::{name}_backward" in dispatched.seen
    with _Functions() as functions, torch.no_grad():
        function(*make())
    assert any(name in seen for seen in functions.seen)
    with FlopCounterMode(display=False) as forward:
        y = function(*(tensor.requires_grad_() for tensor in make()))
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    counts = [counter.get_flop_counts()["Global"] for counter in (forward, backward)]
    if name == "layer_norm":  # PyTorch counts none for a norm
        return
    assert counts[0][getattr(torch.ops.subquad, name)] > 0
    assert counts[1][getattr(torch.ops.subquad, f"{name}_backward")] > 0


@every_op
def test_profiles_show_the_operator(name: str) -> None:
    function, make = CASES[name]
    with torch.autograd.profiler.profile() as profile:
        _grads(function, make())
    shown = {event.name for event in profile.function_events}
    assert {f"subquad::{name}", f"subquad::{name}_backward"} <= shown


@every_op
def test_fake_and_meta_tensors_and_subclasses(name: str) -> None:
    function, make = CASES[name]
    expected = function(*make())
    with FakeTensorMode() as mode:
        fake = function(*(mode.from_tensor(tensor) for tensor in make()))
    outside = function(*(mode.from_tensor(tensor) for tensor in make())) if name != "region_attention" else fake
    meta = function(*(tensor.to("meta") for tensor in make())) if name != "region_attention" else fake
    for found in (fake, outside, meta):
        assert found.shape == expected.shape and found.stride() == expected.stride()
    tagged = function(*(tensor.as_subclass(_Tagged) for tensor in make()))
    assert isinstance(tagged, _Tagged) and torch.equal(tagged.as_subclass(Tensor), expected)


@every_op
def test_lazily_negated_tensors(name: str) -> None:
    """The imaginary part of a conjugate is its memory with the sign to be changed."""
    function, make = CASES[name]
    tensors = make()
    negated = tuple(torch.complex(torch.zeros_like(tensor), -tensor).conj().imag for tensor in tensors)
    assert all(tensor.is_neg() for tensor in negated)
    assert torch.allclose(function(*negated), function(*tensors), rtol=1e-12, atol=1e-12)


@every_op
def test_compiles_without_a_break_and_traces(name: str) -> None:
    function, make = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(_grads(compiled, make()), _grads(function, make()), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    graph = torch.fx.experimental.proxy_tensor.make_fx(function)(*make()).graph
    assert any(f"subquad.{name}" in str(node.target) for node in graph.nodes)


@every_op
def test_transforms_of_torch_func_are_refused(name: str) -> None:
    """As before: neither a rule for batches nor a gradient of torch.func is registered."""
    function, make = CASES[name]
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda *tensors: function(*tensors).sum())(*make())


@every_op
def test_forward_mode_is_refused(name: str) -> None:
    """PyTorch would take the results for constants."""
    function, make = CASES[name]
    tensors = make()
    with pytest.raises(NotImplementedError, match="no derivative in forward mode"):
        torch.func.jvp(function, tensors, tuple(torch.ones_like(tensor) for tensor in tensors))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(tensor, torch.ones_like(tensor)) for tensor in tensors]
        with pytest.raises(NotImplementedError, match="no derivative in forward mode"):
            function(*duals)
        assert torch.equal(function(*tensors), function(*make()))


@every_op
def test_gradients_have_no_gradient(name: str) -> None:
    function, make = CASES[name]
    leaves = [tensor.requires_grad_() for tensor in make()]
    grad, *_ = torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no gradient"):
        grad.sum().backward()


@every_op
def test_gradients_of_all_inputs_are_right(name: str) -> None:
    function, make = CASES[name]
    assert torch.autograd.gradcheck(function, tuple(tensor.requires_grad_() for tensor in make()))


@every_op
def test_below_autograd_nothing_is_recorded(name: str) -> None:
    """Inside another operator autograd is off though gradients are enabled: a direct call would record."""
    function, make = CASES[name]
    with torch._C._AutoDispatchBelowAutograd():
        assert function(*(tensor.requires_grad_() for tensor in make())).grad_fn is None


@every_op
def test_autocast_is_off_inside_and_on_again(name: str) -> None:
    function, make = CASES[name]
    tensors = tuple(tensor.float() for tensor in make())
    with torch.autocast("cpu", torch.bfloat16):
        direct = function(*tensors)
        assert torch.is_autocast_enabled("cpu")
        with _Dispatched():
            through = function(*tensors)
    assert direct.dtype == through.dtype and torch.equal(direct, through)


def _wrong(message: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return pytest.param(message, function, args, kwargs, id=message)


X, W, Q = _random(1, 4, 5, 3), _random(3, 3, 3), _random(*MAP)
T, GATES = _random(1, 5, 2, 4), _random(1, 5, 2, 2, 4)
SCAN = CASES["selective_scan"][1]()
TABLE = _random(5, 1, 2)
TRAINED = TABLE.clone().requires_grad_()


@pytest.mark.parametrize(
    ("message", "function", "args", "kwargs"),
    [
        _wrong("weight must be", ops.depthwise_conv2d, X, W[:2]),
        _wrong("weight must be of dtype", ops.depthwise_conv2d, X, W.long()),
        _wrong("weight must be a tensor", ops.depthwise_conv2d, X, 3),
        _wrong("window must be", ops.window_attention, Q, Q, Q, 2.0),
        _wrong("window must be a", ops.window_attention, Q, Q, Q, True),
        _wrong("k must be a tensor", ops.window_attention, Q, None, None, 2),
        _wrong("k must be of dtype", ops.window_attention, Q, Q.float(), Q, 2),
        _wrong("kernel_size must be", ops.na2d, Q, Q, Q, 3.0),
        _wrong("is_causal must be", ops.na2d, Q, Q, Q, 3, is_causal=1),
        _wrong("v must have shape", ops.na2d, Q, Q, Q[:, :2], 3),
        _wrong("k must have shape", ops.linear_attention, T, T[:, :, :1], T, feature_map="elu1"),
        _wrong("requires a gradient", ops.linear_attention, T, T, T, rotary=(TABLE, TRAINED)),
        _wrong("gate_normalizer must be", ops.gated_linear_attention, T, T, T, GATES, gate_normalizer=-1.0),
        _wrong("gates must have shape", ops.gated_linear_attention, T, T, T, GATES[:, :3]),
        _wrong("unknown route", ops.selective_scan, *SCAN, routes=("diagonal",)),
        _wrong("A must have shape", ops.selective_scan, *SCAN, routes=("row", "row")),
        _wrong("out_dtype must be", ops.selective_scan, *SCAN, out_dtype=torch.int32),
        _wrong("region_size must be", ops.region_attention, Q, Q, Q, torch.zeros(1, 1, 4, 1).long(), 2.0),
        _wrong("regions must be of dtype", ops.region_attention, Q, Q, Q, torch.zeros(1, 1, 4, 1), 2),
    ],
)
def test_bad_input_raises_each_time(message: str, function: Any, args: Any, kwargs: Any) -> None:
    """Among good calls, whose classes are known and whose arguments may compare equal to bad ones."""
    for name in CASES:
        CASES[name][0](*CASES[name][1]())
    ops.window_attention(Q, Q, Q, 2)
    ops.na2d(Q, Q, Q, 3, is_causal=True)
    ops.linear_attention(T, T, T, feature_map="elu1", rotary=(TABLE, TABLE))
    for _ in range(100):
        with pytest.raises((TypeError, ValueError), match=message):
            function(*args, **kwargs)


def test_a_gradient_that_enters_through_another_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result without one counts as zero, not as missing."""
    q = _random(*MAP).requires_grad_()

    def grads() -> list[Tensor]:
        o, lse = ops.na2d(q, q, q, 3, return_lse=True)
        return [torch.autograd.grad(x.sum(), q, retain_graph=True)[0] for x in (o, lse)]

    direct = grads()
    assert all(grad.abs().sum() > 0 for grad in direct)
    monkeypatch.setattr(_library, "is_traced", lambda tensors: True)
    for ours, theirs in zip(direct, grads(), strict=True):
        assert torch.equal(ours, theirs)

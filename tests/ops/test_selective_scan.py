"""The PyTorch path of the selective scan against the formula, differentiated by autograd in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from subquad import ops
from subquad.ops import selective_scan as scan_function
from subquad.ops.selective_scan import CHUNK, CROSS, ROUTES, ScanCall, prepare, torch_impl
from subquad.ops.selective_scan.call import DIFFERENTIABLE
from subquad.ops.selective_scan.routes import route_order

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Results = dict[str, Tensor]

EXACT = 1e-12
"""Of the largest value: in float64 only the order of operations differs."""


def _table(k: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(k)
    return torch.stack([torch.randperm(length, generator=generator) for _ in range(k)])


CASES: dict[str, dict[str, Any]] = {
    "row": {"routes": ("row",)},
    "column": {"routes": ("column",)},
    "row_reversed": {"routes": ("row_reversed",)},
    "column_reversed": {"routes": ("column_reversed",)},
    "cross": {},
    "twice_the_same": {"routes": ("row", "row", "column_reversed")},
    "table": {"routes": _table(2, 20)},
    "table_int32": {"routes": _table(3, 20).int()},
    "four_states": {"state": 4},
    "sixteen_states": {"state": 16},
    "sixteen_states_table": {"state": 16, "routes": _table(2, 20)},
    "one_group": {"groups": 1},
    "groups": {"groups": 3},
    "groups_states": {"groups": 2, "state": 4},
    "group_per_channel": {"groups": 6, "state": 2, "routes": ("column", "row_reversed")},
    "full_rank": {"rank": None},
    "full_rank_plain": {"rank": None, "bias": False, "skip": False},
    "no_softplus": {"softplus": False},
    "no_softplus_full_rank": {"softplus": False, "rank": None, "bias": False},
    "no_skip_no_bias": {"skip": False, "bias": False},
    "gate": {"gate": True},
    "gate_addend": {"gate": True, "addend": True},
    "gate_addend_states_one_route": {"gate": True, "addend": True, "state": 4, "routes": ("row_reversed",)},
    "initial_state": {"initial": True},
    "initial_state_states_groups": {"initial": True, "state": 4, "groups": 2},
    "everything": {"initial": True, "gate": True, "addend": True, "state": 4, "groups": 2, "rank": 3},
    "sequence": {"sequence": True, "routes": ("row", "row_reversed"), "initial": True},
    "sequence_gate": {"sequence": True, "routes": ("row",), "gate": True, "addend": True},
    "one_pixel": {"height": 1, "width": 1, "initial": True, "gate": True, "addend": True},
    "one_channel": {"dim": 1, "rank": 1},
    "one_row": {"height": 1, "width": 130, "batch": 1, "initial": True},
    "one_column": {"height": 67, "width": 1, "batch": 1},
    "chunks_ragged": {"height": 9, "width": 15, "initial": True},
    "chunks_ragged_states": {"height": 9, "width": 15, "state": 4, "groups": 2, "initial": True},
    "chunks_full": {"height": 8, "width": 16, "batch": 1, "initial": True},
    "table_chunks": {"height": 9, "width": 15, "batch": 1, "routes": _table(2, 135)},
}


@pytest.fixture(params=["whole", "pieces"])
def working_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small maps fit into one piece; a tiny working set cuts the batch into images and the routes into segments."""
    if request.param == "pieces":
        monkeypatch.setattr(torch_impl, "_WORKING_SET_CPU", 64 * 8)


def _assert_near(results: Results, expected: Results, tolerance: Callable[[str, Tensor], float]) -> None:
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        error = (results[name].double() - value.double()).abs().max().item() if value.numel() else 0.0
        assert error <= tolerance(name, value), f"{name}: error {error:.3e}"


def _assert_as_exact_as_float32(results: Results, expected: Results, noise: Results) -> None:
    """Within 20 times what the formula itself loses in float32, and a floor of 2e-6 of the largest value."""

    def tolerance(name: str, value: Tensor) -> float:
        floor = (noise[name].double() - value).abs().max().item()
        return 20 * floor + 2e-6 * value.abs().max().item()

    _assert_near(results, expected, tolerance)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_float64_equals_the_formula(options: dict[str, Any], working_set: None, make_inputs: Any, run: Any) -> None:
    arguments = make_inputs(**options)
    _assert_near(run(arguments), run(arguments, "reference"), lambda _, value: EXACT * value.abs().max().item())


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_float32_loses_no_more_than_the_formula(
    options: dict[str, Any], make_inputs: Any, convert: Any, run: Any
) -> None:
    arguments = convert(make_inputs(**options), torch.float32)
    expected = run(convert(arguments, torch.float64), "reference")
    _assert_as_exact_as_float32(run(arguments), expected, run(arguments, "reference"))


def test_many_images_of_one_step_need_no_blocks(monkeypatch: pytest.MonkeyPatch, make_inputs: Any, run: Any) -> None:
    monkeypatch.setattr(torch_impl, "_WIDE", 10**9)
    arguments = make_inputs(height=9, width=15, state=2, initial=True)
    _assert_near(run(arguments), run(arguments, "reference"), lambda _, value: EXACT * value.abs().max().item())


@pytest.mark.parametrize(
    "options",
    [
        {
            "height": 4,
            "width": 3,
            "dim": 2,
            "batch": 1,
            "state": 2,
            "gate": True,
            "addend": True,
            "initial": True,
            "rank": 1,
        },
        {"height": 3, "width": 3, "dim": 4, "batch": 1, "groups": 2, "routes": _table(1, 9), "rank": None},
        {"height": 2, "width": 5, "dim": 2, "batch": 2, "routes": ("row_reversed",), "softplus": False},
    ],
    ids=["low_rank_gate_addend_state", "groups_table", "no_softplus"],
)
def test_gradcheck(options: dict[str, Any], make_inputs: Any) -> None:
    arguments = make_inputs(**options)
    names = [name for name, value in arguments.items() if isinstance(value, Tensor) and value.is_floating_point()]

    def function(*values: Tensor) -> Any:
        return scan_function(**(arguments | dict(zip(names, values, strict=True))), return_last_state=True)

    assert torch.autograd.gradcheck(function, [arguments[name].requires_grad_() for name in names])


def test_second_derivative_is_refused(make_inputs: Any) -> None:
    arguments = make_inputs(height=2, width=2)
    x = arguments["x"].requires_grad_()
    (grad,) = torch.autograd.grad(scan_function(**arguments).sum(), x, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        grad.sum().backward()


def test_only_the_requested_gradients(make_inputs: Any, run: Any) -> None:
    arguments = make_inputs(initial=True)
    expected = run(arguments, state_gradient=False)
    for name in ("x", "A", "dt_bias", "initial_state"):
        leaf = arguments[name].clone().requires_grad_()
        y = scan_function(**(arguments | {name: leaf}))
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
        (grad,) = torch.autograd.grad(y, leaf, cotangent)
        assert torch.equal(grad, expected[name])


def test_gradient_through_the_last_state_alone(make_inputs: Any) -> None:
    arguments = make_inputs(height=3, width=50, initial=True)
    grads = []
    for backend in ("torch", "reference"):
        leaves = {name: arguments[name].clone().requires_grad_() for name in ("x", "dt", "A", "B", "initial_state")}
        with ops.use_backend(backend):
            _, last_state = scan_function(**(arguments | leaves), return_last_state=True)
            grads.append(torch.autograd.grad(last_state.square().sum(), tuple(leaves.values())))
    for ours, expected in zip(*grads, strict=True):
        assert torch.allclose(ours, expected, rtol=0, atol=EXACT * expected.abs().max().item())


# Saved states ----------------------------------------------------------------------------------------------------


def _expected_states(call: ScanCall) -> Tensor:
    """The states that CHUNK describes, each by scanning the steps before it with the formula."""
    batch, height, width, dim = call.x.shape
    length = height * width
    by_route = []
    for k, code in enumerate(call.routes):
        order = route_order(code, height, width, None if call.table is None else call.table[k], call.x.device)
        steps = [min(i, length) for i in range(0, length, CHUNK)]
        if code & ROUTES["row_reversed"]:
            steps = [length - min(i + CHUNK, length) for i in steps]
        states = []
        for count in [*steps, length]:
            if count == 0:
                first = call.initial_state
                states.append(call.A.new_zeros(batch, dim, call.A.shape[-1]) if first is None else first[:, k])
                continue
            maps = (value.flatten(1, 2)[:, order[:count]] for value in (call.x, call.dt, call.B, call.C))
            x, dt, B, C = maps
            with ops.use_backend("reference"):
                _, state = scan_function(
                    x,
                    dt[:, :, k, None],
                    call.A[k, None],
                    B[:, :, k, None],
                    C[:, :, k, None],
                    dt_weight=None if call.dt_weight is None else call.dt_weight[k, None],
                    dt_bias=None if call.dt_bias is None else call.dt_bias[k, None],
                    initial_state=None if call.initial_state is None else call.initial_state[:, k, None],
                    dt_softplus=call.dt_softplus,
                    return_last_state=True,
                )
            states.append(state[:, 0])
        by_route.append(torch.stack(states, dim=1))
    return torch.stack(by_route, dim=1)


STATE_CASES: dict[str, dict[str, Any]] = {
    "below_a_chunk": {},
    "ragged": {"height": 9, "width": 15, "initial": True, "state": 2},
    "whole_chunks": {"height": 8, "width": 24, "batch": 1},
    "one_past": {"height": 5, "width": 13, "batch": 1, "groups": 2, "state": 2},
    "table": {"height": 9, "width": 15, "batch": 1, "routes": _table(2, 135)},
}


@pytest.mark.parametrize("options", STATE_CASES.values(), ids=STATE_CASES.keys())
def test_saved_states(options: dict[str, Any], working_set: None, make_inputs: Any) -> None:
    call = prepare(**make_inputs(**options))
    _, states, _ = torch_impl.forward(call)
    expected = _expected_states(call)
    assert states.shape == expected.shape
    assert torch.allclose(states, expected, rtol=0, atol=EXACT * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("options", STATE_CASES.values(), ids=STATE_CASES.keys())
def test_backward_from_states_of_another_implementation(options: dict[str, Any], make_inputs: Any, run: Any) -> None:
    arguments = make_inputs(**options)
    expected = run(arguments, "reference", state_gradient=False)
    call = prepare(**arguments)
    y = expected["y"]
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    grads = torch_impl.backward(call, _expected_states(call), call.new_kept(), grad_y, None)
    for name, grad in zip(ScanCall._fields[:DIFFERENTIABLE], grads, strict=True):
        if name in arguments:
            assert grad is not None
            assert torch.allclose(grad.view_as(expected[name]), expected[name], rtol=0, atol=1e-11)
        else:
            assert grad is None


@pytest.mark.parametrize("state", [1, 4])
def test_saves_inputs_and_one_state_in_a_chunk(state: int, make_inputs: Any) -> None:
    arguments = make_inputs(batch=2, height=16, width=20, state=state)
    leaves = {name: value.requires_grad_() for name, value in arguments.items() if isinstance(value, Tensor)}
    pointers = {value.untyped_storage().data_ptr() for value in leaves.values()}
    saved: list[Tensor] = []

    def pack(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in pointers:
            saved.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        scan_function(**arguments)
    chunks = math.ceil(16 * 20 / CHUNK) + 1
    assert sum(value.untyped_storage().nbytes() for value in saved) == 8 * 2 * len(CROSS) * chunks * 6 * state


class _CountOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_steps_grow_slower_than_the_sequence(make_inputs: Any) -> None:
    counts = []
    for length in (1024, 4096):
        call = prepare(**make_inputs(batch=1, height=1, width=length, dim=2, routes=("row",)))
        with _CountOperators() as mode:
            _, states, kept = torch_impl.forward(call)
            torch_impl.backward(call, states, kept, torch.ones_like(call.x), None)
        counts.append(mode.count)
    assert counts[1] < 2.2 * counts[0]


# Gate ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("state", [1, 4])
def test_one_gate_of_the_sum_is_the_gate_of_every_route(state: int, backend: str, make_inputs: Any, run: Any) -> None:
    """Mamba's formula, a route at a time and differentiated by autograd."""
    arguments = make_inputs(state=state, gate=True, addend=True)

    def by_route(**values: Any) -> Tensor:
        z, addend, scale, routes = (values.pop(name) for name in ("z", "addend", "scale", "routes"))
        gate = z / (1 + torch.exp(-z))
        total = addend * gate
        for k, route in enumerate(routes):
            own = {name: values[name][..., k : k + 1, :] for name in ("dt", "B", "C")}
            own |= {name: values[name][k : k + 1] for name in ("A", "D", "dt_weight", "dt_bias")}
            total = total + scan_function(**(values | own), routes=(route,)) * gate
        return scale * total

    leaves = {name: value.clone().requires_grad_() for name, value in arguments.items() if isinstance(value, Tensor)}
    with ops.use_backend("reference"):
        y = by_route(**(arguments | leaves))
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
        grads = torch.autograd.grad(y, [*leaves.values()], cotangent)
    expected = {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}
    results = run(arguments, backend, state_gradient=False)
    del results["last_state"]
    _assert_near(results, expected, lambda _, value: EXACT * value.abs().max().item())


def test_only_a_gate_that_is_trained_keeps_the_sum(make_inputs: Any, run: Any) -> None:
    arguments = make_inputs(gate=True, addend=True)
    expected = run(arguments, state_gradient=False)
    leaf = arguments["x"].requires_grad_()
    y = scan_function(**arguments)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    assert torch.equal(torch.autograd.grad(y, leaf, cotangent)[0], expected["x"])
    assert prepare(**arguments).new_kept().numel() == 0
    arguments["z"].requires_grad_()
    assert prepare(**arguments).new_kept().shape == y.shape
    with torch.no_grad():
        assert prepare(**arguments).new_kept().numel() == 0


@pytest.mark.parametrize("addend", [False, True])
def test_gradient_of_a_gate_whose_sum_was_not_kept(addend: bool, make_inputs: Any) -> None:
    """As in a program that was traced without gradients: the operator computes the sum again."""
    arguments = make_inputs(gate=True, addend=addend)
    leaves = [arguments[name].requires_grad_() for name in ("x", "z", "A", *(["addend"] if addend else []))]
    call, found = prepare(**arguments), []
    for keep in (True, False):
        y, _, kept = torch.ops.subquad.selective_scan(*call._replace(keep=keep))
        assert kept.numel() == (y.numel() if keep else 0)
        found.append(torch.autograd.grad(y.square().sum(), leaves))
    for have, want in zip(*found, strict=True):
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gated_output_is_rounded_once(dtype: torch.dtype, make_inputs: Any, convert: Any) -> None:
    """Though routes, addend and gate are summed and multiplied: within half a step of the 16-bit numbers."""
    arguments = convert(make_inputs(height=9, width=15, gate=True, addend=True), dtype)
    with ops.use_backend("reference"):
        expected = scan_function(**convert(arguments, torch.float64))
    error = (scan_function(**arguments).double() - expected).abs()
    float32 = 1e-5 * expected.abs().max()  # of the scan, some hundred roundings
    assert (error <= torch.finfo(dtype).eps / 2 * expected.abs() + float32).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_addend_and_its_gradient_in_float32(dtype: torch.dtype, make_inputs: Any, convert: Any) -> None:
    arguments = convert(make_inputs(gate=True, addend=True), dtype)
    narrow = scan_function(**arguments)
    leaf = arguments["addend"].float().requires_grad_()
    y = scan_function(**(arguments | {"addend": leaf}))
    assert torch.equal(y, narrow) and y.dtype == dtype
    (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    expected = 0.5 * torch.nn.functional.silu(arguments["z"].double())
    # From a bfloat16 output it is a number of that dtype, as the gradient that enters.
    tolerance = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(grad.double(), expected, rtol=tolerance, atol=0)


def test_gate_of_a_sum_beyond_float16(make_inputs: Any, convert: Any) -> None:
    arguments = convert(make_inputs(skip=False, gate=True), torch.float16)
    arguments |= {"C": arguments["C"] * 4000, "x": arguments["x"] * 100, "z": arguments["z"] * 0.01}
    leaves = [arguments[name].requires_grad_() for name in ("x", "z")]
    y = scan_function(**arguments)
    ungated = scan_function(**(arguments | {"z": None, "out_dtype": torch.float32}))
    assert ungated.abs().max() > torch.finfo(torch.float16).max
    grads = torch.autograd.grad(y, leaves, torch.full_like(y, 1e-3))
    assert all(value.isfinite().all() for value in (y, *grads))


# Layouts and dtypes ----------------------------------------------------------------------------------------------


def test_noncontiguous_inputs(make_inputs: Any, run: Any) -> None:
    arguments = make_inputs(state=4, gate=True, addend=True, initial=True, height=5, width=7)
    strided = {
        name: value.movedim(-1, 1).contiguous().movedim(1, -1) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    joined = torch.cat([arguments["dt"], arguments["B"], arguments["C"]], dim=-1)
    strided["dt"], strided["B"], strided["C"] = joined.split([2, 4, 4], dim=-1)
    assert not any(
        value.is_contiguous() for name, value in strided.items() if name in ("x", "dt", "A", "B", "z", "addend")
    )
    expected, results = run(arguments), run(strided)
    _assert_near(results, expected, lambda _, value: EXACT * value.abs().max().item())


def test_expanded_inputs(make_inputs: Any, run: Any) -> None:
    arguments = make_inputs()
    for name in ("x", "dt", "B", "C"):
        arguments[name] = arguments[name][:1].expand_as(arguments[name])
    _assert_near(run(arguments), run(arguments, "reference"), lambda _, value: EXACT * value.abs().max().item())


def test_noncontiguous_cotangent(make_inputs: Any) -> None:
    arguments = make_inputs()
    x = arguments["x"].requires_grad_()
    cotangent = torch.randn(2, 6, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).movedim(1, -1)
    (ours,) = torch.autograd.grad(scan_function(**arguments), x, cotangent)
    (expected,) = torch.autograd.grad(scan_function(**arguments), x, cotangent.contiguous())
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"state": 4, "gate": True, "addend": True, "initial": True}, {"rank": None, "groups": 2}]
)
def test_16_bit_inputs_lose_only_the_rounding_of_results(
    options: dict[str, Any], dtype: torch.dtype, make_inputs: Any, convert: Any, run: Any
) -> None:
    arguments = convert(make_inputs(height=9, width=15, **options), dtype) | {"out_dtype": torch.float32}
    expected = run(convert(arguments, torch.float64) | {"out_dtype": torch.float64}, "reference")
    noise = run(convert(arguments, torch.float32), "reference")
    results = run(arguments)
    for name, value in expected.items():
        rounding = torch.finfo(dtype).eps if name in ("x", "dt", "B", "C", "z", "addend") else 0.0
        assert results[name].dtype == (dtype if rounding else torch.float32)
        floor = 20 * (noise[name].double() - value).abs().max() + 2e-6 * value.abs().max()
        tiny = torch.finfo(dtype).tiny if rounding else 0.0
        assert ((results[name].double() - value).abs() <= rounding * value.abs() + floor + tiny).all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_output_has_the_dtype_of_x_or_the_one_asked_for(dtype: torch.dtype, make_inputs: Any, convert: Any) -> None:
    arguments = convert(make_inputs(gate=True), dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y, last_state = scan_function(**arguments, return_last_state=True)
    assert y.dtype == dtype and last_state.dtype == wide
    full = scan_function(**arguments, out_dtype=torch.float32)
    assert full.dtype == torch.float32
    narrow = torch.float32 if dtype == torch.float64 else dtype
    assert torch.equal(full.to(narrow), y.to(narrow))


def test_sum_of_routes_beyond_float16(make_inputs: Any, convert: Any) -> None:
    arguments = convert(make_inputs(skip=False), torch.float16)
    arguments |= {"C": arguments["C"] * 4000, "x": arguments["x"] * 100, "out_dtype": torch.float32}
    leaf = arguments["x"].requires_grad_()
    y = scan_function(**arguments)
    assert y.abs().max() > torch.finfo(torch.float16).max
    (grad,) = torch.autograd.grad(y.sum() * 1e-4, leaf)
    assert y.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_casts_activations_and_keeps_parameters(dtype: torch.dtype, make_inputs: Any, convert: Any) -> None:
    arguments = convert(make_inputs(initial=True, gate=True), torch.float32)
    leaves = {name: value.requires_grad_() for name, value in arguments.items() if isinstance(value, Tensor)}
    with torch.autocast("cpu", dtype):
        y, last_state = scan_function(**arguments, return_last_state=True)
        y.float().sum().backward()
    expected, expected_state = scan_function(**convert(arguments, dtype), return_last_state=True)
    assert torch.equal(y, expected) and y.dtype == dtype
    assert torch.equal(last_state, expected_state) and last_state.dtype == torch.float32
    for leaf in leaves.values():
        assert leaf.grad is not None and leaf.grad.dtype == torch.float32 and leaf.grad.isfinite().all()


def test_autocast_leaves_float64_alone(make_inputs: Any) -> None:
    arguments = make_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = scan_function(**arguments)
    assert torch.equal(y, scan_function(**arguments))


# Numbers at the edge ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [1, 4])
def test_decay_of_exactly_zero_and_one(state: int, make_inputs: Any, convert: Any, run: Any) -> None:
    arguments = convert(make_inputs(height=9, width=15, state=state, initial=True), torch.float32)
    arguments["A"][:, ::3] = -1e6  # decays that underflow
    arguments["A"][:, 1::3] = -1e-30  # decays that round to 1
    expected = run(convert(arguments, torch.float64), "reference")
    _assert_as_exact_as_float32(run(arguments), expected, run(arguments, "reference"))


def test_both_tails_of_softplus(make_inputs: Any, convert: Any, run: Any) -> None:
    arguments = convert(make_inputs(height=9, width=15, dim=8, rank=None, bias=False), torch.float32)
    tails = torch.tensor([-200.0, -100.0, -30.0, -5.0, 19.99, 20.01, 30.0, 500.0])
    arguments["dt"] = tails.expand(2, 9, 15, 4, 8).contiguous()
    expected = run(convert(arguments, torch.float64), "reference")
    _assert_as_exact_as_float32(run(arguments), expected, run(arguments, "reference"))


def test_softplus_is_the_identity_above_20_in_float64(make_inputs: Any, run: Any) -> None:
    arguments = make_inputs(rank=None, bias=False)
    arguments["dt"] = arguments["dt"] * 0.5 + 20
    _assert_near(run(arguments), run(arguments, "reference"), lambda _, value: EXACT * value.abs().max().item())


def test_slow_decay_over_a_long_sequence(make_inputs: Any, convert: Any, run: Any) -> None:
    arguments = convert(make_inputs(batch=1, height=1, width=784, dim=3, routes=("row",), rank=None), torch.float32)
    arguments["dt"] = arguments["dt"] * 0.1 - 7
    expected = run(convert(arguments, torch.float64), "reference")
    _assert_as_exact_as_float32(run(arguments), expected, run(arguments, "reference"))


def test_growing_states_without_softplus(make_inputs: Any, run: Any) -> None:
    arguments = make_inputs(softplus=False, height=2, width=5)
    arguments["dt"] = -arguments["dt"]
    _assert_near(run(arguments), run(arguments, "reference"), lambda _, value: EXACT * value.abs().max().item())


def test_empty_batch(make_inputs: Any, run: Any) -> None:
    arguments = make_inputs(batch=0, gate=True, initial=True)
    results = run(arguments)
    assert results["y"].shape == (0, 4, 5, 6) and results["last_state"].shape == (0, 4, 6, 1)
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            assert results[name].shape == value.shape
            assert (results[name] == 0).all()


def test_same_bits_every_time(make_inputs: Any, convert: Any, run: Any) -> None:
    arguments = convert(make_inputs(height=16, width=17, state=4), torch.float32)
    first, second = run(arguments), run(arguments)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name

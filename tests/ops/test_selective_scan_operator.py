"""The selective scan as an operator of PyTorch: fake, meta, compile, FLOPs, and agreement with its registration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from subquad.ops import selective_scan
from subquad.ops.selective_scan import CHUNK, prepare

SMALL = {"batch": 1, "height": 3, "width": 5, "dim": 4, "state": 2}
OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {"initial": True, "gate": True, "addend": True},
        {"skip": False, "bias": False, "rank": None},
        {"groups": 2, "routes": torch.stack([torch.arange(15).flip(0)] * 2), "softplus": False},
    ],
    ids=["all", "plain", "groups_table"],
)


def _operator_arguments(
    arguments: dict[str, Any], dtype: torch.dtype = torch.float64, keep: bool = False
) -> tuple[Any, ...]:
    call = prepare(**arguments, out_dtype=dtype)
    return tuple(call._replace(keep=call.z is not None and (call.keep or keep)))


@OPTIONS
def test_opcheck_forward(options: dict[str, Any], make_inputs: Any) -> None:
    arguments = make_inputs(**SMALL, **options)
    for value in arguments.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_()
    torch.library.opcheck(torch.ops.subquad.selective_scan.default, _operator_arguments(arguments))


@OPTIONS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck_backward(options: dict[str, Any], dtype: torch.dtype, make_inputs: Any, convert: Any) -> None:
    operator_arguments = _operator_arguments(convert(make_inputs(**SMALL, **options), dtype), dtype, keep=True)
    y, states, kept = torch.ops.subquad.selective_scan(*operator_arguments)
    for grad_last_state in (None, torch.ones_like(states[:, :, -1])):
        torch.library.opcheck(
            torch.ops.subquad.selective_scan_backward.default,
            (torch.ones_like(y), grad_last_state, states, kept, *operator_arguments),
        )


@pytest.mark.parametrize("gate", [False, True])
def test_compiles_in_one_graph_for_every_size(gate: bool, make_inputs: Any) -> None:
    torch._dynamo.reset()

    def function(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        y, last_state = selective_scan(**tensors, routes=("row", "column_reversed"), return_last_state=True)
        return y.sin(), last_state.cos()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for trial, (height, width) in enumerate(((3, 5), (9, 15), (4, 33))):
        inputs = make_inputs(2, height, width, state=2, routes=("row", "column_reversed"), initial=True, gate=gate)
        results = []
        for candidate in (compiled, function):
            tensors = {name: value.clone().requires_grad_() for name, value in inputs.items() if torch.is_tensor(value)}
            with torch._dynamo.config.patch(error_on_recompile=trial > 0):
                outputs = candidate(tensors)
            grads = torch.autograd.grad([out.sum() for out in outputs], list(tensors.values()))
            results.append([*outputs, *grads])
        for ours, expected in zip(*results, strict=True):
            assert torch.allclose(ours, expected, rtol=1e-12, atol=1e-12)


def test_compiles_under_autocast(make_inputs: Any, convert: Any) -> None:
    torch._dynamo.reset()
    arguments = convert(make_inputs(), torch.float32)

    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return selective_scan(**(arguments | {"x": x}))

    ours = torch.compile(function, fullgraph=True, backend="aot_eager")(arguments["x"])
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, function(arguments["x"]))


@pytest.mark.parametrize("gate", [0, 4, 5], ids=["plain", "gate", "addend"])
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("state", [1, 4])
def test_flop_counts(rank: int | None, state: int, gate: int, make_inputs: Any) -> None:
    arguments = make_inputs(2, 3, 5, 6, state=state, rank=rank, gate=gate > 0, addend=gate == 5)
    arguments["x"].requires_grad_()
    with FlopCounterMode(display=False) as forward:
        y = selective_scan(**arguments)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    steps = 2 * 3 * 5 * 4 * 6
    # A state's step: 2 for exp(d A), 2 for d B x, 2 for the recurrence, 2 for C h, 1 for what d takes; skip: 2.
    # An output's gate: 1 for the sigmoid and 3 products; 1 for the addend.
    expected = steps * (9 * state + 2 + 2 * (rank or 0)) + 2 * 3 * 5 * 6 * gate
    assert forward.get_total_flops() == expected
    assert backward.get_total_flops() == 3 * expected


@pytest.mark.parametrize("gate", [False, True])
def test_meta_tensors_have_shapes_and_gradients(gate: bool, make_inputs: Any, convert: Any) -> None:
    arguments = convert(make_inputs(2, 9, 15, 6, state=4, initial=True, gate=gate, addend=gate), torch.bfloat16)
    meta = {
        name: value.to("meta").requires_grad_() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    y, last_state = selective_scan(**meta, return_last_state=True)
    assert y.is_meta and y.shape == (2, 9, 15, 6) and y.dtype == torch.bfloat16
    assert last_state.is_meta and last_state.shape == (2, 4, 6, 4) and last_state.dtype == torch.float32
    (y.sum() + last_state.sum()).backward()
    for value in meta.values():
        if isinstance(value, Tensor):
            assert value.grad is not None and value.grad.is_meta
            assert value.grad.shape == value.shape and value.grad.dtype == value.dtype


def test_fake_tensors_agree_with_real_ones(make_inputs: Any) -> None:
    arguments = make_inputs(2, 9, 15, 6, state=4, gate=True, addend=True)
    for name in ("z", "addend"):
        arguments[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
    call = prepare(**arguments, out_dtype=torch.float32)._replace(keep=True)
    real = torch.ops.subquad.selective_scan(*call)
    real_grads = torch.ops.subquad.selective_scan_backward(real[0], None, *real[1:], *call)
    with FakeTensorMode() as mode:
        fake_call = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in call]
        fake = torch.ops.subquad.selective_scan(*fake_call)
        fake_grads = torch.ops.subquad.selective_scan_backward(fake[0], None, *fake[1:], *fake_call)
    assert real[1].shape[2] == -(-9 * 15 // CHUNK) + 1
    for expected, ours in zip((*real, *real_grads), (*fake, *fake_grads), strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (expected.shape, expected.dtype, expected.stride())


def test_exports_as_one_node(make_inputs: Any, convert: Any) -> None:
    arguments = convert(make_inputs(), torch.float32)

    class Scan(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return selective_scan(**(arguments | {"x": x}))  # type: ignore[return-value]

    program = torch.export.export(Scan(), (arguments["x"],))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.subquad.selective_scan.default) == 1
    assert torch.equal(program.module()(arguments["x"]), selective_scan(**arguments))

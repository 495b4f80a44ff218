"""The selective scan's export form against its reference: eagerly, and exported at sizes that were not traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from subquad.ops.selective_scan import prepare, reference, selective_scan
from subquad.ops.selective_scan.call import CHUNK
from subquad.ops.selective_scan.export_form import SPAN, export_form

Arguments = dict[str, Any]
OPERATOR = torch.ops.subquad.selective_scan.default


def _tables(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.stack([torch.randperm(length, generator=generator) for _ in range(3)]).int()


CASES: dict[str, Arguments] = {
    "cross": {},
    "one pixel": {"height": 1, "width": 1},
    "one row, one batch": {"batch": 1, "height": 1, "width": 7},
    "exactly one chunk": {"height": 8, "width": CHUNK // 8, "state": 2},
    "one pixel more than a chunk": {"height": 5, "width": (CHUNK + 1) // 5, "state": 2},
    "many chunks": {"height": 17, "width": 13},
    "N=16, groups": {"height": 9, "width": 11, "state": 16, "groups": 3},
    "full steps": {"height": 9, "width": 11, "rank": None, "state": 3},
    "no softplus": {"height": 9, "width": 11, "softplus": False},
    "no skip, no bias": {"height": 9, "width": 11, "skip": False, "bias": False},
    "initial state": {"height": 9, "width": 11, "state": 4, "initial": True},
    "reversed column": {"height": 9, "width": 11, "routes": ("column_reversed",), "state": 2},
    "gate": {"height": 9, "width": 11, "gate": True, "addend": True, "state": 4},
    "sequence": {"height": 10, "width": 15, "sequence": True, "routes": ("row", "row_reversed"), "initial": True},
    "tables": {"height": 7, "width": 19, "routes": _tables(7 * 19), "state": 2, "initial": True},
    "empty batch": {"batch": 0, "height": 9, "width": 11},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_reference_in_float64(case: Arguments, make_inputs: Callable[..., Arguments]) -> None:
    call = prepare(**make_inputs(**case))
    expected, last = reference.scan(call)
    y, states, _ = export_form(*call)
    # Where the operator is the identity, above 20, the export form adds the 2e-9 that softplus has there.
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(states[:, :, -1], last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("state", [1, 16])
def test_float32_stays_within_rounding(
    state: int, make_inputs: Callable[..., Arguments], convert: Callable[..., Arguments]
) -> None:
    arguments = make_inputs(height=15, width=21, state=state)
    expected, _ = reference.scan(prepare(**arguments))
    y, _, _ = export_form(*prepare(**convert(arguments, torch.float32)))
    assert y.dtype == torch.float32
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("bias", [-80.0, -12.0, 15.0, 30.0, 300.0])
def test_extreme_steps_keep_their_precision(
    bias: float, make_inputs: Callable[..., Arguments], convert: Callable[..., Arguments]
) -> None:
    """From steps near 0, where softplus loses its digits if written as log(1 + e), to decays that underflow."""
    arguments = make_inputs(height=6, width=13, state=2, skip=False)
    arguments["dt_bias"] = torch.full_like(arguments["dt_bias"], bias)
    expected, _ = reference.scan(prepare(**arguments))
    y, _, _ = export_form(*prepare(**convert(arguments, torch.float32)))
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_activations_give_the_asked_for_dtype(
    dtype: torch.dtype, make_inputs: Callable[..., Arguments], convert: Callable[..., Arguments]
) -> None:
    arguments = convert(make_inputs(height=5, width=9), dtype)
    call = prepare(**arguments, out_dtype=torch.float32)
    y, states, _ = export_form(*call)
    assert y.dtype == states.dtype == torch.float32
    torch.testing.assert_close(y, reference.scan(call)[0], rtol=1e-5, atol=1e-5)
    assert export_form(*prepare(**arguments))[0].dtype == dtype


@pytest.mark.parametrize("length", [1, SPAN, CHUNK, CHUNK + SPAN, 2 * CHUNK + 5, 3 * CHUNK])
def test_states_are_those_that_enter_each_chunk(length: int, make_inputs: Callable[..., Arguments]) -> None:
    routes = ("row", "row_reversed")
    arguments = make_inputs(height=1, width=length, dim=3, state=2, routes=routes, sequence=True, initial=True)
    call = prepare(**arguments)
    _, states, _ = export_form(*call)
    chunks = -(-length // CHUNK)
    assert states.shape == (2, 2, chunks + 1, 3, 2)  # and the last state
    for i in range(chunks):
        after = min((i + 1) * CHUNK, length)
        for k, walked in enumerate((range(i * CHUNK), range(length - 1, after - 1, -1))):
            torch.testing.assert_close(states[:, k, i], _last_state(arguments, k, list(walked)), rtol=1e-9, atol=1e-9)


def _last_state(arguments: Arguments, k: int, walked: list[int]) -> Tensor:
    """State of route k after the given pixels, from the initial one."""
    if not walked:
        return arguments["initial_state"][:, k]
    chosen = {name: arguments[name][:, walked] for name in ("x", "dt", "B", "C")}
    own = {name: arguments[name][k : k + 1] for name in ("A", "D", "dt_weight", "dt_bias")}
    per_route = {name: chosen[name][:, :, k : k + 1] for name in ("dt", "B", "C")}
    initial = arguments["initial_state"][:, k : k + 1]
    return reference.scan(prepare(**(chosen | own | per_route), initial_state=initial, routes=("row",)))[1][:, 0]


class Mixer(nn.Module):
    """The operator behind a subsampling, so that sizes are expressions, with parameters of its own."""

    def __init__(self, arguments: Arguments, keys: tuple[str, ...]) -> None:
        super().__init__()
        self.keys = keys
        self.options = {name: value for name, value in arguments.items() if not isinstance(value, Tensor)}
        for name, value in arguments.items():
            if isinstance(value, Tensor) and name not in keys:
                self.register_buffer(name, value)
        self.names = [name for name, _ in self.named_buffers()]

    def forward(self, *tensors: Tensor) -> Any:
        per_pixel = ("x", "dt", "B", "C")
        given = {
            name: tensor[:, ::2, 1::2] if name in per_pixel else tensor
            for name, tensor in zip(self.keys, tensors, strict=True)
        }
        own = {name: getattr(self, name) for name in self.names}
        return selective_scan(**given, **own, **self.options)


@pytest.mark.parametrize("traced", [(2, 6, 8), (2, 20, 34)], ids=["one span", "many spans"])
def test_exported_program_at_sizes_that_were_not_traced(
    traced: tuple[int, int, int], make_inputs: Callable[..., Arguments]
) -> None:
    keys = ("x", "dt", "B", "C")
    small = make_inputs(*traced, state=2)
    mixer = Mixer(small, keys)
    sizes = tuple({0: Dim.AUTO, 1: Dim.AUTO, 2: Dim.AUTO} for _ in keys)
    program = torch.export.export(mixer, tuple(small[key] for key in keys), dynamic_shapes=(sizes,))
    program = program.run_decompositions({OPERATOR: export_form})
    assert not [node for node in program.graph.nodes if "subquad" in str(node.target)]
    # A trace notes every comparison of sizes; the ONNX exporter does not look at the notes, and neither does this test.
    exported = program.module(check_guards=False)
    for batch, height, width in [(3, 27, 31), (1, 3, 50), (4, 48, 22)]:
        tensors = [make_inputs(batch, height, width, state=2)[key] for key in keys]
        call = prepare(
            *(
                tensors[keys.index(key)][:, ::2, 1::2] if key in keys else small[key]
                for key in ("x", "dt", "A", "B", "C")
            ),
            **{key: small[key] for key in ("D", "dt_weight", "dt_bias", "routes")},
        )
        torch.testing.assert_close(exported(*tensors), reference.scan(call)[0], rtol=1e-9, atol=1e-9)


def test_exported_program_with_tables_and_states(make_inputs: Callable[..., Arguments]) -> None:
    keys = ("x", "dt", "B", "C", "routes", "initial_state")
    small = make_inputs(2, 6, 8, routes=_tables(12), state=2, groups=2, initial=True)
    options = {"dt_softplus": True, "return_last_state": True}
    mixer = Mixer({name: value for name, value in small.items() if isinstance(value, Tensor)} | options, keys)
    maps = {0: Dim.AUTO, 1: Dim.AUTO, 2: Dim.AUTO}
    shapes = (*(dict(maps) for _ in "xdBC"), {1: Dim.AUTO}, {0: Dim.AUTO})
    program = torch.export.export(mixer, tuple(small[key] for key in keys), dynamic_shapes=(shapes,))
    exported = program.run_decompositions({OPERATOR: export_form}).module(check_guards=False)

    large = make_inputs(3, 18, 23, routes=_tables(9 * 11), state=2, groups=2, initial=True)
    y, last = exported(*(large[key] for key in keys))
    cut = {key: large[key][:, ::2, 1::2] for key in ("x", "dt", "B", "C")}
    parameters = {key: small[key] for key in ("A", "D", "dt_weight", "dt_bias")}
    call = prepare(**cut, **parameters, routes=large["routes"], initial_state=large["initial_state"])
    expected, last_state = reference.scan(call)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(last, last_state, rtol=1e-9, atol=1e-9)

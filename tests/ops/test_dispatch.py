"""Which implementation runs: what explain says, what use_backend and the environment can ask for, and refusals."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from subquad import ops
from subquad.ops import selective_scan
from subquad.ops.selective_scan import torch_impl

pytestmark = pytest.mark.usefixtures("no_backend_asked_for")

WHY_NOT_TRITON = (
    "a tensor on cpu, triton needs a GPU" if importlib.util.find_spec("triton") else "triton is not installed"
)


@pytest.fixture
def no_backend_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUBQUAD_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def _chosen(arguments: dict[str, Any]) -> str | None:
    return ops.explain(selective_scan, **arguments).chosen


def test_explain_names_the_implementation_and_the_reasons(make_inputs: Any) -> None:
    explanation = ops.explain(selective_scan, **make_inputs())
    assert explanation == ("selective_scan", "torch", {"triton": WHY_NOT_TRITON})
    assert str(explanation).splitlines() == ["selective_scan: torch", f"  not triton: {WHY_NOT_TRITON}"]
    assert ops.explain("selective_scan", **make_inputs()) == explanation


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"groups": 2}, "2 groups of channels"),
        ({"routes": ("row",) * 33}, "33 routes"),
        ({"batch": 0}, "empty batch"),
    ],
)
def test_explain_gives_the_limits_of_the_kernels(
    options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch, make_inputs: Any, convert: Any
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # what makes a CPU tensor eligible; no kernel is imported here
    good = convert(make_inputs(), torch.float32)
    assert _chosen(good) == "triton"
    assert "float64" in ops.explain(selective_scan, **make_inputs()).passed_over["triton"]
    explanation = ops.explain(selective_scan, **convert(make_inputs(**options), torch.float32))
    assert explanation.chosen == "torch"
    assert reason in explanation.passed_over["triton"]


def test_use_backend_chooses_and_gives_back(make_inputs: Any) -> None:
    arguments = make_inputs()
    with ops.use_backend("reference"):
        explanation = ops.explain(selective_scan, **arguments)
        assert explanation.chosen == "reference"
        assert explanation.passed_over == dict.fromkeys(("triton", "torch"), "'reference' was asked for")
        with ops.use_backend("torch"):
            assert _chosen(arguments) == "torch"
        assert _chosen(arguments) == "reference"
    with pytest.raises(KeyError), ops.use_backend("reference"):
        raise KeyError
    assert _chosen(arguments) == "torch"


def test_use_backend_runs_what_it_says(monkeypatch: pytest.MonkeyPatch, make_inputs: Any) -> None:
    calls = []

    def forward(call: Any) -> Any:
        calls.append(call)
        return original(call)

    original = torch_impl.forward
    monkeypatch.setattr(torch_impl, "forward", forward)
    arguments = make_inputs()
    with ops.use_backend("reference"):
        expected = selective_scan(**arguments)
    assert not calls
    with ops.use_backend("torch"):
        y = selective_scan(**arguments)
    assert len(calls) == 1
    assert torch.allclose(y, expected, rtol=1e-12, atol=1e-12)


def test_environment_chooses_and_use_backend_overrules_it(monkeypatch: pytest.MonkeyPatch, make_inputs: Any) -> None:
    arguments = make_inputs()
    monkeypatch.setenv("SUBQUAD_BACKEND", "reference")
    assert _chosen(arguments) == "reference"
    with ops.use_backend("torch"):
        assert _chosen(arguments) == "torch"
    monkeypatch.setenv("SUBQUAD_BACKEND", "")
    assert _chosen(arguments) == "torch"


@pytest.mark.parametrize("name", ["cuda", "Torch", ""])
def test_unknown_backend_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"use_backend: unknown backend '{name}'.*'reference', 'sdpa', 'torch', 'triton'"
    ):
        ops.use_backend(name).__enter__()


def test_unknown_backend_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch, make_inputs: Any) -> None:
    monkeypatch.setenv("SUBQUAD_BACKEND", "cutlass")
    with pytest.raises(ValueError, match=r"SUBQUAD_BACKEND: unknown backend 'cutlass'.*'torch'"):
        selective_scan(**make_inputs())


def test_triton_without_a_gpu_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch, make_inputs: Any) -> None:
    arguments = make_inputs()
    with ops.use_backend("triton"):
        explanation = ops.explain(selective_scan, **arguments)
        assert explanation.chosen is None
        assert str(explanation).startswith("selective_scan: no implementation")
        with pytest.raises(ValueError, match=WHY_NOT_TRITON):
            selective_scan(**arguments)
    monkeypatch.setenv("SUBQUAD_BACKEND", "triton")
    with pytest.raises(ValueError, match=WHY_NOT_TRITON):
        selective_scan(**arguments)


def test_explain_refuses_what_the_op_refuses(make_inputs: Any) -> None:
    arguments = make_inputs()
    with pytest.raises(ValueError, match="A must have shape"):
        ops.explain(selective_scan, **(arguments | {"A": arguments["A"][:1]}))


def test_explain_names_the_op_where_arguments_are_missing() -> None:
    with pytest.raises(TypeError, match=r"selective_scan\(\) missing 5 required positional arguments: 'x', 'dt'"):
        ops.explain(ops.selective_scan)


@pytest.mark.parametrize("op", ["scan", torch.matmul, 3])
def test_explain_refuses_an_unknown_op(op: Any) -> None:
    with pytest.raises(ValueError, match="explain: unknown op"):
        ops.explain(op)


def test_reference_is_no_operator(make_inputs: Any) -> None:
    """The backward pass of another implementation's output cannot run in the reference: an error, not a fallback."""
    arguments = make_inputs()
    y = ops.selective_scan(**(arguments | {"x": arguments["x"].requires_grad_()}))
    with ops.use_backend("reference"), pytest.raises(ValueError, match="the reference is not an operator"):
        y.sum().backward()

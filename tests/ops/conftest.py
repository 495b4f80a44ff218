"""What every operator must do, for the selective scan inputs and a way to run it with every named gradient, and a GPU
for Triton's eyes.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from subquad import ops
from subquad.ops import _compile
from subquad.ops.selective_scan import CROSS

Arguments = dict[str, Any]


def _make_inputs(
    batch: int = 2,
    height: int = 4,
    width: int = 5,
    dim: int = 6,
    *,
    state: int = 1,
    routes: Sequence[str] | Tensor = CROSS,
    groups: int | None = None,
    rank: int | None = 2,
    sequence: bool = False,
    skip: bool = True,
    bias: bool = True,
    gate: bool = False,
    addend: bool = False,
    initial: bool = False,
    softplus: bool = True,
) -> Arguments:
    """Arguments of ``selective_scan`` in float64, with steps and decays as in a trained model."""
    generator = torch.Generator().manual_seed(batch + 10 * height + 100 * width + 1000 * dim + state)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    k = len(routes)
    lead = (batch, height * width) if sequence else (batch, height, width)
    split = (k, state) if groups is None else (k, groups, state)
    arguments: Arguments = {
        "x": normal(*lead, dim),
        "dt": normal(*lead, k, dim if rank is None else rank),
        "A": -torch.rand((k, dim, state), generator=generator, dtype=torch.float64) * 4 - 0.1,
        "B": normal(*lead, *split),
        "C": normal(*lead, *split),
        "routes": routes,
        "dt_softplus": softplus,
    }
    if not softplus:
        arguments["dt"] = arguments["dt"].abs() * 0.1
    if rank is not None:
        weight = normal(k, dim, rank) * rank**-0.5
        arguments["dt_weight"] = weight if softplus else weight.abs()
    optional: Arguments = {
        "D": normal(k, dim) if skip else None,
        "dt_bias": (normal(k, dim) - 2 if softplus else normal(k, dim).abs() * 0.1) if bias else None,
        "z": normal(*lead, dim) if gate else None,
        "initial_state": normal(batch, k, dim, state) if initial else None,
        "addend": normal(*lead, dim) if addend else None,
        "scale": 0.5 if addend else None,
    }
    return arguments | {name: value for name, value in optional.items() if value is not None}


def _convert(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The arguments in another precision; parameters stay in float32 with 16-bit activations."""
    activations = ("x", "dt", "B", "C", "z", "addend")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        name: value.to(dtype if name in activations else wide)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }


def _run(arguments: Arguments, backend: str = "torch", *, state_gradient: bool = True) -> dict[str, Tensor]:
    """Outputs ``y`` and ``last_state`` and, under its name, the gradient of every floating-point argument.

    The cotangents depend on nothing but the shapes, so that results of two runs can be compared.
    """
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    with ops.use_backend(backend):
        y, last_state = ops.selective_scan(**(arguments | leaves), return_last_state=True)
        generator = torch.Generator().manual_seed(7)
        cotangents = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in (y, last_state)]
        outputs = (y, last_state) if state_gradient else (y,)
        grads = torch.autograd.grad(outputs, tuple(leaves.values()), cotangents[: len(outputs)])
    return {"y": y.detach(), "last_state": last_state.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.fixture
def make_inputs() -> Callable[..., Arguments]:
    return _make_inputs


@pytest.fixture
def convert() -> Callable[[Arguments, torch.dtype], Arguments]:
    return _convert


@pytest.fixture
def run() -> Callable[..., dict[str, Tensor]]:
    return _run


# A GPU for Triton's eyes ------------------------------------------------------------------------------------------


class _Gpu:
    """A driver of a GPU that is not here; kernels keep what they know of it apart from what they know of others."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> _Gpu:
        return self

    def get_current_stream(self, device: object) -> int:
        return 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An H100 that is not here, and an empty cache. For tests that are skipped without triton."""
    import triton

    monkeypatch.setattr(triton.runtime.driver, "_active", _Gpu())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(_compile, "_jobs", {})
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def ptxas() -> None:
    """For tests that compile, and are skipped without triton."""
    import triton

    try:
        there = os.access(triton.knobs.nvidia.ptxas.path, os.X_OK)
    except RuntimeError:
        there = False
    if not there:
        pytest.skip("needs ptxas, which this triton came without")


# What every operator must do --------------------------------------------------------------------------------------


def _assert_close(mine: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Values by name, up to a part of the largest one (at least 1: gradients may be differences that cancel)."""
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        error, size = (mine[name].double() - value.double()).abs().max(), max(value.abs().max(), 1)
        assert error <= tolerance * size, f"{name}: off by {error:.3g} of {size:.3g}"


def _assert_shapes_without_data(operator: Any, call: Sequence[Any]) -> None:
    """Fake and meta tensors have the shapes, dtypes and, where they may, the strides of real ones."""
    real = operator(*call)
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(value) if torch.is_tensor(value) else value for value in call))
    meta = operator(*(value.to("meta") if torch.is_tensor(value) else value for value in call))
    results = ([found] if torch.is_tensor(found) else found for found in (real, fake, meta))
    for expected, first, second in zip(*results, strict=True):
        assert (first.shape, first.dtype, first.stride()) == (expected.shape, expected.dtype, expected.stride())
        assert (second.shape, second.dtype, second.is_meta) == (expected.shape, expected.dtype, True)


def _assert_compiles(function: Callable[[dict[str, Tensor]], Tensor], *inputs: dict[str, Tensor]) -> None:
    """One graph, compiled once, serves inputs of every size: values and gradients, in float64."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for trial, tensors in enumerate(inputs):
        leaves = {name: value.requires_grad_() for name, value in tensors.items()}
        with torch._dynamo.config.patch(error_on_recompile=trial > 0):
            mine = compiled(leaves)
        expected = function(leaves)
        grads = [torch.autograd.grad(out.sum(), list(leaves.values())) for out in (mine, expected)]
        for one, other in zip((mine, *grads[0]), (expected, *grads[1]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def _assert_exports(
    function: Callable[..., Tensor],
    forms: dict[Any, Callable[..., Any]],
    make: Callable[..., tuple[Tensor, ...]],
    traced: tuple[int, ...],
    *others: tuple[int, ...],
    tolerance: float = 1e-12,
    guards: bool = True,
) -> None:
    """A program of ``function`` holds each operator of ``forms`` once, and its form in its place serves other sizes.

    ``make`` takes a size, the traced one or one of the others, whose numbers are the first axes of all its tensors. A
    trace notes every comparison of sizes; without ``guards`` nobody looks at the notes, like the ONNX exporter.
    """

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return function(*tensors)

    example = make(*traced)
    axes = tuple(dict.fromkeys(range(len(traced)), Dim.AUTO) for _ in example)
    program = torch.export.export(Module(), example, dynamic_shapes=(axes,))
    targets = [node.target for node in program.graph.nodes]
    assert all(targets.count(operator) == 1 for operator in forms)
    decomposed = program.run_decompositions(forms)
    assert not [node for node in decomposed.graph.nodes if "subquad" in str(node.target)]
    exported = decomposed.module(check_guards=guards)
    for size in others:
        tensors = make(*size)
        torch.testing.assert_close(exported(*tensors), function(*tensors), rtol=tolerance, atol=tolerance)


def _assert_refuses(
    function: Callable[..., Any],
    arguments: Arguments,
    change: Callable[[Arguments], Arguments],
    exception: type[Exception],
    fragments: tuple[str, ...],
) -> None:
    """With a change of good arguments the right exception, which names the function and has every fragment."""
    function(**arguments)
    with pytest.raises(exception) as raised:
        function(**(arguments | change(arguments)))
    message = str(raised.value)
    assert message.startswith(f"{function.__name__}: ")
    assert all(fragment in message for fragment in fragments), message


@pytest.fixture
def assert_close() -> Callable[..., None]:
    return _assert_close


@pytest.fixture
def assert_shapes_without_data() -> Callable[..., None]:
    return _assert_shapes_without_data


@pytest.fixture
def assert_compiles() -> Callable[..., None]:
    return _assert_compiles


@pytest.fixture
def assert_exports() -> Callable[..., None]:
    return _assert_exports


@pytest.fixture
def assert_refuses() -> Callable[..., None]:
    return _assert_refuses


@pytest.fixture
def wide_offsets(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Give an op's kernels offsets of 64 bits, whatever the size of its tensors."""

    def widen(op: str) -> None:
        import triton.language as tl

        from subquad.ops import _triton

        kernels = importlib.import_module(f"subquad.ops.{op}.triton_impl")
        make: Any = kernels._make_plan
        monkeypatch.setattr(kernels, "_plans", _triton.Plans())
        monkeypatch.setattr(
            kernels, "_make_plan", lambda *args: (plan := make(*args))._replace(meta=plan.meta | {"INDEX": tl.int64})
        )

    return widen

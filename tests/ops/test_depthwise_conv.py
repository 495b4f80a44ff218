"""Depthwise convolution: the PyTorch path and the operator against the formula and against PyTorch's modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

from subquad import ops
from subquad.ops import causal_conv1d, depthwise_conv2d
from subquad.ops.depthwise_conv import ConvCall, prepare_map, prepare_sequence
from subquad.ops.depthwise_conv.export_form import export_form

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Arguments = dict[str, Any]
OPERATOR = torch.ops.subquad.depthwise_conv.default
BACKWARD = torch.ops.subquad.depthwise_conv_backward.default

EXACT = 1e-12
"""Of the largest value (at least 1): in float64 only the order of operations differs."""

FLOAT32 = 2e-6
"""Likewise; the formula itself in float32 is off by up to 5e-7."""

HALF = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Relative L2 error: inputs and weights are exact in 16 bits; the output, and with an activation z and dz, are not."""


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _inputs(
    *size: int,
    kernel: tuple[int, ...] = (3, 3),
    channels: int = 6,
    batch: int = 2,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Arguments:
    """Arguments of ``causal_conv1d`` for one size, of ``depthwise_conv2d`` for two."""
    size = size or (5, 7)
    arguments = {"x": _normal(1, batch, *size, channels), "weight": _normal(2, channels, *kernel)}
    if bias:
        arguments["bias"] = _normal(3, channels)
    return {name: value.to(dtype) for name, value in arguments.items()} | options


def _op(arguments: Arguments) -> Callable[..., Tensor]:
    return depthwise_conv2d if arguments["x"].dim() == 4 else causal_conv1d


def _run(arguments: Arguments, backend: str = "torch") -> dict[str, Tensor]:
    """Output and, by name, the gradient of every tensor; the cotangent depends on shapes only."""
    leaves = {name: value.detach().requires_grad_() for name, value in arguments.items() if isinstance(value, Tensor)}
    with ops.use_backend(backend):
        y = _op(arguments)(**(arguments | leaves))
        grads = torch.autograd.grad(y, tuple(leaves.values()), _normal(7, *y.shape).to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def _to(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    return {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def _assert_close(mine: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        error, size = (mine[name].double() - value.double()).abs().max(), max(value.abs().max(), 1)
        assert error <= tolerance * size, f"{name}: off by {error:.3g} of {size:.3g}"


CASES: dict[str, Arguments] = {
    "3x3": _inputs(),
    "silu": _inputs(7, 9, activation="silu", bias=False),
    "gelu": _inputs(4, 11, activation="gelu"),
    "residual": _inputs(residual=True),
    "gelu of a sum": _inputs(residual=True, activation="gelu"),
    "5x5": _inputs(6, 5, kernel=(5, 5), activation="silu"),
    "3x7": _inputs(4, 5, kernel=(3, 7), residual=True),
    "7x1": _inputs(9, 2, kernel=(7, 1), bias=False),
    "1x1": _inputs(kernel=(1, 1)),
    "map below the kernel": _inputs(1, 2, kernel=(5, 5), activation="gelu"),
    "one pixel of one channel": _inputs(1, 1, channels=1, batch=1),
    "one column": _inputs(9, 1),
    "one row": _inputs(1, 9, residual=True, activation="silu"),
    "sequence": _inputs(11, kernel=(4,)),
    "sequence, silu": _inputs(11, kernel=(4,), activation="silu"),
    "reversed sequence": _inputs(11, kernel=(4,), reverse=True, bias=False),
    "reversed sequence, silu": _inputs(11, kernel=(4,), activation="silu", reverse=True),
    "8 taps": _inputs(20, kernel=(8,), activation="gelu"),
    "one tap": _inputs(5, kernel=(1,), reverse=True),
    "sequence below the kernel": _inputs(2, kernel=(4,), reverse=True, activation="silu"),
    "one token": _inputs(1, kernel=(4,), batch=1),
}
cases = pytest.mark.parametrize("arguments", CASES.values(), ids=CASES.keys())


@cases
def test_float64_equals_the_formula(arguments: Arguments) -> None:
    _assert_close(_run(arguments), _run(arguments, "reference"), EXACT)


@cases
def test_float32_stays_within_rounding(arguments: Arguments) -> None:
    _assert_close(_run(_to(arguments, torch.float32)), _run(arguments, "reference"), FLOAT32)


@pytest.mark.parametrize("name", ["residual", "gelu of a sum", "5x5", "reversed sequence, silu"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_16_bit_inputs_lose_only_the_rounding_of_results(name: str, dtype: torch.dtype) -> None:
    arguments = _to(CASES[name], dtype)
    mine, expected = _run(arguments), _run(_to(arguments, torch.float64), "reference")
    for name, value in expected.items():
        assert mine[name].dtype == dtype
        assert (mine[name].double() - value).norm() <= HALF[dtype] * value.norm(), name


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_formula_is_pytorchs_convolution(backend: str) -> None:
    arguments = _inputs(6, 9, kernel=(3, 5))
    conv = torch.nn.Conv2d(6, 6, (3, 5), padding=(1, 2), groups=6, dtype=torch.float64)
    conv.load_state_dict({"weight": arguments["weight"].unsqueeze(1), "bias": arguments["bias"]})
    x = arguments["x"]
    z = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    for activation, act in (("none", lambda z: z), ("silu", torch.nn.SiLU()), ("gelu", torch.nn.GELU())):
        for residual, expected in ((False, act(z)), (True, act(x + z))):
            with ops.use_backend(backend):
                mine = depthwise_conv2d(**arguments, activation=activation, residual=residual)
            torch.testing.assert_close(mine, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_reverse_is_the_flipped_sequence(backend: str) -> None:
    arguments = _inputs(9, kernel=(4,))
    x, weight, bias = arguments.values()

    def causal(x: Tensor) -> Tensor:
        return F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], bias, groups=6).mT

    with ops.use_backend(backend):
        torch.testing.assert_close(causal_conv1d(**arguments), causal(x), rtol=EXACT, atol=EXACT)
        mine = causal_conv1d(**arguments, reverse=True)
    torch.testing.assert_close(mine, causal(x.flip(1)).flip(1), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", ["gelu of a sum", "reversed sequence, silu", "3x7"])
def test_gradcheck(name: str) -> None:
    arguments = dict(CASES[name])
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    leaves = [arguments.pop(name).clone().requires_grad_() for name in names]
    op = depthwise_conv2d if leaves[0].dim() == 4 else causal_conv1d
    assert torch.autograd.gradcheck(lambda *xs: op(**arguments, **dict(zip(names, xs, strict=True))), leaves)


def test_second_derivative_is_refused() -> None:
    arguments = _inputs()
    x = arguments["x"].requires_grad_()
    (grad,) = torch.autograd.grad(depthwise_conv2d(**arguments).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["3x7", "silu", "reversed sequence, silu"])
def test_strides_do_not_matter(name: str) -> None:
    arguments = CASES[name]
    strided = dict(arguments)
    for name in ("weight", "bias"):
        if name in arguments:
            value = arguments[name]
            strided[name] = torch.stack([value, value.new_full(value.shape, torch.nan)], dim=-1)[..., 0]
    x = arguments["x"]
    for view in (
        torch.cat([x.new_full(x.shape, torch.nan), x], dim=-1)[..., x.shape[-1] :],
        x.mT.contiguous().mT,
        x.transpose(0, -1).contiguous().transpose(0, -1),
    ):
        mine = _run(strided | {"x": view})
        assert mine["y"].is_contiguous()
        _assert_close(mine, _run(arguments), EXACT)


def test_empty_batch() -> None:
    for arguments in (_inputs(batch=0, activation="silu"), _inputs(5, kernel=(4,), batch=0)):
        mine = _run(arguments)
        assert mine["y"].shape == arguments["x"].shape
        assert not mine["weight"].any() and not mine["bias"].any()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_casts_x_unless_it_is_added(dtype: torch.dtype) -> None:
    for arguments in (_inputs(dtype=torch.float32, activation="silu"), _inputs(7, kernel=(4,), dtype=torch.float32)):
        arguments["weight"].requires_grad_()
        with torch.autocast("cpu", dtype):
            y = _op(arguments)(**arguments)
        assert y.dtype == dtype
        assert torch.equal(y, _op(arguments)(**(arguments | {"x": arguments["x"].to(dtype)})))
        assert torch.autograd.grad(y.float().sum(), arguments["weight"])[0].dtype == torch.float32
    arguments = _inputs(dtype=torch.float32, residual=True)
    with torch.autocast("cpu", dtype):
        assert torch.equal(depthwise_conv2d(**arguments), _run(arguments)["y"])
        assert depthwise_conv2d(**_inputs()).dtype == torch.float64


def test_keeps_its_inputs_only() -> None:
    saved: list[Tensor] = []
    arguments = _inputs(activation="silu")
    leaves = [value.requires_grad_() for value in arguments.values() if isinstance(value, Tensor)]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        depthwise_conv2d(**arguments)
    assert {value.data_ptr() for value in saved} == {value.data_ptr() for value in leaves}


# The operator ----------------------------------------------------------------------------------------------------

CALLS = {
    "map": lambda dtype: prepare_map(**_inputs(activation="silu", dtype=dtype)),
    "residual": lambda dtype: prepare_map(**_inputs(4, 3, residual=True, bias=False, dtype=dtype)),
    "sequence": lambda dtype: prepare_sequence(**_inputs(9, kernel=(4,), activation="gelu", dtype=dtype)),
    "reversed": lambda dtype: prepare_sequence(**_inputs(9, kernel=(4,), reverse=True, dtype=dtype)),
}
calls = pytest.mark.parametrize("make_call", CALLS.values(), ids=CALLS.keys())


@calls
def test_opcheck(make_call: Callable[[torch.dtype], ConvCall]) -> None:
    call = make_call(torch.float64)
    inputs = [value.clone().requires_grad_() if isinstance(value, Tensor) else value for value in call]
    torch.library.opcheck(OPERATOR, tuple(inputs))
    torch.library.opcheck(BACKWARD, (torch.ones_like(call.x), *call))


@calls
def test_fake_and_meta_tensors_have_the_real_shapes(make_call: Callable[[torch.dtype], ConvCall]) -> None:
    call = make_call(torch.bfloat16)
    grad = torch.ones_like(call.x)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(value) if torch.is_tensor(value) else value for value in (grad, *call)]
    meta = [value.to("meta") if torch.is_tensor(value) else value for value in (grad, *call)]
    real = (OPERATOR(*call), *BACKWARD(grad, *call))
    for tensors, device in ((fake, "cpu"), (meta, "meta")):
        for expected, found in zip(real, (OPERATOR(*tensors[1:]), *BACKWARD(*tensors)), strict=True):
            assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())
            assert found.device.type == device


def test_compiles_in_one_graph_for_every_size() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_run_both, fullgraph=True, backend="aot_eager", dynamic=True)
    for trial, size in enumerate(((5, 7), (9, 15), (12, 8))):
        leaves = {name: value.requires_grad_() for name, value in _inputs(*size).items()}
        with torch._dynamo.config.patch(error_on_recompile=trial > 0):
            mine = compiled(**leaves)
        expected = _run_both(**leaves)
        grads = [torch.autograd.grad(out.sum(), list(leaves.values())) for out in (mine, expected)]
        for one, other in zip((mine, *grads[0]), (expected, *grads[1]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def _run_both(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = depthwise_conv2d(x, weight, bias, activation="silu", residual=True).sin()
    return causal_conv1d(x.flatten(1, 2), weight.flatten(1), bias, reverse=True).sin()


def test_flop_counts() -> None:
    x, weight, bias = (value.requires_grad_() for value in _inputs(7, 9, kernel=(3, 5)).values())
    convolution = 2 * 2 * 63 * 6 * 15  # operations, images, pixels, channels, taps
    with FlopCounterMode(display=False) as theirs:
        F.conv2d(x.permute(0, 3, 1, 2), weight.unsqueeze(1), bias, padding=(1, 2), groups=6)
    assert theirs.get_total_flops() == convolution
    for activation, passes in (("none", 2), ("gelu", 3)):
        with FlopCounterMode(display=False) as forward:
            y = depthwise_conv2d(x, weight, bias, activation=activation)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        assert (forward.get_total_flops(), backward.get_total_flops()) == (convolution, passes * convolution)


def test_explain_and_the_reference() -> None:
    arguments = _inputs()
    assert ops.explain(depthwise_conv2d, **arguments).chosen == "torch"
    assert ops.explain(causal_conv1d, **_inputs(7, kernel=(4,))).chosen == "torch"
    y = depthwise_conv2d(**(arguments | {"x": arguments["x"].requires_grad_()}))
    with ops.use_backend("reference"), pytest.raises(ValueError, match="the reference is not an operator"):
        y.sum().backward()


@calls
def test_export_form_equals_the_operator(make_call: Callable[[torch.dtype], ConvCall]) -> None:
    call = make_call(torch.float64)
    mine, expected = export_form(*call), OPERATOR(*call)
    assert mine.shape == expected.shape and mine.stride() == expected.stride()
    torch.testing.assert_close(mine, expected, rtol=EXACT, atol=EXACT)


def test_exported_program_at_sizes_that_were_not_traced() -> None:
    weight = _inputs()["weight"]

    class Convolutions(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = depthwise_conv2d(x, weight, activation="gelu", residual=True)
            return causal_conv1d(x.flatten(1, 2), weight.flatten(1), activation="silu", reverse=True)

    axes = ({0: Dim.AUTO, 1: Dim.AUTO, 2: Dim.AUTO},)
    program = torch.export.export(Convolutions(), (_normal(1, 2, 9, 12, 6),), dynamic_shapes=axes)
    assert [node.target for node in program.graph.nodes].count(OPERATOR) == 2
    decomposed = program.run_decompositions({OPERATOR: export_form})
    assert not [node for node in decomposed.graph.nodes if "subquad" in str(node.target)]
    for size in ((3, 6, 21), (1, 17, 8)):
        x = _normal(1, *size, 6)
        torch.testing.assert_close(decomposed.module()(x), Convolutions()(x), rtol=EXACT, atol=EXACT)


# Bad input -------------------------------------------------------------------------------------------------------

Change = Callable[[Arguments], Arguments]


def _of(name: str, function: Callable[[Tensor], object]) -> Change:
    return lambda arguments: {name: function(arguments[name])}


# name: (what to change in good arguments, exception, fragments of the message)
BAD: dict[str, tuple[Change, type[Exception], tuple[str, ...]]] = {
    "x_list": (_of("x", lambda x: x.tolist()), TypeError, ("x must be a tensor", "list")),
    "bias_number": (lambda _: {"bias": 1.0}, TypeError, ("bias must be a tensor", "float")),
    "x_rank": (_of("x", lambda x: x[0]), ValueError, ("x must be (B, H, W, C)", "(5, 7, 6)")),
    "no_columns": (_of("x", lambda x: x[:, :, :0]), ValueError, ("not empty but for its batch", "(2, 5, 0, 6)")),
    "weight_rank": (_of("weight", lambda w: w[:, None]), ValueError, ("(C, kh, kw) with C = 6", "(6, 1, 3, 3)")),
    "weight_channels": (_of("weight", lambda w: w[:5]), ValueError, ("(C, kh, kw) with C = 6", "(5, 3, 3)")),
    "even": (_of("weight", lambda w: w[:, :2]), ValueError, ("the sizes of the kernel must be odd, got 2 x 3",)),
    "bias_shape": (_of("bias", lambda bias: bias[:3]), ValueError, ("bias must have shape (C,) = (6,)", "(3,)")),
    "dtype": (_of("x", Tensor.long), TypeError, ("x must be of dtype float32", "got int64")),
    "device": (_of("weight", lambda w: w.to("meta")), ValueError, ("weight is on meta, expected cpu",)),
    "activation": (
        lambda _: {"activation": "relu"},
        ValueError,
        ("unknown activation 'relu'", "'none', 'silu', 'gelu'"),
    ),
}


@pytest.mark.parametrize(("change", "exception", "fragments"), BAD.values(), ids=BAD.keys())
def test_bad_input(change: Change, exception: type[Exception], fragments: tuple[str, ...]) -> None:
    arguments = _inputs()
    with pytest.raises(exception) as error:
        depthwise_conv2d(**(arguments | change(arguments)))
    message = str(error.value)
    assert message.startswith("depthwise_conv2d: ")
    assert all(fragment in message for fragment in fragments), message


def test_bad_sequences() -> None:
    arguments = _inputs(9, kernel=(4,))
    with pytest.raises(ValueError, match=r"causal_conv1d: x must be \(B, N, C\) .* got shape \(2, 1, 9, 6\)"):
        causal_conv1d(**(arguments | {"x": arguments["x"].unsqueeze(1)}))
    with pytest.raises(ValueError, match=r"causal_conv1d: weight must be \(C, K\) with C = 6, got shape \(6, 0\)"):
        causal_conv1d(**(arguments | {"weight": arguments["weight"][:, :0]}))

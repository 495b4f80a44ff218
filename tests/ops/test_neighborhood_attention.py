"""Neighborhood attention: the PyTorch path and the operator against the formula; recorded cases are in tests/parity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from subquad import ops
from subquad.ops import na1d, na2d, na3d
from subquad.ops.neighborhood_attention import prepare, tiles
from subquad.ops.neighborhood_attention.export_form import export_form

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Arguments = dict[str, Any]
OPERATOR = torch.ops.subquad.neighborhood_attention.default
BACKWARD = torch.ops.subquad.neighborhood_attention_backward.default
OPS = {1: na1d, 2: na2d, 3: na3d}

EXACT = 1e-12
"""Of the largest value (at least 1): in float64 only the order of operations differs."""

FLOAT32 = 2e-6
"""Likewise; the formula itself in float32 is off by up to 6e-7."""

HALF = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Relative L2 error of 16-bit results: inputs are exact in 16 bits, the output, also a part of gradients, is not."""


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _inputs(
    *size: int,
    kernel_size: Any = 3,
    batch: int = 2,
    heads: int = 2,
    shared: int | None = None,
    dim: int = 4,
    values: int | None = None,
    bias: bool = True,
    additional: int = 0,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Arguments:
    """Arguments for a map of ``size``; the bias stays in float32 with 16-bit activations."""
    size = size or (7, 9)
    shared, values = shared or heads, values or dim
    arguments: Arguments = {
        "q": _normal(1, batch, *size, heads, dim),
        "k": _normal(2, batch, *size, shared, dim),
        "v": _normal(3, batch, *size, shared, values),
    }
    if additional:
        arguments["additional_keys"] = _normal(4, batch, additional, shared, dim)
        arguments["additional_values"] = _normal(5, batch, additional, shared, values)
    arguments = {name: value.to(dtype) for name, value in arguments.items()}
    if bias:
        kernels = [kernel_size] * len(size) if isinstance(kernel_size, int) else kernel_size
        table = _normal(6, heads, *(2 * kernel - 1 for kernel in kernels))
        arguments["rpb"] = table.to(torch.promote_types(dtype, torch.float32))
    return arguments | {"kernel_size": kernel_size} | options


def _attend(arguments: Arguments) -> tuple[Tensor, Tensor]:
    o, lse = OPS[arguments["q"].dim() - 3](**arguments, return_lse=True)
    return o, lse


def _run(arguments: Arguments, backend: str = "torch") -> dict[str, Tensor]:
    """Output, lse and, by name, the gradient of every tensor; cotangents depend on shapes only."""
    leaves = {name: value.detach().requires_grad_() for name, value in arguments.items() if isinstance(value, Tensor)}
    with ops.use_backend(backend):
        outputs = _attend(arguments | leaves)
        cotangents = [_normal(7 + i, *out.shape).to(out.dtype) for i, out in enumerate(outputs)]
        grads = torch.autograd.grad(outputs, tuple(leaves.values()), cotangents)
    return {"o": outputs[0].detach(), "lse": outputs[1].detach(), **dict(zip(leaves, grads, strict=True))}


def _double(arguments: Arguments) -> Arguments:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def _prepare(arguments: Arguments) -> Any:
    return prepare(arguments["q"].dim() - 3, **arguments)


# Sizes of several tiles an axis, with a ragged last one; what the recorded cases do not combine.
CASES: dict[str, Arguments] = {
    "map": _inputs(23, 19, kernel_size=(7, 5)),
    "no_bias": _inputs(23, 19, bias=False),
    "dilated": _inputs(31, 26, kernel_size=(3, 4), dilation=(3, 5)),
    "stride": _inputs(23, 19, kernel_size=(6, 4), stride=(4, 3), bias=False),
    "stride_dilated": _inputs(29, 40, kernel_size=(5, 4), stride=(5, 2), dilation=(2, 3)),
    "causal": _inputs(23, 19, kernel_size=4, is_causal=(True, False), stride=(3, 1)),
    "causal_both": _inputs(23, 19, kernel_size=3, is_causal=True, dilation=2, bias=False),
    "shared_heads": _inputs(20, 9, heads=6, shared=2, values=3, additional=3),
    "one_column": _inputs(20, 1, kernel_size=(5, 1)),
    "one_pixel": _inputs(1, 1, kernel_size=1),
    "one_channel": _inputs(9, 9, dim=1, heads=1),
    "sequence": _inputs(200, kernel_size=9, additional=1),
    "causal_sequence": _inputs(150, kernel_size=8, is_causal=True, dilation=2, stride=3),
    "volume": _inputs(7, 9, 6, kernel_size=(3, 5, 2), dilation=(2, 1, 3), is_causal=(True, False, False)),
    "scale": _inputs(9, 9, scale=0.0),
}
cases = pytest.mark.parametrize("arguments", CASES.values(), ids=CASES.keys())


@pytest.mark.parametrize("working_set", [None, 1], ids=["whole", "one image a time"])
@cases
def test_float64_equals_the_formula(
    arguments: Arguments, working_set: int | None, monkeypatch: pytest.MonkeyPatch, assert_close: Any
) -> None:
    if working_set:
        monkeypatch.setattr(tiles, "_WORKING_SET_CPU", working_set)
    assert_close(_run(arguments), _run(arguments, "reference"), EXACT)


@cases
def test_float32_stays_within_rounding(arguments: Arguments, assert_close: Any) -> None:
    narrow = {name: value.float() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    assert_close(_run(narrow), _run(_double(narrow), "reference"), FLOAT32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"additional": 2, "shared": 1}, {"dilation": 2}], ids=["", "shared", "dilated"]
)
def test_16_bit_inputs_lose_only_the_rounding_of_results(options: Arguments, dtype: torch.dtype) -> None:
    arguments = _inputs(20, 17, dim=16, dtype=dtype, **options)
    mine, expected = _run(arguments), _run(_double(arguments), "reference")
    assert {name: value.dtype for name, value in mine.items() if value.dtype != dtype} == {
        "lse": torch.float32,
        "rpb": torch.float32,
    }
    for name, value in expected.items():
        assert (mine[name].double() - value).norm() <= HALF[dtype] * value.norm(), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"additional": 2, "heads": 4, "shared": 2, "values": 3},
        {"dilation": (2, 1), "is_causal": (False, True)},
        {"kernel_size": (2, 3), "stride": (2, 3), "bias": False},
    ],
    ids=["bias", "shared heads", "dilated causal", "stride"],
)
def test_gradcheck(options: Arguments) -> None:
    arguments = _inputs(6, 5, batch=1, dim=2, **options)
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    leaves = [arguments.pop(name).requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda *xs: _attend(arguments | dict(zip(names, xs, strict=True))), leaves)


def test_second_derivative_is_refused() -> None:
    arguments = _inputs()
    q = arguments["q"].requires_grad_()
    (grad,) = torch.autograd.grad(_attend(arguments)[0].sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


# Exact special cases ---------------------------------------------------------------------------------------------


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own attention of tokens (B, N, heads, D)."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _assert_special(arguments: Arguments, expected: Tensor) -> None:
    """The tiles and PyTorch's attention, which is chosen."""
    assert ops.explain(na2d, **arguments).chosen == "sdpa"
    for backend in ("torch", "sdpa"):
        with ops.use_backend(backend):
            torch.testing.assert_close(na2d(**arguments), expected, rtol=EXACT, atol=EXACT)


def test_window_that_covers_the_map_is_full_attention() -> None:
    arguments = _inputs(7, 9, kernel_size=(7, 9), bias=False)
    tensors = [arguments[name] for name in "qkv"]
    _assert_special(arguments, _dense(*(x.flatten(1, 2) for x in tensors)).unflatten(1, (7, 9)))
    ((_, tile),) = tiles.parts(_prepare(arguments))
    assert tile.key_size == (7, 9)


def test_window_as_wide_as_its_group_is_grid_attention() -> None:
    arguments = _inputs(6, 12, kernel_size=3, dilation=(2, 4), bias=False)
    grids = [arguments[name].unflatten(2, (3, 4)).unflatten(1, (3, 2)) for name in "qkv"]  # (B, 3, 2, 3, 4, heads, D)
    grids = [x.permute(0, 2, 4, 1, 3, 5, 6).flatten(3, 4).flatten(0, 2) for x in grids]
    expected = _dense(*grids).unflatten(0, (2, 2, 4)).unflatten(3, (3, 3)).permute(0, 3, 1, 4, 2, 5, 6)
    _assert_special(arguments, expected.flatten(3, 4).flatten(1, 2))


def test_stride_of_the_kernel_is_window_attention_without_waste() -> None:
    arguments = _inputs(14, 21, kernel_size=7, stride=7, bias=False)
    windows = [arguments[name].unflatten(2, (3, 7)).unflatten(1, (2, 7)).transpose(2, 3) for name in "qkv"]
    expected = _dense(*(x.flatten(3, 4).flatten(0, 2) for x in windows)).unflatten(0, (2, 2, 3)).unflatten(3, (7, 7))
    _assert_special(arguments, expected.transpose(2, 3).flatten(3, 4).flatten(1, 2))
    assert {tile.key_size for _, tile in tiles.parts(_prepare(arguments))} == {(7, 7)}


SPECIAL: dict[str, Arguments] = {
    "full": _inputs(5, 7, kernel_size=(5, 7)),
    "grid": _inputs(6, 12, kernel_size=3, dilation=(2, 4), heads=4, shared=2),
    "windows": _inputs(6, 12, kernel_size=3, stride=3),
    "dilated windows": _inputs(12, 10, kernel_size=(3, 5), stride=(3, 1), dilation=2, heads=4, shared=1),
    "sequence": _inputs(12, kernel_size=4, dilation=3),
    "volume": _inputs(4, 6, 3, kernel_size=(2, 3, 3), dilation=(1, 2, 1), stride=(2, 1, 1)),
    "one pixel": _inputs(1, 1, kernel_size=1),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("arguments", SPECIAL.values(), ids=SPECIAL.keys())
def test_special_cases_equal_the_formula(arguments: Arguments, bias: bool, assert_close: Any) -> None:
    if not bias:
        arguments = {name: value for name, value in arguments.items() if name != "rpb"}
    assert_close(_run(arguments, "sdpa"), _run(arguments, "reference"), EXACT)
    # without a gradient of lse, too
    leaves = {name: arguments[name].clone().requires_grad_() for name in "qkv"}
    cotangent, grads = _normal(9, *arguments["q"].shape), []
    for backend in ("sdpa", "reference"):
        with ops.use_backend(backend):
            o, _ = _attend(arguments | leaves)
            grads.append(dict(zip(leaves, torch.autograd.grad(o, tuple(leaves.values()), cotangent), strict=True)))
    assert_close(*grads, EXACT)
    narrow = {name: value.float() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    assert_close(_run(narrow, "sdpa"), _run(_double(narrow), "reference"), FLOAT32)


def test_special_cases_have_the_strides_of_the_operator() -> None:
    call = _prepare(_inputs(5, 7, kernel_size=(5, 7), heads=1))
    torch.library.opcheck(OPERATOR, tuple(call), test_utils="test_faketensor")


# what explain says of a call that is none of them
NOT_SPECIAL: dict[str, tuple[Arguments, str]] = {
    "overlap": ({"kernel_size": 3}, "on axis 0 windows overlap: kernel_size 3 at stride 1 is neither the 6 tokens of"),
    "one axis": ({"kernel_size": (6, 3)}, "on axis 1 windows overlap"),
    "ragged": ({"kernel_size": (4, 3), "stride": (4, 3)}, "on axis 0 windows overlap: kernel_size 4 at stride 4"),
    "uneven": ({"kernel_size": 2, "dilation": (3, 5), "stride": 2}, "on axis 1 dilation 5 cuts 12 tokens into groups"),
    "causal": ({"kernel_size": (6, 12), "is_causal": (False, True)}, "axis 1 is causal"),
    "additional": ({"kernel_size": (6, 12), "additional": 1}, "additional keys are in no block"),
    "values": ({"kernel_size": (6, 12), "values": 3}, "must be alike, got 4 and 3 channels"),
    "16 bits": ({"kernel_size": (6, 12), "dtype": torch.bfloat16}, "rounds weights to 16 bits, got torch.bfloat16"),
}


@pytest.mark.parametrize(("options", "reason"), NOT_SPECIAL.values(), ids=NOT_SPECIAL.keys())
def test_explain_says_why_a_call_is_no_special_case(options: Arguments, reason: str) -> None:
    arguments = _inputs(6, 12, **options)
    explanation = ops.explain(na2d, **arguments)
    assert explanation.chosen == "torch"
    assert reason in explanation.passed_over["sdpa"]
    with ops.use_backend("sdpa"), pytest.raises(ValueError, match="no implementation can serve this call"):
        na2d(**arguments)


def test_no_copy_grows_with_the_map() -> None:
    """Keys of a tile: at most twice the kernel and a tile's own width, on a map of 200 x 336."""
    call = _prepare(_inputs(200, 336, batch=1, kernel_size=7, bias=False, dim=1, heads=1))
    found = [tile for _, tile in tiles.parts(call)]
    assert max(math.prod(tile.key_size) for tile in found) <= 15**2
    assert len({tile.pattern for tile in found}) <= 5**2


# Strides, sizes, dtypes ------------------------------------------------------------------------------------------


def test_any_strides(assert_close: Any) -> None:
    arguments = _inputs(9, 11, additional=2)
    strided = dict(arguments)
    for name in ("q", "k", "v", "rpb", "additional_keys"):
        value = arguments[name]
        strided[name] = torch.stack([value, value.new_full(value.shape, torch.nan)], dim=-1)[..., 0]
    strided["k"] = arguments["k"].permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    assert_close(_run(strided), _run(arguments), EXACT)


@pytest.mark.parametrize(("backend", "options"), [("torch", {"additional": 1}), ("sdpa", {"kernel_size": (5, 6)})])
def test_empty_batch(backend: str, options: Arguments) -> None:
    mine = _run(_inputs(5, 6, batch=0, **options), backend)
    assert mine["o"].shape == (0, 5, 6, 2, 4)
    assert mine["lse"].shape == (0, 5, 6, 2)
    assert not mine["rpb"].any()


@pytest.mark.parametrize("kernel_size", [3, (5, 6)], ids=["windows", "whole map"])
def test_no_additional_keys_at_all(kernel_size: Any) -> None:
    """Their number may be a variable of the program; gradients are as empty as they are."""
    arguments = _inputs(5, 6, kernel_size=kernel_size)
    none = {name: arguments["q"].new_empty(2, 0, 2, 4) for name in ("additional_keys", "additional_values")}
    leaves = {name: value.requires_grad_() for name, value in (arguments | none).items() if isinstance(value, Tensor)}
    o, _ = _attend(arguments | none)
    torch.testing.assert_close(o, _attend(arguments)[0], rtol=EXACT, atol=EXACT)
    grads = dict(zip(leaves, torch.autograd.grad(o.sum(), tuple(leaves.values())), strict=True))
    assert all(grads[name].shape == value.shape for name, value in leaves.items())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_decides_the_dtype(dtype: torch.dtype) -> None:
    arguments = _inputs(dtype=torch.float32, additional=1) | {"v": _normal(3, 2, 7, 9, 2, 4).to(dtype)}
    with torch.autocast("cpu", dtype):
        o = na2d(**arguments)
        assert na2d(**_inputs()).dtype == torch.float64
    rounded = {
        name: value.to(dtype) if isinstance(value, Tensor) and name != "rpb" else value
        for name, value in arguments.items()
    }
    assert o.dtype == dtype
    assert torch.equal(o, na2d(**rounded))


def test_keeps_inputs_and_results_only() -> None:
    arguments = _inputs(20, 20)
    saved: list[Tensor] = []
    leaves = {name: arguments[name].requires_grad_() for name in ("q", "k", "v", "rpb")}
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        o, lse = _attend(arguments)
    given = {value.data_ptr() for value in leaves.values()}
    assert sum(value.numel() for value in saved if value.data_ptr() not in given) <= o.numel() + lse.numel()


# The operator ----------------------------------------------------------------------------------------------------

OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"bias": False, "dilation": 2, "is_causal": (True, False)}, {"additional": 2, "shared": 1, "values": 3}],
    ids=["bias", "causal", "additional"],
)


@OPTIONS
def test_opcheck(options: Arguments) -> None:
    arguments = _inputs(6, 7, batch=1, **options)
    for value in arguments.values():
        if isinstance(value, Tensor):
            value.requires_grad_()
    call = _prepare(arguments)
    torch.library.opcheck(OPERATOR, tuple(call))
    call = call._replace(**{name: value.detach() for name, value in call._asdict().items() if torch.is_tensor(value)})
    o, lse = OPERATOR(*call)
    torch.library.opcheck(BACKWARD, (torch.ones_like(o), torch.ones_like(lse), o, lse, *call))


@OPTIONS
def test_fake_and_meta_tensors_have_the_real_shapes(options: Arguments, assert_shapes_without_data: Any) -> None:
    call = _prepare(_inputs(**options, dtype=torch.bfloat16))
    assert_shapes_without_data(OPERATOR, call)


def test_compiles_in_one_graph_for_every_size(assert_compiles: Any) -> None:
    inputs = (_inputs(*size) for size in ((6, 7), (9, 15), (12, 8)))
    assert_compiles(_run_plain, *({name: found[name] for name in ("q", "k", "v", "rpb")} for found in inputs))


def _run_plain(tensors: dict[str, Tensor]) -> Tensor:
    o = na2d(**tensors, kernel_size=3, dilation=2)
    assert isinstance(o, Tensor)
    return o.sin()


def test_flop_counts() -> None:
    arguments = _inputs(7, 9, kernel_size=(3, 5), values=6, additional=2, heads=4, shared=2)
    for name in ("q", "k", "v"):
        arguments[name].requires_grad_()
    with FlopCounterMode(display=False) as forward:
        o, _ = _attend(arguments)
    with FlopCounterMode(display=False) as backward:
        o.sum().backward()
    # 15 keys of the window and 2 more for each of 63 queries in 4 heads of 2 images
    pairs = 2 * 63 * 4 * (15 + 2)
    assert forward.get_total_flops() == 2 * pairs * (4 + 6)
    assert backward.get_total_flops() == 2 * pairs * (3 * 4 + 2 * 6)


@pytest.mark.parametrize("size", [(7,), (7, 9), (5, 4, 6)], ids=str)
def test_explain_and_the_reference(size: tuple[int, ...]) -> None:
    arguments, attend = _inputs(*size), OPS[len(size)]
    explanation = ops.explain(attend, **arguments, return_lse=True)
    assert explanation.chosen == "torch"
    assert "triton" in explanation.passed_over["triton"]
    o, _ = _attend(arguments | {"q": arguments["q"].requires_grad_()})
    with ops.use_backend("reference"), pytest.raises(ValueError, match="the reference is not an operator"):
        o.sum().backward()
    with ops.use_backend("triton"), pytest.raises(ValueError, match=f"na{len(size)}d: no implementation.*triton"):
        attend(**arguments)


@OPTIONS
def test_export_form_equals_the_operator(options: Arguments) -> None:
    call = _prepare(_inputs(**options))
    for mine, expected in zip(export_form(*call), OPERATOR(*call), strict=True):
        assert mine.shape == expected.shape and mine.stride() == expected.stride()
        torch.testing.assert_close(mine, expected, rtol=EXACT, atol=EXACT)


def test_exported_program_at_sizes_that_were_not_traced(assert_exports: Any) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return na2d(q, k, v, 3, 2, rpb=table)

    def maps(batch: int, height: int, width: int) -> tuple[Tensor, ...]:
        return tuple(_inputs(height, width, batch=batch)[name] for name in ("q", "k", "v"))

    table = _inputs()["rpb"]
    assert_exports(attend, {OPERATOR: export_form}, maps, (2, 9, 12), (3, 6, 21), (1, 17, 8))


# Bad input -------------------------------------------------------------------------------------------------------

# name: (what to change in good arguments, exception, fragments of the message)
BAD: dict[str, tuple[Any, ...]] = {
    "q_list": (lambda a: {"q": a["q"].tolist()}, TypeError, ("q must be a tensor", "list")),
    "bias_number": (lambda _: {"rpb": 1.0}, TypeError, ("rpb must be a tensor", "float")),
    "q_rank": (lambda a: {"q": a["q"][0]}, ValueError, ("q must be (B, H, W, heads, channels)", "(7, 9, 2, 4)")),
    "k_map": (lambda a: {"k": a["k"][:, :6]}, ValueError, ("k must have shape (B, H, W, G, D)", "(2, 6, 9, 2, 4)")),
    "k_channels": (lambda a: {"k": a["k"][..., :2]}, ValueError, ("k must have shape", "(2, 7, 9, 2, 2)")),
    "v_heads": (lambda a: {"v": a["v"][..., :1, :]}, ValueError, ("v must have shape (B, H, W, G, E)",)),
    "heads": (
        lambda a: {name: torch.cat([a[name], a[name][..., :1, :]], dim=-2) for name in ("k", "v")},
        ValueError,
        ("the heads of k and v must divide those of q", "3 and 2"),
    ),
    "no_columns": (lambda a: {"q": a["q"][:, :, :0]}, ValueError, ("q must not be empty", "(2, 7, 0, 2, 4)")),
    "dtype": (lambda a: {"q": a["q"].long()}, TypeError, ("q must be of dtype float32", "got int64")),
    "mixed": (lambda a: {"v": a["v"].float()}, TypeError, ("v must be of dtype float64", "got float32")),
    "device": (lambda a: {"k": a["k"].to("meta")}, ValueError, ("k is on meta, expected cpu",)),
    "one_additional": (lambda a: {"additional_keys": a["k"][:, 0]}, ValueError, ("go together",)),
    "additional_shape": (
        lambda a: {"additional_keys": a["k"][:, 0], "additional_values": a["v"][:, 0, :4]},
        ValueError,
        ("additional_values must have shape (B, M, G, E) = (2, 9, 2, 4)", "(2, 4, 2, 4)"),
    ),
    "bias_shape": (
        lambda a: {"rpb": a["rpb"][..., :3]},
        ValueError,
        ("rpb must have shape (heads, 2 K - 1 an axis) = (2, 5, 5)", "(2, 5, 3)"),
    ),
    "kernel_0": (lambda _: {"kernel_size": 0}, ValueError, ("kernel_size must be a positive integer", "got 0")),
    "kernel_axes": (lambda _: {"kernel_size": (3, 3, 3)}, ValueError, ("kernel_size", "or 2 of them", "(3, 3, 3)")),
    "dilation": (lambda _: {"dilation": (1, -2)}, ValueError, ("dilation must be a positive", "(1, -2)")),
    "window": (
        lambda _: {"kernel_size": 3, "dilation": (2, 4)},
        ValueError,
        ("on axis 1 kernel_size * dilation must be at most the map's 9, got 3 * 4 = 12",),
    ),
    "stride": (lambda _: {"stride": (1, 4)}, ValueError, ("on axis 1 stride must be at most kernel_size 3, got 4",)),
    # NATTEN's causality is in the place of the stride
    "stride_bool": (lambda _: {"stride": True}, ValueError, ("stride must be a positive integer or 2", "got True")),
    "dilation_bool": (lambda _: {"dilation": (1, False)}, ValueError, ("dilation must be a positive", "(1, False)")),
    "causal": (lambda _: {"is_causal": (True,)}, ValueError, ("is_causal must be a bool or 2 of them", "(True,)")),
    "scale": (lambda _: {"scale": float("nan")}, ValueError, ("scale must be finite, got nan",)),
    "unknown": (lambda _: {"bias": None}, TypeError, ("na2d: unknown option 'bias'", "'rpb'")),
    "scale_text": (lambda _: {"scale": "a"}, TypeError, ("scale must be a number, got 'a'",)),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_bad_input(bad: tuple[Any, ...], assert_refuses: Any) -> None:
    assert_refuses(na2d, _inputs(7, 9), *bad)

"""Window attention: the PyTorch path and the operator against the formula; recorded cases are in tests/parity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

from subquad import ops
from subquad.ops import na2d, window_attention, window_attention_packed
from subquad.ops.window_attention import prepare
from subquad.ops.window_attention.export_form import export_form

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Arguments = dict[str, Any]
OPERATOR = torch.ops.subquad.window_attention.default
BACKWARD = torch.ops.subquad.window_attention_backward.default

EXACT = 1e-12
"""Of the largest value (at least 1): in float64 only the order of operations differs."""

FLOAT32 = 2e-6
"""Likewise; the formula itself in float32 is off by up to 6e-7."""

HALF = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Relative L2 error of 16-bit results: inputs are exact in 16 bits, the output, also a part of gradients, is not."""


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _inputs(
    height: int = 7,
    width: int = 10,
    *,
    window: Any = 4,
    batch: int = 2,
    heads: int = 2,
    dim: int = 4,
    values: int | None = None,
    bias: bool = True,
    pad: bool = True,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Arguments:
    """Arguments for a map; the table stays in float32 with 16-bit activations."""
    values = values or dim
    arguments: Arguments = {
        "q": _normal(1, batch, height, width, heads, dim),
        "k": _normal(2, batch, height, width, heads, dim),
        "v": _normal(3, batch, height, width, heads, values),
    }
    if pad:
        arguments |= {"pad_k": _normal(4, heads, dim), "pad_v": _normal(5, heads, values)}
    arguments = {name: value.to(dtype) for name, value in arguments.items()}
    if bias:
        h, w = (window, window) if isinstance(window, int) else window
        table = _normal(6, (2 * h - 1) * (2 * w - 1), heads)
        arguments["table"] = table.to(torch.promote_types(dtype, torch.float32))
    return arguments | {"window": window} | options


def _run(arguments: Arguments, backend: str = "torch") -> dict[str, Tensor]:
    """Output and, by name, the gradient of every tensor; the cotangent depends on shapes only."""
    leaves = {name: value.detach().requires_grad_() for name, value in arguments.items() if isinstance(value, Tensor)}
    with ops.use_backend(backend):
        o = window_attention(**(arguments | leaves))
        cotangent = _normal(7, *o.shape).to(o.dtype)
        grads = torch.autograd.grad(o, tuple(leaves.values()), cotangent)
    return {"o": o.detach(), **dict(zip(leaves, grads, strict=True))}


def _double(arguments: Arguments) -> Arguments:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in arguments.items()}


CASES: dict[str, Arguments] = {
    "ragged": _inputs(),
    "shifted": _inputs(8, 12, shift=2),
    "shifted_ragged": _inputs(13, 11, shift=(1, 3)),
    "shifted_ragged_pad_first": _inputs(13, 11, shift=(1, 3), order="pad_roll"),
    "one_axis": _inputs(9, 5, window=(3, 5), shift=(2, 0), order="pad_roll", values=3),
    "hidden_padding": _inputs(13, 11, pad=False, hide_padding=True, shift=2),
    "hidden_padding_pad_first": _inputs(13, 11, pad=False, hide_padding=True, shift=2, order="pad_roll"),
    "minus_infinity": _inputs(13, 11, shift=2, order="pad_roll", mask_value=-torch.inf),
    "zero_padding": _inputs(5, 6, pad=False, shift=(3, 1)),
    "larger_than_the_map": _inputs(2, 3, window=(5, 6), shift=(3, 4), batch=1),
    "larger_than_the_map_pad_first": _inputs(2, 3, window=(5, 6), shift=(3, 4), batch=1, order="pad_roll"),
    "grid": _inputs(6, 8, window=(3, 2), grid=True, index="k-q"),
    "no_bias": _inputs(6, 7, bias=False, window=(1, 3)),
    "one_row": _inputs(1, 9, shift=(0, 1), heads=1, dim=1),
    "one_pixel": _inputs(1, 1, window=1),
    "scale": _inputs(scale=0.0),
    "shift_of_a_large_map": _inputs(9, 6, shift=2, order="pad_roll", drop_shift="map"),
    "shift_of_a_small_map": _inputs(4, 9, shift=2, order="pad_roll", drop_shift="map"),
    "shift_of_an_axis": _inputs(9, 3, shift=2, drop_shift="axis"),
}
cases = pytest.mark.parametrize("arguments", CASES.values(), ids=CASES.keys())


@pytest.mark.parametrize("working_set", [None, 1], ids=["whole", "one row of windows a time"])
@cases
def test_float64_equals_the_formula(
    arguments: Arguments, working_set: int | None, monkeypatch: pytest.MonkeyPatch, assert_close: Any
) -> None:
    from subquad.ops.window_attention import torch_impl

    if working_set:
        monkeypatch.setattr(torch_impl, "_WORKING_SET_CPU", working_set)
    assert_close(_run(arguments), _run(arguments, "reference"), EXACT)


@cases
def test_float32_stays_within_rounding(arguments: Arguments, assert_close: Any) -> None:
    narrow = {name: value.float() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    assert_close(_run(narrow), _run(_double(narrow), "reference"), FLOAT32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_16_bit_inputs_lose_only_the_rounding_of_results(dtype: torch.dtype) -> None:
    arguments = _inputs(13, 11, dim=16, shift=2, dtype=dtype)
    mine, expected = _run(arguments), _run(_double(arguments), "reference")
    assert {name for name, value in mine.items() if value.dtype != dtype} == {"table"}
    for name, value in expected.items():
        assert (mine[name].double() - value).norm() <= HALF[dtype] * value.norm(), name


@pytest.mark.parametrize(
    "options",
    [{"shift": (1, 2)}, {"order": "pad_roll", "shift": 1, "values": 3}, {"pad": False, "hide_padding": True}],
    ids=["timm", "torchvision", "hidden padding"],
)
def test_gradcheck(options: Arguments) -> None:
    arguments = _inputs(5, 4, window=3, batch=1, dim=2, **options)
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    leaves = [arguments.pop(name).requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *xs: window_attention(**arguments, **dict(zip(names, xs, strict=True))), leaves
    )


def test_second_derivative_is_refused() -> None:
    arguments = _inputs()
    q = arguments["q"].requires_grad_()
    (grad,) = torch.autograd.grad(window_attention(**arguments).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


# Properties ------------------------------------------------------------------------------------------------------


def test_windows_are_neighborhoods_with_a_stride_of_the_window() -> None:
    arguments = _inputs(8, 12, pad=False, index="k-q")
    rpb = arguments["table"].mT.unflatten(1, (7, 7))
    expected = na2d(arguments["q"], arguments["k"], arguments["v"], 4, 1, 4, rpb=rpb)
    torch.testing.assert_close(window_attention(**arguments), expected, rtol=EXACT, atol=EXACT)


def test_grids_are_neighborhoods_as_wide_as_their_dilation_group() -> None:
    arguments = _inputs(8, 12, pad=False, bias=False, grid=True)
    expected = na2d(arguments["q"], arguments["k"], arguments["v"], 4, (2, 3))
    torch.testing.assert_close(window_attention(**arguments), expected, rtol=EXACT, atol=EXACT)


def test_order_matters_on_ragged_maps_only() -> None:
    for size, differs in (((8, 12), False), ((9, 11), True)):
        arguments = _inputs(*size, shift=2)
        first, second = (window_attention(**arguments, order=order) for order in ("roll_pad", "pad_roll"))
        assert torch.allclose(first, second, rtol=EXACT, atol=EXACT) != differs


@pytest.mark.parametrize(
    ("size", "axis", "whole"),
    [((5, 9), (2, 1), (2, 1)), ((4, 9), (0, 1), (0, 0)), ((9, 3), (2, 0), (0, 0)), ((1, 4), (0, 0), (0, 0))],
    ids=str,
)
def test_maps_of_one_window_lose_shifts(
    size: tuple[int, int], axis: tuple[int, int], whole: tuple[int, int], assert_close: Any
) -> None:
    for drop, expected in (("never", (2, 1)), ("axis", axis), ("map", whole)):
        for backend in ("torch", "reference"):
            mine = _run(_inputs(*size, shift=(2, 1), order="pad_roll", drop_shift=drop), backend)
            assert_close(mine, _run(_inputs(*size, shift=expected, order="pad_roll")), EXACT)


def test_packed_projection() -> None:
    arguments = _inputs(9, 11, shift=2)
    qkv = torch.stack([arguments.pop(name) for name in ("q", "k", "v")], dim=3).requires_grad_()
    table = arguments["table"].requires_grad_()
    results = []
    for attend in (window_attention_packed, lambda qkv, **rest: window_attention(*qkv.unbind(3), **rest)):
        o = attend(qkv, **arguments)
        results.append((o, *torch.autograd.grad(o, (qkv, table), _normal(7, *o.shape))))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=EXACT, atol=EXACT)
    with ops.use_backend("reference"):
        torch.testing.assert_close(window_attention_packed(qkv, **arguments), results[0][0], rtol=EXACT, atol=EXACT)
    with pytest.raises(ValueError, match=r"window_attention: qkv must be \(B, H, W, 3, heads, D\), got shape \(2, 9"):
        window_attention_packed(qkv.transpose(3, 4), **arguments)


def test_strides_do_not_matter(assert_close: Any) -> None:
    arguments = _inputs(9, 11, shift=1)
    strided = dict(arguments)
    for name in ("q", "k", "v", "table", "pad_k"):
        value = arguments[name]
        strided[name] = torch.stack([value, value.new_full(value.shape, torch.nan)], dim=-1)[..., 0]
    strided["v"] = arguments["v"].permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    assert_close(_run(strided), _run(arguments), EXACT)


def test_empty_batch() -> None:
    mine = _run(_inputs(5, 6, batch=0))
    assert mine["o"].shape == (0, 5, 6, 2, 4)
    assert not mine["table"].any() and not mine["pad_k"].any()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_decides_the_dtype(dtype: torch.dtype) -> None:
    arguments = _inputs(dtype=torch.float32) | {"v": _normal(3, 2, 7, 10, 2, 4).to(dtype)}
    qkv = torch.stack([arguments["q"]] * 3, dim=3)
    rest = {name: value for name, value in arguments.items() if name not in ("q", "k", "v")}
    with torch.autocast("cpu", dtype):
        o = window_attention(**arguments)
        assert window_attention_packed(qkv, **rest).dtype == dtype
        assert window_attention(**_inputs()).dtype == torch.float64
    rounded = {
        name: value.to(dtype) if isinstance(value, Tensor) and name != "table" else value
        for name, value in arguments.items()
    }
    assert o.dtype == dtype
    assert torch.equal(o, window_attention(**rounded))


def test_keeps_inputs_output_and_a_number_a_head() -> None:
    arguments = _inputs(20, 20)
    saved: list[Tensor] = []
    leaves = {name: value.requires_grad_() for name, value in arguments.items() if isinstance(value, Tensor)}
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        o = window_attention(**arguments)
    given = {value.data_ptr() for value in leaves.values()}
    assert sum(value.numel() for value in saved if value.data_ptr() not in given) == o.numel() + o[..., 0].numel()


# The operator ----------------------------------------------------------------------------------------------------

OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {"shift": 2},
        {"bias": False, "pad": False, "order": "pad_roll"},
        {"packed": True},
        {"shift": 2, "window": (3, 6), "drop_shift": "axis"},
    ],
    ids=["shifted", "plain", "packed", "dropped"],
)


def _call(packed: bool = False, **options: Any) -> Any:
    call = prepare(**_inputs(5, 6, batch=1, **options))
    if packed:
        call = call._replace(q=torch.stack(call.parts, dim=3), k=None, v=None)
    return call


@OPTIONS
def test_opcheck(options: Arguments) -> None:
    call = _call(**options)
    inputs = [value.requires_grad_() if isinstance(value, Tensor) else value for value in call]
    torch.library.opcheck(OPERATOR, tuple(inputs))
    call = call._replace(**{name: value.detach() for name, value in call._asdict().items() if torch.is_tensor(value)})
    o, lse = OPERATOR(*call)
    torch.library.opcheck(BACKWARD, (torch.ones_like(o), o, lse, *call))


@OPTIONS
def test_fake_and_meta_tensors_have_the_real_shapes(options: Arguments, assert_shapes_without_data: Any) -> None:
    call = _call(**options, dtype=torch.bfloat16)
    assert_shapes_without_data(OPERATOR, call)


def test_compiles_in_one_graph_for_every_size(assert_compiles: Any) -> None:
    inputs = (_inputs(*size) for size in ((6, 7), (9, 15), (12, 8)))
    assert_compiles(_run_plain, *({name: x for name, x in found.items() if name != "window"} for found in inputs))


def _run_plain(tensors: dict[str, Tensor]) -> Tensor:
    return window_attention(**tensors, window=4, shift=2).sin()


def test_flop_counts() -> None:
    arguments = _inputs(7, 9, window=(3, 4), values=6)
    for name in ("q", "k", "v"):
        arguments[name].requires_grad_()
    with FlopCounterMode(display=False) as forward:
        o = window_attention(**arguments)
    with FlopCounterMode(display=False) as backward:
        o.sum().backward()
    pairs = 2 * 63 * 2 * 12  # keys of a window for each of 63 queries in 2 heads of 2 images
    assert forward.get_total_flops() == 2 * pairs * (4 + 6)
    assert backward.get_total_flops() == 2 * pairs * (3 * 4 + 2 * 6)


def test_explain_and_the_reference() -> None:
    arguments = _inputs()
    assert ops.explain(window_attention, **arguments).chosen == "torch"
    o = window_attention(**(arguments | {"q": arguments["q"].requires_grad_()}))
    with ops.use_backend("reference"), pytest.raises(ValueError, match="the reference is not an operator"):
        o.sum().backward()


@OPTIONS
def test_export_form_equals_the_operator(options: Arguments) -> None:
    call = _call(**options)
    for mine, expected in zip(export_form(*call), OPERATOR(*call), strict=True):
        assert mine.shape == expected.shape and mine.stride() == expected.stride()
        torch.testing.assert_close(mine, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("order", ["roll_pad", "pad_roll"])
def test_exported_program_at_sizes_that_were_not_traced(order: str, assert_exports: Any) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window_attention(q, k, v, 4, 2, table=table, order=order)

    table = _inputs()["table"]
    assert_exports(attend, {OPERATOR: export_form}, _maps, (2, 9, 12), (3, 6, 21), (1, 17, 8))


@pytest.mark.parametrize("drop", ["axis", "map"])
def test_exported_program_drops_the_shifts_of_the_map_at_hand(drop: str, assert_exports: Any) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window_attention(q, k, v, 4, (2, 1), table=table, order="pad_roll", drop_shift=drop)

    table, sizes = _inputs()["table"], ((3, 6, 21), (1, 3, 9), (2, 5, 4), (1, 2, 3))
    assert_exports(attend, {OPERATOR: export_form}, _maps, (2, 9, 12), *sizes, guards=False)


@pytest.mark.parametrize("order", ["roll_pad", "pad_roll"])
def test_onnx_rolls_by_the_map_at_hand(order: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason='ONNX needs pip install "subquad[export]"')

    class Attention(torch.nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return window_attention(q, q, q, 4, (2, 1), order=order, drop_shift="axis")

    (example, *_), axes = _maps(2, 9, 12), ({0: Dim.AUTO, 1: Dim.AUTO, 2: Dim.AUTO},)
    program = torch.export.export(Attention(), (example.float(),), dynamic_shapes=axes)
    written = torch.onnx.export(program.run_decompositions({OPERATOR: export_form}), dynamo=True, verbose=False)
    assert written is not None
    session = onnxruntime.InferenceSession(written.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for size in ((3, 6, 21), (1, 3, 9), (2, 5, 4)):
        q = _maps(*size)[0].float()
        (o,) = session.run(None, {session.get_inputs()[0].name: q.numpy()})
        torch.testing.assert_close(torch.from_numpy(o), Attention()(q), rtol=0, atol=1e-6 * q.abs().max().item())


def _maps(batch: int, height: int, width: int) -> tuple[Tensor, ...]:
    return tuple(_inputs(height, width, batch=batch)[name] for name in ("q", "k", "v"))


# Bad input -------------------------------------------------------------------------------------------------------

# name: (what to change in good arguments, exception, fragments of the message)
BAD: dict[str, tuple[Any, ...]] = {
    "q_list": (lambda a: {"q": a["q"].tolist()}, TypeError, ("q must be a tensor", "list")),
    "table_number": (lambda _: {"table": 1.0}, TypeError, ("table must be a tensor", "float")),
    "q_rank": (lambda a: {"q": a["q"][0]}, ValueError, ("q must be (B, H, W, heads, channels)", "(7, 10, 2, 4)")),
    "k_map": (
        lambda a: {"k": a["k"][:, :6]},
        ValueError,
        ("k must have shape (B, H, W, heads, D)", "(2, 6, 10, 2, 4)"),
    ),
    "v_heads": (lambda a: {"v": a["v"][..., :1, :]}, ValueError, ("v must have shape (B, H, W, heads, E)",)),
    "no_columns": (lambda a: {"q": a["q"][:, :, :0]}, ValueError, ("q must not be empty", "(2, 7, 0, 2, 4)")),
    "dtype": (lambda a: {"q": a["q"].long()}, TypeError, ("q must be of dtype float32", "got int64")),
    "mixed": (lambda a: {"pad_v": a["pad_v"].float()}, TypeError, ("pad_v must be of dtype float64", "got float32")),
    "device": (lambda a: {"k": a["k"].to("meta")}, ValueError, ("k is on meta, expected cpu",)),
    "table_shape": (
        lambda a: {"table": a["table"].mT},
        ValueError,
        ("table must have shape ((2 h - 1) (2 w - 1), heads) = (49, 2)", "(2, 49)"),
    ),
    "pad_shape": (lambda a: {"pad_k": a["pad_k"][:1]}, ValueError, ("pad_k must have shape (heads, D) = (2, 4)",)),
    "window_0": (lambda _: {"window": 0}, ValueError, ("window must be a positive integer", "got 0")),
    "window_float": (lambda _: {"window": 4.0}, ValueError, ("window must be a positive integer", "got 4.0")),
    "shift_bool": (lambda _: {"shift": True}, ValueError, ("shift must be an integer from 0 on", "got True")),
    "window_axes": (lambda _: {"window": (3, 3, 3)}, ValueError, ("window", "or two of them", "(3, 3, 3)")),
    "shift": (lambda _: {"shift": (1, 4)}, ValueError, ("on axis 1 shift must be below the window's 4, got 4",)),
    "negative_shift": (lambda _: {"shift": -1}, ValueError, ("shift must be an integer from 0 on", "-1")),
    "order": (lambda _: {"order": "pad"}, ValueError, ("unknown order 'pad'", "'roll_pad', 'pad_roll'")),
    "drop": (lambda _: {"drop_shift": "both"}, ValueError, ("unknown drop_shift 'both'", "'never', 'axis', 'map'")),
    "index": (lambda _: {"index": "kq"}, ValueError, ("unknown index 'kq'", "'q-k', 'k-q'")),
    "mask": (lambda _: {"mask_value": 1.0}, ValueError, ("mask_value must not be positive, got 1.0",)),
    "grid": (lambda _: {"grid": True}, ValueError, ("on axis 0 a grid of 4 must divide the map's 7",)),
    "grid_shift": (
        lambda _: {"grid": True, "window": (7, 5), "shift": (0, 1)},
        ValueError,
        ("on axis 1 a grid must have shift 0, got 1",),
    ),
    "hidden": (lambda _: {"hide_padding": True}, ValueError, ("hide_padding and pad_k or pad_v exclude each other",)),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_bad_input(bad: tuple[Any, ...], assert_refuses: Any) -> None:
    assert_refuses(window_attention, _inputs(7, 10), *bad)

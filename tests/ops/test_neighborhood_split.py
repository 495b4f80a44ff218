"""The split forms of neighborhood attention: slots, PyTorch path and operators; recorded cases are in tests/parity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from subquad import ops
from subquad.ops.neighborhood_attention.arguments import prepare_av, prepare_qk
from subquad.ops.neighborhood_attention.export_form import av_export_form, qk_export_form

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Arguments = dict[str, Any]

EXACT = 1e-12
"""Of the largest value (at least 1): in float64 only the order of operations differs."""

HALF = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Relative L2 error of 16-bit results: inputs are exact in 16 bits, the results are not."""


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _inputs(
    form: str,
    *size: int,
    kernel_size: Any = 3,
    batch: int = 2,
    heads: int = 4,
    shared: int = 4,
    dim: int = 3,
    bias: bool = True,
    additional: int = 0,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Arguments:
    """Arguments of ``na<axes>d_qk`` or ``na<axes>d_av`` for a map of ``size``, 7 x 9 by default."""
    size = size or (7, 9)
    kernels = [kernel_size] * len(size) if isinstance(kernel_size, int) else kernel_size
    slots = torch.Size(kernels).numel() + additional
    tensors = {
        "q" if form == "qk" else "attn": _normal(1, batch, *size, heads, dim if form == "qk" else slots),
        "k" if form == "qk" else "v": _normal(2, batch, *size, shared, dim),
    }
    if additional:
        tensors["additional_keys" if form == "qk" else "additional_values"] = _normal(3, batch, additional, shared, dim)
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    if form == "qk" and bias:
        tensors["rpb"] = _normal(4, heads, *(2 * kernel - 1 for kernel in kernels))
    return {**tensors, "kernel_size": kernel_size, **options}


def _op(form: str, arguments: Arguments) -> Callable[..., Tensor]:
    return getattr(ops, f"na{arguments['q' if form == 'qk' else 'attn'].dim() - 3}d_{form}")


def _tensors(arguments: Arguments) -> dict[str, Tensor]:
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


def _run(form: str, arguments: Arguments, backend: str = "torch") -> dict[str, Tensor]:
    """The result and, by name, the gradient of every tensor; the cotangent depends on shapes only."""
    leaves = {name: value.detach().requires_grad_() for name, value in _tensors(arguments).items()}
    with ops.use_backend(backend):
        out = _op(form, arguments)(**(arguments | leaves))
        grads = torch.autograd.grad(out, tuple(leaves.values()), _normal(7, *out.shape).to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def _assert_close(mine: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        empty = value.isinf()
        assert torch.equal(mine[name][empty], value[empty])  # slots that causality leaves empty
        size = value[~empty].abs().max().clamp(min=1).item()
        torch.testing.assert_close(mine[name][~empty], value[~empty], rtol=0, atol=EXACT * size)


forms = pytest.mark.parametrize("form", ["qk", "av"])

# Sizes of several tiles an axis, with a ragged last one.
CASES: dict[str, Arguments] = {
    "map": {"size": (23, 19), "kernel_size": (7, 5)},
    "no_bias": {"size": (17, 20), "bias": False},
    "dilated": {"size": (31, 26), "kernel_size": (3, 4), "dilation": (3, 5)},
    "stride_causal": {"size": (20, 15), "kernel_size": 4, "is_causal": (True, False), "stride": (3, 2)},
    "causal_dilated": {"size": (15, 13), "is_causal": True, "dilation": 2, "additional": 2},
    "shared_heads": {"size": (20, 9), "shared": 2, "additional": 3},
    "whole_map": {"size": (7, 9), "kernel_size": (7, 9)},
    "one_pixel": {"size": (1, 1), "kernel_size": 1},
    "sequence": {"size": (150,), "kernel_size": 8, "additional": 1},
    "volume": {"size": (5, 7, 6), "kernel_size": (3, 5, 2), "dilation": (1, 1, 3), "is_causal": (True, False, False)},
}


@forms
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_float64_equals_the_formula(form: str, case: Arguments) -> None:
    arguments = _inputs(form, *case["size"], **{name: value for name, value in case.items() if name != "size"})
    _assert_close(_run(form, arguments), _run(form, arguments, "reference"))


@forms
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_16_bit_inputs_lose_only_the_rounding_of_results(form: str, dtype: torch.dtype) -> None:
    arguments = _inputs(form, 20, 17, dim=16, shared=2, additional=2, dtype=dtype)
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    mine, expected = _run(form, arguments), _run(form, wide, "reference")
    assert {value.dtype for name, value in mine.items() if name != "rpb"} == {dtype}
    for name, value in expected.items():
        assert (mine[name].double() - value).norm() <= HALF[dtype] * value.norm(), name


@forms
@pytest.mark.parametrize(
    "options", [{"shared": 2}, {"shared": 1, "additional": 2, "dilation": (1, 2)}], ids=["", "shared"]
)
def test_gradcheck(form: str, options: Arguments) -> None:
    arguments = _inputs(form, 4, 6, batch=1, heads=2, dim=2, **options)
    tensors = _tensors(arguments)

    def call(*leaves: Tensor) -> Tensor:
        return _op(form, arguments)(**(arguments | dict(zip(tensors, leaves, strict=True))))

    assert torch.autograd.gradcheck(call, [value.requires_grad_() for value in tensors.values()])


def test_slots_are_in_the_order_of_the_map() -> None:
    """The formula itself: logits of one query, one key at a time."""
    arguments = _inputs("qk", 9, 10, dilation=2, additional=1)
    q, k, rpb = (arguments[name][..., :] for name in ("q", "k", "rpb"))
    logits = ops.na2d_qk(**arguments)
    # query: first key of its window on each axis, in its dilation group
    for (y, x), (top, left) in {(4, 5): (2, 3), (0, 9): (0, 5), (8, 0): (4, 0)}.items():
        for slot in range(9):
            key_y, key_x = top + 2 * (slot // 3), left + 2 * (slot % 3)
            bias = rpb[:, (key_y - y) // 2 + 2, (key_x - x) // 2 + 2]
            expected = (q[:, y, x] * k[:, key_y, key_x]).sum(-1) * 3**-0.5 + bias
            torch.testing.assert_close(logits[:, y, x, :, slot], expected, rtol=EXACT, atol=EXACT)
        expected = (q[:, y, x] * arguments["additional_keys"][:, 0]).sum(-1) * 3**-0.5
        torch.testing.assert_close(logits[:, y, x, :, 9], expected, rtol=EXACT, atol=EXACT)


def test_weights_of_empty_slots_do_not_count() -> None:
    """The first of a causal sequence sees itself alone, in the first of its slots."""
    arguments = _inputs("av", 6, is_causal=True)
    o = ops.na1d_av(**arguments)
    torch.testing.assert_close(o[:, 0], arguments["attn"][:, 0, :, :1] * arguments["v"][:, 0], rtol=EXACT, atol=EXACT)


@forms
def test_any_strides(form: str) -> None:
    arguments = _inputs(form, 9, 11, additional=2)
    strided = {
        name: value.transpose(0, -1).contiguous().transpose(0, -1) for name, value in _tensors(arguments).items()
    }
    _assert_close(_run(form, arguments | strided), _run(form, arguments))


@forms
def test_empty_batch(form: str) -> None:
    mine = _run(form, _inputs(form, 5, 6, batch=0, additional=1))
    assert mine["out"].shape == (0, 5, 6, 4, 10 if form == "qk" else 3)


def test_autocast_decides_the_dtype() -> None:
    values = _inputs("av", dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = ops.na2d_qk(**_inputs("qk", dtype=torch.float32))
        attn = logits.float().softmax(-1)
        o = ops.na2d_av(**(values | {"attn": attn}))
    assert (logits.dtype, attn.dtype, o.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    assert torch.equal(o, ops.na2d_av(**(values | {"attn": attn.bfloat16()})))


# The operators ---------------------------------------------------------------------------------------------------


def _operator(form: str, arguments: Arguments) -> tuple[Any, Any, tuple[Any, ...]]:
    """The operator, its backward one and its arguments."""
    call = (prepare_qk if form == "qk" else prepare_av)(2, **arguments)
    tensors = (call.q, call.k, call.rpb, call.additional_keys) if form == "qk" else (call.q, call.v, call[5])
    names = f"neighborhood_{form}", f"neighborhood_{form}_backward"
    forward, backward = (getattr(torch.ops.subquad, name).default for name in names)
    return forward, backward, (*tensors, *call[6 : 11 if form == "qk" else 10])


OPTIONS = pytest.mark.parametrize(
    "options", [{}, {"additional": 2, "shared": 1, "bias": False}], ids=["", "additional"]
)


@forms
@OPTIONS
def test_opcheck(form: str, options: Arguments) -> None:
    arguments = _inputs(form, 6, 7, batch=1, **options)
    forward, backward, args = _operator(form, arguments)
    out = forward(*args)
    torch.library.opcheck(backward, (torch.ones_like(out), *args))
    torch.library.opcheck(forward, [x.requires_grad_() if isinstance(x, Tensor) else x for x in args])


@forms
@OPTIONS
def test_fake_and_meta_tensors_have_the_real_shapes(
    form: str, options: Arguments, assert_shapes_without_data: Any
) -> None:
    forward, _, args = _operator(form, _inputs(form, **options, dtype=torch.bfloat16))
    assert_shapes_without_data(forward, args)


def _attend(tensors: dict[str, Tensor]) -> Tensor:
    """What the split forms are for: something between logits and sums."""
    logits = ops.na2d_qk(tensors["q"], tensors["k"], 3, 2, rpb=tensors["rpb"])
    return ops.na2d_av(logits.sigmoid(), tensors["k"], 3, 2)


def test_compiles_in_one_graph_for_every_size(assert_compiles: Any) -> None:
    assert_compiles(_attend, *(_tensors(_inputs("qk", *size)) for size in ((6, 7), (9, 15), (12, 8))))


def test_exported_program_at_sizes_that_were_not_traced(assert_exports: Any) -> None:
    def attend(q: Tensor, k: Tensor) -> Tensor:
        return _attend({"q": q, "k": k, "rpb": table})

    def maps(batch: int, height: int, width: int) -> tuple[Tensor, ...]:
        arguments = _inputs("qk", height, width, batch=batch)
        return arguments["q"], arguments["k"]

    table = _inputs("qk")["rpb"]
    operators = torch.ops.subquad
    forms = {operators.neighborhood_qk.default: qk_export_form, operators.neighborhood_av.default: av_export_form}
    assert_exports(attend, forms, maps, (2, 9, 12), (3, 6, 21), (1, 17, 8))


def test_keeps_inputs_only() -> None:
    leaves = {name: value.requires_grad_() for name, value in _tensors(_inputs("qk", 20, 20)).items()}
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        ops.na2d_qk(**leaves, kernel_size=3)
    assert set(saved) == {value.data_ptr() for value in leaves.values()}


@forms
def test_flop_counts(form: str) -> None:
    arguments = _inputs(form, 7, 9, kernel_size=(3, 5), additional=2, shared=2)
    leaves = {name: value.requires_grad_() for name, value in _tensors(arguments).items()}
    with FlopCounterMode(display=False) as forward:
        out = _op(form, arguments)(**(arguments | leaves))
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    # 3 channels of 15 keys of the window and 2 more for each of 63 queries in 4 heads of 2 images
    products = 2 * 63 * 4 * (15 + 2) * 3
    assert (forward.get_total_flops(), backward.get_total_flops()) == (2 * products, 4 * products)


@forms
@pytest.mark.parametrize("size", [(7,), (7, 9), (5, 4, 6)], ids=str)
def test_explain_and_the_reference(form: str, size: tuple[int, ...]) -> None:
    arguments = _inputs(form, *size)
    op = _op(form, arguments)
    explanation = ops.explain(op, **arguments)
    assert explanation.chosen == "torch"
    assert "a tensor on cpu" in explanation.passed_over["triton"]
    out = op(**{name: x.requires_grad_() if isinstance(x, Tensor) else x for name, x in arguments.items()})
    with ops.use_backend("reference"), pytest.raises(ValueError, match="the reference is not an operator"):
        out.sum().backward()
    with ops.use_backend("triton"), pytest.raises(ValueError, match=f"na{len(size)}d_{form}: no implementation"):
        op(**arguments)


# Bad input -------------------------------------------------------------------------------------------------------

# name: (form, what to change in good arguments, exception, fragments of the message)
BAD: dict[str, tuple[Any, ...]] = {
    "unknown": ("qk", lambda _: {"bias": None}, TypeError, ("na2d_qk: unknown option 'bias'", "'rpb'")),
    "q_list": ("qk", lambda a: {"q": a["q"].tolist()}, TypeError, ("q must be a tensor", "list")),
    "no_values": ("av", lambda a: {"v": None}, TypeError, ("v must be a tensor", "NoneType")),
    "k_map": ("qk", lambda a: {"k": a["k"][:, :6]}, ValueError, ("k must have shape (B, H, W, G, D)",)),
    "q_rank": ("qk", lambda a: {"q": a["q"][0]}, ValueError, ("q must be (B, H, W, heads, channels)",)),
    "heads": ("qk", lambda a: {"k": a["k"][..., :3, :]}, ValueError, ("must divide those of q, got 3 and 4",)),
    "slots": (
        "av",
        lambda a: {"attn": a["attn"][..., :8]},
        ValueError,
        ("attn must have shape (B, H, W, heads, K an axis + M) = (2, 7, 9, 4, 9)", "got (2, 7, 9, 4, 8)"),
    ),
    "slots_of_additional": (
        "av",
        lambda a: {"additional_values": a["v"][:, 0, :2]},
        ValueError,
        ("attn must have shape", "(2, 7, 9, 4, 11)"),
    ),
    "additional": (
        "qk",
        lambda a: {"additional_keys": a["k"][:, 0, ..., :2]},
        ValueError,
        ("additional_keys must have shape (B, M, G, D) = (2, 9, 4, 3)",),
    ),
    "bias": ("qk", lambda a: {"rpb": a["rpb"][:, 1:]}, ValueError, ("rpb must have shape", "(4, 5, 5)", "(4, 4, 5)")),
    "mixed": ("av", lambda a: {"v": a["v"].float()}, TypeError, ("v must be of dtype float64, got float32",)),
    "device": ("qk", lambda a: {"k": a["k"].to("meta")}, ValueError, ("k is on meta, expected cpu",)),
    "window": ("qk", lambda _: {"dilation": 3}, ValueError, ("on axis 0 kernel_size * dilation must be at most",)),
    "stride": ("av", lambda _: {"stride": 4}, ValueError, ("on axis 0 stride must be at most kernel_size 3, got 4",)),
    "causal": ("av", lambda _: {"is_causal": 1}, ValueError, ("is_causal must be a bool or 2 of them, got 1",)),
    "kernel": ("qk", lambda _: {"kernel_size": 2.5}, ValueError, ("kernel_size must be a positive integer", "2.5")),
}


@pytest.mark.parametrize(("form", "bad"), [(row[0], row[1:]) for row in BAD.values()], ids=BAD.keys())
def test_bad_input(form: str, bad: tuple[Any, ...], assert_refuses: Any) -> None:
    arguments = _inputs(form)
    assert_refuses(_op(form, arguments), arguments, *bad)

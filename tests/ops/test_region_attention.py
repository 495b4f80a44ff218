"""Region attention: the PyTorch path, the operator and the routing; recorded cases are in tests/parity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from subquad import ops
from subquad.ops import region_attention, route_regions, window_attention
from subquad.ops.region_attention import prepare, torch_impl
from subquad.ops.region_attention.export_form import export_form, routing_form

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Arguments = dict[str, Any]
OPERATOR = torch.ops.subquad.region_attention.default
BACKWARD = torch.ops.subquad.region_attention_backward.default
ROUTING = torch.ops.subquad.region_routing.default

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
    size: tuple[int, int] = (3, 4),
    keys: tuple[int, int] | None = None,
    kv_size: tuple[int, int] | None = None,
    batch: int = 2,
    heads: int = 2,
    shared: bool = True,
    topk: int = 3,
    dim: int = 4,
    values: int | None = None,
    weights: bool = False,
    pad: bool = False,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Arguments:
    """Arguments for a map; regions may repeat. Weights stay in float32 with 16-bit activations."""
    (high, wide), (tall, broad), values = keys or (height, width), kv_size or size, values or dim
    arguments: Arguments = {
        "q": _normal(1, batch, height, width, heads, dim),
        "k": _normal(2, batch, high, wide, heads, dim),
        "v": _normal(3, batch, high, wide, heads, values),
    }
    if pad:
        arguments |= {"pad_k": _normal(4, heads, dim), "pad_v": _normal(5, heads, values)}
    arguments = {name: value.to(dtype) for name, value in arguments.items()}
    shape = (batch, 1 if shared else heads, -(-height // size[0]) * -(-width // size[1]), topk)
    choices = -(-high // tall) * -(-wide // broad)
    arguments["regions"] = torch.randint(choices, shape, generator=torch.Generator().manual_seed(6))
    if weights:
        arguments["weights"] = _normal(7, *shape).to(torch.promote_types(dtype, torch.float32))
    return arguments | {"region_size": size, "kv_region_size": kv_size} | options


def _leaves(arguments: Arguments) -> dict[str, Tensor]:
    return {
        name: value.detach().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }


def _run(arguments: Arguments, backend: str = "torch") -> dict[str, Tensor]:
    """Output and, by name, the gradient of every tensor; the cotangent depends on shapes only."""
    leaves = _leaves(arguments)
    with ops.use_backend(backend):
        o = region_attention(**(arguments | leaves))
        grads = torch.autograd.grad(o, tuple(leaves.values()), _normal(8, *o.shape).to(o.dtype))
    return {"o": o.detach(), **dict(zip(leaves, grads, strict=True))}


def _convert(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    return {name: value.to(dtype) if name in _leaves(arguments) else value for name, value in arguments.items()}


CASES: dict[str, Arguments] = {
    "ragged": _inputs(),
    "a choice a head": _inputs(shared=False, values=3),
    "pooled keys": _inputs(8, 8, size=(4, 4), keys=(4, 6), kv_size=(2, 2), topk=1),
    "padding of its own": _inputs(pad=True, weights=True),
    "weights a head": _inputs(weights=True, shared=False, dim=3),
    "hidden padding": _inputs(hide_padding=True, weights=True),
    "one row": _inputs(1, 11, size=(1, 3), heads=1),
    "one pixel": _inputs(1, 1, size=(2, 2), topk=1, dim=1),
    "scale": _inputs(scale=0.0),
}
cases = pytest.mark.parametrize("arguments", CASES.values(), ids=CASES.keys())


@pytest.mark.parametrize("working_set", [None, 1, 1000], ids=["whole", "one region a time", "some regions"])
@cases
def test_float64_equals_the_formula(
    arguments: Arguments, working_set: int | None, monkeypatch: pytest.MonkeyPatch, assert_close: Any
) -> None:
    if working_set:
        monkeypatch.setattr(torch_impl, "_WORKING_SET_CPU", working_set)
    assert_close(_run(arguments), _run(arguments, "reference"), EXACT)


@cases
def test_float32_stays_within_rounding(arguments: Arguments, assert_close: Any) -> None:
    narrow = _convert(arguments, torch.float32)
    assert_close(_run(narrow), _run(_convert(narrow, torch.float64), "reference"), FLOAT32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_16_bit_inputs_lose_only_the_rounding_of_results(dtype: torch.dtype) -> None:
    arguments = _inputs(13, 11, dim=16, weights=True, dtype=dtype)
    mine, expected = _run(arguments), _run(_convert(arguments, torch.float64), "reference")
    assert {name for name, value in mine.items() if value.dtype != dtype} == {"weights"}
    for name, value in expected.items():
        assert (mine[name].double() - value).norm() <= HALF[dtype] * value.norm(), name


@pytest.mark.parametrize("options", [{"weights": True, "pad": True}, {"hide_padding": True}], ids=["pad", "hidden"])
def test_gradcheck(options: Arguments) -> None:
    arguments = _inputs(4, 5, size=(3, 2), batch=1, dim=2, topk=2, **options)
    leaves = _leaves(arguments)
    attend = lambda *xs: region_attention(**(arguments | dict(zip(leaves, xs, strict=True))))
    assert torch.autograd.gradcheck(attend, list(leaves.values()))


def test_second_derivative_is_refused() -> None:
    arguments = _inputs()
    q = arguments["q"].requires_grad_()
    (grad,) = torch.autograd.grad(region_attention(**arguments).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


# Properties ------------------------------------------------------------------------------------------------------


def test_all_regions_are_full_attention() -> None:
    arguments = _inputs(6, 8, size=(3, 4), topk=4)
    arguments["regions"] = torch.arange(4).expand(2, 1, 4, 4)
    tensors = (arguments[name].flatten(1, 2).transpose(1, 2) for name in "qkv")
    expected = F.scaled_dot_product_attention(*tensors).transpose(1, 2).unflatten(1, (6, 8))
    torch.testing.assert_close(region_attention(**arguments), expected, rtol=EXACT, atol=EXACT)


def test_every_region_to_itself_is_window_attention() -> None:
    arguments = _inputs(6, 10, size=(4, 4), topk=1)
    arguments["regions"] = torch.arange(6).view(1, 1, 6, 1).expand(2, -1, -1, -1)
    expected = window_attention(arguments["q"], arguments["k"], arguments["v"], 4)
    torch.testing.assert_close(region_attention(**arguments), expected, rtol=EXACT, atol=EXACT)


def test_routing_chooses_the_largest_products_of_means() -> None:
    q, k = _normal(1, 2, 5, 7, 2, 3), _normal(2, 2, 4, 4, 2, 3)
    mine = route_regions(q, k, 2, (2, 3), (2, 2))
    assert mine.shape == (2, 1, 9, 2) and mine.dtype == torch.int64
    means = [
        F.avg_pool2d(x.flatten(3).permute(0, 3, 1, 2), size, size, ceil_mode=True, count_include_pad=False).flatten(2)
        for x, size in ((q, (2, 3)), (k, (2, 2)))
    ]
    scores = means[0].mT @ means[1]
    expected = scores.argsort(dim=-1, descending=True)[..., :2]
    assert torch.equal(mine[:, 0].sort().values, expected.sort().values)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_routing_is_in_float32_under_autocast(dtype: torch.dtype) -> None:
    q, k = (_normal(seed, 2, 14, 14, 2, 8).to(dtype) for seed in (1, 2))
    with torch.autocast("cpu", dtype):
        mine = route_regions(q, k, 3, 2)
    assert torch.equal(mine.sort().values, route_regions(q.double(), k.double(), 3, 2).sort().values)


def test_no_keys_of_all_regions_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor beside the maps is a working set, not topk times the keys."""
    monkeypatch.setattr(torch_impl, "_WORKING_SET_CPU", 4096)
    arguments = _inputs(32, 32, size=(4, 4), topk=16, batch=1, heads=1)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    call = prepare(**arguments)
    with Watch():
        o, lse = torch_impl.forward(call)
        torch_impl.backward(call, o, o, lse)
    assert largest <= max(4096, call.k.numel())  # gathered at once, the keys would be 16 times as many


def test_strides_do_not_matter(assert_close: Any) -> None:
    arguments = _inputs(weights=True)
    strided = dict(arguments)
    for name in ("q", "k", "weights"):
        value = arguments[name]
        strided[name] = torch.stack([value, value.new_full(value.shape, torch.nan)], dim=-1)[..., 0]
    strided["v"] = arguments["v"].permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    strided["regions"] = arguments["regions"].int().mT.contiguous().mT
    assert_close(_run(strided), _run(arguments), EXACT)


def test_empty_batch() -> None:
    arguments = _inputs(weights=True, pad=True)
    empty = {
        name: value[:0] if name in ("q", "k", "v", "regions", "weights") else value for name, value in arguments.items()
    }
    mine = _run(empty)
    assert mine["o"].shape == (0, 7, 10, 2, 4)
    assert not mine["pad_k"].any()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_decides_the_dtype(dtype: torch.dtype) -> None:
    arguments = _inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        o = region_attention(**arguments)
        assert region_attention(**_inputs()).dtype == torch.float64
    assert o.dtype == dtype
    assert torch.equal(o, region_attention(**_convert(arguments, dtype)))


# The operator ----------------------------------------------------------------------------------------------------

OPTIONS = pytest.mark.parametrize(
    "options", [{}, {"weights": True, "pad": True}, {"hide_padding": True}], ids=["plain", "weights", "hidden"]
)


@OPTIONS
def test_opcheck(options: Arguments) -> None:
    arguments = _inputs(5, 6, batch=1, **options)
    call = prepare(**(arguments | _leaves(arguments)))
    torch.library.opcheck(OPERATOR, tuple(call))
    call = prepare(**arguments)
    o, lse = OPERATOR(*call)
    torch.library.opcheck(BACKWARD, (torch.ones_like(o), o, lse, *call))
    torch.library.opcheck(ROUTING, (call.q, call.k, [2, 2], [2, 3], 2))


@OPTIONS
def test_fake_and_meta_tensors_have_the_real_shapes(options: Arguments, assert_shapes_without_data: Any) -> None:
    call = prepare(**_inputs(**options, dtype=torch.bfloat16))
    assert_shapes_without_data(OPERATOR, call)
    assert_shapes_without_data(ROUTING, (call.q, call.k, [3, 4], [2, 2], 2))


def test_flop_counts() -> None:
    arguments = _inputs(7, 9, topk=2, values=6)
    for name in ("q", "k", "v"):
        arguments[name].requires_grad_()
    with FlopCounterMode(display=False) as forward:
        o = region_attention(**arguments)
    with FlopCounterMode(display=False) as backward:
        o.sum().backward()
    pairs = 2 * 63 * 2 * 24  # 2 regions of 12 keys for each of 63 queries in 2 heads of 2 images
    assert forward.get_total_flops() == 2 * pairs * (4 + 6)
    assert backward.get_total_flops() == 2 * pairs * (3 * 4 + 2 * 6)
    with FlopCounterMode(display=False) as routing:
        route_regions(arguments["q"], arguments["k"], 2, (3, 4))
    assert routing.get_total_flops() == 2 * 2 * 9 * 9 * 2 * 4


def test_explain_and_the_reference() -> None:
    arguments = _inputs()
    explanation = ops.explain(region_attention, **arguments)
    assert explanation.chosen == "torch" and "a tensor on cpu" in explanation.passed_over["triton"]
    o = region_attention(**(arguments | {"q": arguments["q"].requires_grad_()}))
    with ops.use_backend("reference"), pytest.raises(ValueError, match="the reference is not an operator"):
        o.sum().backward()


def _route(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As in a model: three regions a side, whatever the size."""
    size = [(q.shape[1] + 2) // 3, (q.shape[2] + 2) // 3]
    return region_attention(q, k, v, route_regions(q, k, 2, size), size)


def _maps(batch: int, height: int, width: int) -> tuple[Tensor, ...]:
    return tuple(_normal(seed, batch, height, width, 2, 4) for seed in range(3))


def test_compiles_in_one_graph_for_every_size(assert_compiles: Any) -> None:
    inputs = (dict(zip("qkv", _maps(2, *size), strict=True)) for size in ((6, 9), (9, 15), (12, 18)))
    assert_compiles(lambda maps: _route(**maps).sin(), *inputs)


@OPTIONS
def test_export_form_equals_the_operator(options: Arguments) -> None:
    call = prepare(**_inputs(**options))
    for mine, expected in zip(export_form(*call), OPERATOR(*call), strict=True):
        assert mine.shape == expected.shape and mine.stride() == expected.stride()
        torch.testing.assert_close(mine, expected, rtol=EXACT, atol=EXACT)
    assert torch.equal(routing_form(call.q, call.k, [3, 4], [2, 2], 2), ROUTING(call.q, call.k, [3, 4], [2, 2], 2))


def test_exported_program_at_sizes_that_were_not_traced(assert_exports: Any) -> None:
    forms = {OPERATOR: export_form, ROUTING: routing_form}
    assert_exports(_route, forms, _maps, (2, 9, 12), (3, 6, 21), (1, 18, 9))


# Bad input -------------------------------------------------------------------------------------------------------

# name: (what to change in good arguments, exception, fragments of the message)
BAD: dict[str, tuple[Any, ...]] = {
    "q_list": (lambda a: {"q": a["q"].tolist()}, TypeError, ("q must be a tensor", "list")),
    "q_rank": (lambda a: {"q": a["q"][0]}, ValueError, ("q must be (B, H, W, heads, channels)", "(7, 10, 2, 4)")),
    "k_heads": (lambda a: {"k": a["k"][..., :1, :]}, ValueError, ("k must have shape (B, H_k, W_k, heads, D)",)),
    "v_map": (
        lambda a: {"v": a["v"][:, :6]},
        ValueError,
        ("v must have shape (B, H_k, W_k, heads, E)", "(2, 6, 10, 2, 4)"),
    ),
    "no_columns": (lambda a: {"k": a["k"][:, :, :0]}, ValueError, ("k must not be empty", "(2, 7, 0, 2, 4)")),
    "dtype": (lambda a: {"q": a["q"].long()}, TypeError, ("q must be of dtype float32", "got int64")),
    "mixed": (lambda a: {"v": a["v"].float()}, TypeError, ("v must be of dtype float64", "got float32")),
    "device": (lambda a: {"k": a["k"].to("meta")}, ValueError, ("k is on meta, expected cpu",)),
    "regions_dtype": (
        lambda a: {"regions": a["regions"].float()},
        TypeError,
        ("regions must be of dtype int64, int32",),
    ),
    "regions_shape": (
        lambda a: {"regions": a["regions"][:, :, :8]},
        ValueError,
        ("regions must have shape (B, heads or 1, regions of queries, topk) = (2, 1, 9, 3)", "(2, 1, 8, 3)"),
    ),
    "regions_none": (lambda a: {"regions": a["regions"][..., :0]}, ValueError, ("at least one region",)),
    "regions_range": (lambda a: {"regions": a["regions"] + 8}, ValueError, ("regions must be 0 to 8", "to 16")),
    "weights_shape": (
        lambda a: {"weights": torch.ones(2, 1, 9, 2, dtype=torch.float64)},
        ValueError,
        ("weights must have shape", "(2, 1, 9, 3)"),
    ),
    "pad_shape": (lambda a: {"pad_k": a["k"][0, 0, 0, :1]}, ValueError, ("pad_k must have shape", "(2, 4)")),
    "size_0": (lambda _: {"region_size": 0}, ValueError, ("region_size must be a positive integer", "got 0")),
    "size_axes": (lambda _: {"kv_region_size": (3, 3, 3)}, ValueError, ("kv_region_size", "(3, 3, 3)")),
    "hidden": (
        lambda a: {"hide_padding": True, "pad_k": a["k"][0, 0, 0]},
        ValueError,
        ("hide_padding and pad_k or pad_v exclude each other",),
    ),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_bad_input(bad: tuple[Any, ...], assert_refuses: Any) -> None:
    assert_refuses(region_attention, _inputs(7, 10), *bad)


def test_routing_refuses_more_regions_than_there_are() -> None:
    q = torch.randn(1, 7, 10, 2, 4)
    with pytest.raises(ValueError, match="route_regions: topk must be 1 to the 9 regions of the keys, got 10"):
        route_regions(q, q, 10, (3, 4))
    with pytest.raises(ValueError, match=r"route_regions: topk must be 1 to the 9 regions of the keys, got 2\.0"):
        route_regions(q, q, 2.0, (3, 4))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="route_regions: q must be a tensor, got list"):
        route_regions([q], q, 2, (3, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"route_regions: k must be \(B, H, W, heads, channels\), got shape"):
        route_regions(q, q[0], 2, (3, 4))
    with pytest.raises(ValueError, match="route_regions: region_size must be a positive integer or two of them, got 0"):
        route_regions(q, q, 2, 0)

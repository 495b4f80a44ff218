"""Linear attention: the PyTorch path and the operator against the formula; recorded results are in tests/parity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from subquad import ops
from subquad.ops import linear_attention
from subquad.ops.linear_attention import FEATURE_MAPS, NORMALIZERS, prepare, torch_impl
from subquad.ops.linear_attention.export_form import export_form

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Arguments = dict[str, Any]
OPERATOR = torch.ops.subquad.linear_attention.default

EXACT = 1e-11
"""Of the largest value (at least 1): in float64 only the order of operations differs."""

FLOAT32 = 5e-6
"""Likewise; the formula itself in float32 is off by up to 2e-6 (cancellation in ``magnitude``)."""

HALF = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Relative L2 error of 16-bit results: inputs are exact in 16 bits, so that only the output's rounding remains."""


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _inputs(
    batch: int = 2,
    tokens: int = 20,
    heads: int = 3,
    dim: int = 8,
    values: int = 5,
    *,
    queries: int | None = None,
    normalizer: str = "divide",
    feature_map: str = "elu1",
    rotary: str | None = None,
    content: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Arguments:
    """Arguments in float64 (or rounded to ``dtype``): ``rotary`` is "shared" or "heads", ``content`` gives features."""
    queries = queries or tokens
    q, k = _normal(1, batch, queries, heads, dim), _normal(2, batch, tokens, heads, dim)
    if feature_map == "identity" and normalizer not in ("subtract", "none"):
        q, k = q.abs(), k.abs()
    arguments: Arguments = {"q": q, "k": k, "v": _normal(3, batch, tokens, heads, values)}
    if content:
        arguments |= {"q_content": _normal(4, *q.shape), "k_content": _normal(5, *k.shape)}
    arguments = {name: value.to(dtype) for name, value in arguments.items()}
    if rotary:
        angle = _normal(6, tokens, heads if rotary == "heads" else 1, dim // 2)
        arguments["rotary"] = tuple(
            table.to(torch.promote_types(dtype, torch.float32)) for table in (angle.cos(), angle.sin())
        )
    scale = dim**-0.5 if normalizer in ("subtract", "magnitude", "softmax_weighted", "clamp") else 1.0
    eps = 0.3 if normalizer == "clamp" else 1e-6
    return arguments | {"normalizer": normalizer, "feature_map": feature_map, "scale": scale, "eps": eps}


def _run(arguments: Arguments, backend: str = "torch") -> dict[str, Tensor]:
    """The output and, by name, the gradient of every differentiable argument; cotangents depend on shapes only."""
    leaves = {name: value.detach().requires_grad_() for name, value in arguments.items() if isinstance(value, Tensor)}
    with ops.use_backend(backend):
        o = linear_attention(**(arguments | leaves))
        # q and k themselves have no part in ``none`` with content features
        grads = torch.autograd.grad(o, tuple(leaves.values()), _normal(7, *o.shape).to(o.dtype), materialize_grads=True)
    return {"o": o.detach(), **dict(zip(leaves, grads, strict=True))}


def _double(arguments: Arguments) -> Arguments:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in arguments.items()}


CASES: dict[str, Arguments] = {
    **{f"{normalizer}": {"normalizer": normalizer} for normalizer in NORMALIZERS},
    **{f"{normalizer}_rotary": {"normalizer": normalizer, "rotary": "shared"} for normalizer in NORMALIZERS},
    **{f"{normalizer}_content": {"normalizer": normalizer, "content": True} for normalizer in NORMALIZERS},
    **{f"{normalizer}_queries": {"normalizer": normalizer, "queries": 7} for normalizer in NORMALIZERS},
    **{f"divide_{name}": {"feature_map": name} for name in FEATURE_MAPS},
    "weighted_identity": {"normalizer": "softmax_weighted", "feature_map": "identity", "rotary": "heads"},
    "subtract_signed": {"normalizer": "subtract", "feature_map": "identity"},
    "rotary_by_head": {"rotary": "heads", "heads": 2},
    "one_token": {"tokens": 1, "normalizer": "magnitude", "rotary": "shared"},
    "one_channel": {"dim": 1, "values": 1, "heads": 1},
    "wide": {"dim": 96, "values": 96, "heads": 1, "rotary": "shared", "normalizer": "softmax_weighted"},
    "doubled_features": {"dim": 192, "values": 96, "heads": 1, "feature_map": "relu"},
}
cases = pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())


@pytest.fixture(params=["whole", "pieces"])
def working_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens of all images at once, or three tokens of one image at a time."""
    if request.param == "pieces":
        monkeypatch.setattr(torch_impl, "_rows", lambda call: 3)


@cases
def test_float64_equals_the_formula(options: Arguments, working_set: None, assert_close: Any) -> None:
    arguments = _inputs(**options)
    assert_close(_run(arguments), _run(arguments, "reference"), EXACT)


@cases
def test_float32_stays_within_rounding(options: Arguments, assert_close: Any) -> None:
    arguments = _inputs(**options, dtype=torch.float32)
    assert_close(_run(arguments), _run(_double(arguments), "reference"), FLOAT32)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_formula_equals_explicit_weights(normalizer: str) -> None:
    """The N x N weights of the definition, which neither implementation ever forms."""
    arguments = _inputs(normalizer=normalizer, content=True, feature_map="identity")
    q, k, v, q_c, k_c = (arguments[name].transpose(1, 2) for name in ("q", "k", "v", "q_content", "k_content"))
    s, eps, tokens = arguments["scale"], arguments["eps"], k.shape[2]
    normal, content = q @ k.mT / tokens, q_c @ k_c.mT / tokens  # (B, H, M, N)
    if normalizer == "softmax_weighted":
        weights = tokens * torch.softmax(s * q.mean(2, keepdim=True) @ k.mT, dim=-1)
        normal, content, s = normal * weights, content * weights, 1.0
    z = s * normal.sum(-1, keepdim=True)
    uniform = torch.full_like(content, 1 / tokens)
    attention = {
        "divide": s * content / (z + eps),
        "softmax_weighted": s * content / (z + eps),
        "subtract": s * content + (1 - z) * uniform,
        "magnitude": s * content * (1 + 1 / (z + eps)) - z * uniform,
        "clamp": s * content / z.clamp(min=eps),
        "none": s * content,
    }[normalizer]
    expected = (attention @ v).transpose(1, 2)
    with ops.use_backend("torch"):
        torch.testing.assert_close(linear_attention(**arguments), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_gradcheck(normalizer: str) -> None:
    arguments = _inputs(1, 5, 2, 4, 3, normalizer=normalizer, rotary="shared")
    leaves = [arguments[name].requires_grad_() for name in ("q", "k", "v")]
    options = {name: value for name, value in arguments.items() if name not in ("q", "k", "v")}
    assert torch.autograd.gradcheck(lambda q, k, v: linear_attention(q, k, v, **options), leaves)


def test_gradcheck_of_content_features() -> None:
    arguments = _inputs(1, 5, 2, 4, 3, normalizer="softmax_weighted", content=True)
    names = ("q", "k", "v", "q_content", "k_content")
    leaves = [arguments.pop(name).requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *tensors: linear_attention(**dict(zip(names, tensors, strict=True)), **arguments), leaves
    )


def test_second_derivative_is_refused() -> None:
    arguments = _inputs()
    q = arguments["q"].requires_grad_()
    (grad,) = torch.autograd.grad(linear_attention(**arguments).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


# Properties of the formula ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_doubled_keys_change_nothing(normalizer: str) -> None:
    arguments = _inputs(normalizer=normalizer)
    doubled = arguments | {name: torch.cat([arguments[name]] * 2, dim=1) for name in ("k", "v")}
    torch.testing.assert_close(linear_attention(**doubled), linear_attention(**arguments), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalizer", ["divide", "subtract", "magnitude", "softmax_weighted"])
def test_equal_values_are_returned(normalizer: str) -> None:
    """Weights sum to 1 with shared features, up to eps / z."""
    arguments = _inputs(normalizer=normalizer)
    arguments["v"] = arguments["v"][:, :1].expand_as(arguments["v"])
    torch.testing.assert_close(linear_attention(**arguments), arguments["v"], rtol=1e-5, atol=1e-5)


def test_features_of_zero_give_zero() -> None:
    """0 / eps is 0 in every dtype, while 0 * (1 / eps) is NaN in float16, where eps is a subnormal number."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        arguments = _inputs(feature_map="relu", dtype=dtype)
        arguments["q"] = -arguments["q"].abs()
        assert not linear_attention(**arguments).any()
        assert all(grad.isfinite().all() for grad in _run(arguments).values())


# Sizes, strides, dtypes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalizer", ["divide", "magnitude", "softmax_weighted"])
def test_detection_map(normalizer: str) -> None:
    """67,200 tokens: no sum overflows 16 bits, no weight vanishes."""
    arguments = _inputs(1, 200 * 336, 1, 8, 4, normalizer=normalizer, dtype=torch.float16)
    mine, expected = _run(arguments), _run(_double(arguments), "reference")
    for name, value in expected.items():
        assert (mine[name].double() - value).norm() <= HALF[torch.float16] * value.norm(), name


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("gain", [1, 10])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_16_bit_inputs_lose_only_the_rounding_of_results(normalizer: str, gain: int, dtype: torch.dtype) -> None:
    arguments = _inputs(tokens=100, normalizer=normalizer, rotary="shared", dtype=dtype)
    arguments |= {name: arguments[name] * gain for name in ("q", "k")}
    exact = _double(arguments) | {"rotary": tuple(table.double() for table in arguments["rotary"])}
    mine, expected = _run(arguments), _run(exact, "reference")
    assert {value.dtype for value in mine.values()} == {dtype}
    for name, value in expected.items():
        # A gradient is also computed from a rounded cotangent, here of the same kind and size as the rounding of o;
        # beyond that, queries of softmax_weighted get their gradient in two additions.
        assert (mine[name].double() - value).norm() <= 2 * HALF[dtype] * value.norm(), name


def test_any_strides(assert_close: Any) -> None:
    arguments = _inputs(rotary="heads")
    strided = dict(arguments)
    for name in ("q", "k", "v"):
        value = arguments[name]
        strided[name] = torch.stack([value, value.new_full(value.shape, torch.nan)], dim=-1)[..., 0]
    strided["q"] = arguments["q"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert_close(_run(strided), _run(arguments), EXACT)
    expanded = arguments | {"v": arguments["v"][:, :1, :1].expand_as(arguments["v"])}
    assert torch.equal(linear_attention(**expanded), linear_attention(**(expanded | {"v": expanded["v"].clone()})))


def test_empty_batch() -> None:
    for normalizer in NORMALIZERS:
        mine = _run(_inputs(0, normalizer=normalizer))
        assert mine["o"].shape == (0, 20, 3, 5)
        assert mine["q"].shape == (0, 20, 3, 8)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_decides_the_dtype(dtype: torch.dtype) -> None:
    arguments = _inputs(dtype=torch.float32, rotary="shared") | {"v": _normal(3, 2, 20, 3, 5).to(dtype)}
    with torch.autocast("cpu", dtype):
        o = linear_attention(**arguments)
        assert linear_attention(**_inputs()).dtype == torch.float64
    rounded = {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    assert o.dtype == dtype
    assert torch.equal(o, linear_attention(**rounded))


def test_autocast_leaves_given_features_alone() -> None:
    """Powers of projections may be beyond 16 bits."""
    arguments = _inputs(feature_map="identity", dtype=torch.float32)
    arguments |= {name: 1e5 * arguments[name] for name in ("q", "k")}
    expected = linear_attention(**arguments)
    with torch.autocast("cpu", torch.float16):
        o = linear_attention(**(arguments | {"v": arguments["v"].half()}))
    assert o.dtype == torch.float32
    torch.testing.assert_close(o, expected, rtol=2e-3, atol=2e-3)  # v was rounded to float16


def test_keeps_inputs_and_statistics_only() -> None:
    """What autograd saves does not grow with the tokens beyond the inputs themselves."""
    arguments = _inputs(1, 500, 2, 8, 4, normalizer="softmax_weighted", rotary="shared")
    saved: list[Tensor] = []
    leaves = {name: arguments[name].requires_grad_() for name in ("q", "k", "v")}
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        linear_attention(**arguments)
    given = {value.data_ptr() for value in (*leaves.values(), *arguments["rotary"])}
    assert sum(value.numel() for value in saved if value.data_ptr() not in given) <= 2 * (8 * 4 + 2 * 8 + 1)


# The operator ----------------------------------------------------------------------------------------------------

SMALL = {"batch": 1, "tokens": 6, "heads": 2, "dim": 4, "values": 3}
OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"normalizer": "softmax_weighted", "content": True}, {"normalizer": "magnitude", "rotary": "heads"}],
    ids=["plain", "content", "rotary"],
)


@OPTIONS
def test_opcheck(options: Arguments) -> None:
    arguments = _inputs(**SMALL, **options)
    for value in arguments.values():
        if isinstance(value, Tensor):
            value.requires_grad_()
    call = prepare(**arguments)
    torch.library.opcheck(OPERATOR, tuple(call))
    call = call._replace(**{name: value.detach() for name, value in call._asdict().items() if torch.is_tensor(value)})
    o, *statistics = OPERATOR(*call)
    torch.library.opcheck(torch.ops.subquad.linear_attention_backward.default, (torch.ones_like(o), *statistics, *call))


@OPTIONS
def test_fake_and_meta_tensors_have_the_real_shapes(options: Arguments, assert_shapes_without_data: Any) -> None:
    call = prepare(**_inputs(**options, dtype=torch.bfloat16))
    assert_shapes_without_data(OPERATOR, call)


def test_compiles_in_one_graph_for_every_size(assert_compiles: Any) -> None:
    inputs = (_inputs(tokens=tokens) for tokens in (6, 15, 33))
    assert_compiles(_run_plain, *({name: found[name] for name in ("q", "k", "v")} for found in inputs))


def _run_plain(tensors: dict[str, Tensor]) -> Tensor:
    return linear_attention(**tensors, feature_map="elu1").sin()


@pytest.mark.parametrize("normalizer", ["divide", "softmax_weighted"])
def test_flop_counts(normalizer: str) -> None:
    arguments = _inputs(2, 20, 3, 8, 5, queries=7, normalizer=normalizer)
    for name in ("q", "k", "v"):
        arguments[name].requires_grad_()
    with FlopCounterMode(display=False) as forward:
        o = linear_attention(**arguments)
    with FlopCounterMode(display=False) as backward:
        o.sum().backward()
    # Products: k^T v and k . qbar for 20 keys, q S and q . kbar for 7 queries, each a multiplication and an addition.
    weights = 20 * 8 if normalizer == "softmax_weighted" else 0
    assert forward.get_total_flops() == 2 * 2 * 3 * (20 * 8 * 5 + 7 * 8 * 5 + 7 * 8 + weights)
    assert backward.get_total_flops() == 2 * 2 * 3 * (7 * 3 * 8 * 5 + 20 * 2 * 8 * 5 + 2 * 7 * 8 + 2 * weights)


def test_explain_and_the_reference() -> None:
    arguments = _inputs()
    assert ops.explain(linear_attention, **arguments).chosen == "torch"
    o = linear_attention(**(arguments | {"q": arguments["q"].requires_grad_()}))
    with ops.use_backend("reference"), pytest.raises(ValueError, match="the reference is not an operator"):
        o.sum().backward()
    with ops.use_backend("triton"), pytest.raises(ValueError, match="no implementation"):
        linear_attention(**arguments)


@OPTIONS
def test_export_form_equals_the_operator(options: Arguments) -> None:
    call = prepare(**_inputs(**options))
    for mine, expected in zip(export_form(*call), OPERATOR(*call), strict=True):
        assert mine.shape == expected.shape and mine.stride() == expected.stride()
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-11)


def test_exported_program_at_sizes_that_were_not_traced(assert_exports: Any) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, normalizer="softmax_weighted", feature_map="elu1", scale=0.4)

    def tokens(batch: int, tokens: int) -> tuple[Tensor, ...]:
        return tuple(_inputs(batch, tokens)[name] for name in ("q", "k", "v"))

    assert_exports(attend, {OPERATOR: export_form}, tokens, (2, 20), (3, 35), (1, 4), tolerance=EXACT)


# Bad input -------------------------------------------------------------------------------------------------------

# name: (what to change in good arguments, exception, fragments of the message)
BAD: dict[str, tuple[Any, ...]] = {
    "q_list": (lambda a: {"q": a["q"].tolist()}, TypeError, ("q must be a tensor", "list")),
    "v_none": (lambda _: {"v": None}, TypeError, ("v must be a tensor", "NoneType")),
    "content_number": (
        lambda _: {"q_content": 1.0, "k_content": 1.0},
        TypeError,
        ("q_content must be a tensor", "float"),
    ),
    "q_rank": (lambda a: {"q": a["q"][0]}, ValueError, ("q must be (B, tokens, heads, channels)", "(20, 3, 8)")),
    "k_tokens": (lambda a: {"k": a["k"][:, :19]}, ValueError, ("v must have shape (B, N, H, E) = (2, 19, 3, 5)", "20")),
    "k_heads": (lambda a: {"k": a["k"][:, :, :2]}, ValueError, ("k must have shape (B, N, H, D) = (2, 20, 3, 8)",)),
    "k_channels": (lambda a: {"k": a["k"][..., :4]}, ValueError, ("k must have shape (B, N, H, D)", "(2, 20, 3, 4)")),
    "v_batch": (lambda a: {"v": a["v"][:1]}, ValueError, ("v must have shape (B, N, H, E)", "(1, 20, 3, 5)")),
    "no_tokens": (lambda a: {"q": a["q"][:, :0]}, ValueError, ("q must not be empty", "(2, 0, 3, 8)")),
    "no_channels": (lambda a: {"v": a["v"][..., :0]}, ValueError, ("v must not be empty", "(2, 20, 3, 0)")),
    "one_content": (lambda a: {"q_content": a["q"]}, ValueError, ("q_content and k_content go together",)),
    "content_shape": (
        lambda a: {"q_content": a["q"], "k_content": a["k"][:, :1]},
        ValueError,
        ("k_content must have shape (B, N, H, D)", "(2, 1, 3, 8)"),
    ),
    "content_and_rotary": (
        lambda a: {"q_content": a["q"], "k_content": a["k"]},
        ValueError,
        ("rotary and q_content exclude each other",),
    ),
    "rotary_single": (lambda a: {"rotary": a["rotary"][0]}, TypeError, ("pair of tensors (cos, sin)", "Tensor")),
    "rotary_number": (lambda a: {"rotary": (a["rotary"][0], 1.0)}, TypeError, ("sin must be a tensor", "float")),
    "rotary_shape": (
        lambda a: {"rotary": (a["rotary"][0], a["rotary"][1][:19])},
        ValueError,
        ("sin must have shape (N, 1 or H, D / 2) = (20, 1, 4)", "(19, 1, 4)"),
    ),
    "rotary_heads": (
        lambda a: {"rotary": tuple(table.expand(-1, 2, -1) for table in a["rotary"])},
        ValueError,
        ("cos must have shape", "(20, 3, 4)", "(20, 2, 4)"),
    ),
    "rotary_queries": (lambda a: {"q": a["q"][:, :7]}, ValueError, ("as many queries as keys", "7 and 20")),
    "rotary_odd": (lambda a: {name: a[name][..., :7] for name in "qk"}, ValueError, ("D must be even, got 7",)),
    "rotary_gradient": (
        lambda a: {"rotary": (a["rotary"][0].clone().requires_grad_(), a["rotary"][1])},
        ValueError,
        ("table cos requires a gradient",),
    ),
    "rotary_dtype": (
        lambda a: {"rotary": (a["rotary"][0].long(), a["rotary"][1])},
        TypeError,
        ("cos must be of dtype", "int64"),
    ),
    "q_dtype": (lambda a: {"q": a["q"].long()}, TypeError, ("q must be of dtype", "int64")),
    "v_dtype": (lambda a: {"v": a["v"].half()}, TypeError, ("v must be of dtype float64", "float16")),
    "k_device": (lambda a: {"k": a["k"].to("meta")}, ValueError, ("k is on meta", "cpu")),
    "normalizer": (lambda _: {"normalizer": "softmax"}, ValueError, ("unknown normalizer 'softmax'", "'magnitude'")),
    "feature_map": (lambda _: {"feature_map": "elu"}, ValueError, ("unknown feature_map 'elu'", "'elu1'")),
    "eps": (lambda _: {"eps": -1.0}, ValueError, ("eps must not be negative, got -1.0",)),
    "eps_nan": (lambda _: {"eps": float("nan")}, ValueError, ("eps must be finite, got nan",)),
    "eps_infinite": (lambda _: {"eps": float("inf")}, ValueError, ("eps must be finite", "got inf")),
    "eps_text": (lambda _: {"eps": "a"}, TypeError, ("eps must be a number, got 'a'",)),
    "scale_nan": (lambda _: {"scale": float("nan")}, ValueError, ("scale must be finite, got nan",)),
    "scale_infinite": (lambda _: {"scale": float("inf")}, ValueError, ("scale must be finite, got inf",)),
    "scale_negative": (
        lambda _: {"normalizer": "magnitude", "scale": -0.5},
        ValueError,
        ("'magnitude' divides by z, which takes the sign of scale: it must be positive, got -0.5",),
    ),
    "scale_zero": (lambda _: {"scale": 0.0}, ValueError, ("'divide' divides by z", "it must be positive, got 0.0")),
    "relu_without_eps": (
        lambda _: {"feature_map": "relu", "normalizer": "clamp", "eps": 0.0},
        ValueError,
        ("'clamp' needs eps above 0 for 'relu'",),
    ),
    "zero_features_without_eps": (
        lambda a: {"feature_map": "identity", "eps": 0.0, "q": torch.zeros_like(a["q"]), "k": a["k"].abs()},
        ValueError,
        ("'divide' divides by sums of products", "must be positive with eps = 0, but q has 0"),
    ),
    "negative_features": (
        lambda _: {"feature_map": "identity"},
        ValueError,
        ("'divide' divides by sums of products", "q has -"),
    ),
    "negative_keys": (
        lambda a: {"feature_map": "identity", "normalizer": "softmax_weighted", "q": a["q"].abs()},
        ValueError,
        ("'softmax_weighted' divides", "k has -"),
    ),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_bad_arguments(bad: tuple[Any, ...], assert_refuses: Any) -> None:
    assert_refuses(linear_attention, _inputs(rotary="shared"), *bad)


def test_negative_features_are_refused_by_the_reference_too() -> None:
    with ops.use_backend("reference"), pytest.raises(ValueError, match="must not be negative"):
        linear_attention(**_inputs() | {"feature_map": "identity"})


@pytest.mark.parametrize("normalizer", ["subtract", "none"])
def test_normalizers_that_do_not_divide_take_any_features_and_scale(normalizer: str) -> None:
    options = {"feature_map": "identity", "normalizer": normalizer, "scale": -0.5, "eps": 0.0}
    assert linear_attention(**_inputs() | options).isfinite().all()

"""``import natten`` without NATTEN: names, layouts, metadata, and transformers' DiNAT on it beside ours."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from subquad.backbones import weights
from subquad.backbones.nat import NAT
from subquad.ops import NeighborhoodAttention2D
from subquad.ops.neighborhood_attention import natten_compat

EXACT = 1e-12
"""In float64 only the order of operations differs."""

SIZES = {1: (7,), 2: (5, 7), 3: (3, 5, 3)}


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    assert natten_compat.install()
    yield
    natten_compat.uninstall()


@pytest.fixture
def functional() -> Any:
    return importlib.import_module("natten.functional")


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _assert_equal(mine: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(mine, expected, rtol=EXACT, atol=EXACT)


# Names and layouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", SIZES)
def test_windows_that_cover_the_map(axes: int, functional: Any) -> None:
    """Products and sums of all tokens (B, heads, N, d), without a scale, and the bias at key minus query."""
    size = SIZES[axes]
    q, k, v = (_normal(seed, 2, 3, *size, 4) for seed in range(3))
    rpb = _normal(3, 3, *(2 * length - 1 for length in size))
    grid = torch.cartesian_prod(*(torch.arange(length) for length in size)).view(-1, axes)
    entry = grid[None, :] - grid[:, None] + torch.tensor(size) - 1  # (queries, keys, axes)
    plain = q.flatten(2, -2) @ k.flatten(2, -2).mT
    biased = plain + rpb[(slice(None), *entry.unbind(-1))]
    expected = (biased.softmax(-1) @ v.flatten(2, -2)).unflatten(2, size)

    def named(name: str) -> Any:
        return getattr(functional, name.format(axes))

    for name in ("na{}d_qk", "natten{}dqk"):
        _assert_equal(named(name)(q, k, size, 1).flatten(2, -2), plain)
    for logits in (
        named("na{}d_qk")(q, k, size, 1, None, False, rpb),
        named("na{}d_qk_with_bias")(q, k, rpb, size, 1),
        named("natten{}dqkrpb")(q, k, rpb, size, 1),
    ):
        _assert_equal(logits.flatten(2, -2), biased)
    for o in (named("na{}d_av")(logits.softmax(-1), v, size, 1), named("natten{}dav")(logits.softmax(-1), v, size, 1)):
        _assert_equal(o, expected)
        assert o.is_contiguous() and logits.is_contiguous()
    heads_last = [x.movedim(1, -2) for x in (q, k, v)]
    _assert_equal(named("na{}d")(*heads_last, size, 1, False, rpb, 1.0).movedim(-2, 1), expected)


@pytest.mark.parametrize("named", [False, True])
def test_sizes_of_the_first_axis_apart(named: bool, functional: Any) -> None:
    """As the 3-D functions had them: in front of those of the other axes."""
    q, k, v = (_normal(seed, 2, 3, 5, 9, 9, 4) for seed in range(3))
    more, rpb = _normal(3, 2, 3, 2, 4), _normal(4, 3, 3, 5, 5)
    kernel_size, dilation = (2, 3, 3), (2, 3, 3)
    apart: dict[str, Any] = {"kernel_size_d": 2, "kernel_size": 3, "dilation_d": 2, "dilation": 3}

    def call(name: str, *tensors: Tensor | None) -> Tensor:
        function = getattr(functional, name)
        return function(*tensors, **apart) if named else function(*tensors, *apart.values())

    plain = functional.na3d_qk(q, k, kernel_size, dilation)
    biased = functional.na3d_qk(q, k, kernel_size, dilation, rpb=rpb)
    for name, bias, expected in (("na3d_qk_with_bias", rpb, biased), ("natten3dqkrpb", rpb, biased)):
        _assert_equal(call(name, q, k, bias), expected)
        _assert_equal(call(name, q, k, None), plain)
    for name in ("na3d_qk", "natten3dqk"):
        _assert_equal(call(name, q, k), plain)
    for name in ("na3d_av", "natten3dav"):
        _assert_equal(call(name, plain.softmax(-1), v), functional.na3d_av(plain.softmax(-1), v, kernel_size, dilation))
    wider = functional.na3d_qk(q, k, kernel_size, dilation, more)
    _assert_equal(functional.na3d_qk(q, k, *apart.values(), more), wider)
    _assert_equal(functional.na3d_qk_with_bias(q, k, None, *apart.values(), more), wider)


def test_signatures(functional: Any) -> None:
    """What ``help`` and ``inspect`` show are the arguments of a call."""
    assert [*inspect.signature(functional.na2d).parameters][:4] == ["query", "key", "value", "kernel_size"]
    assert [*inspect.signature(functional.na1d_qk_with_bias).parameters][2] == "bias"


def test_order_of_the_options(functional: Any) -> None:
    """Causality and additional tokens, split and whole."""
    q, k, v = (_normal(seed, 2, 3, 9, 11, 4) for seed in range(3))
    more_k, more_v = _normal(3, 2, 3, 5, 4), _normal(4, 2, 3, 5, 4)
    attn = functional.na2d_qk(q, k, (3, 5), 2, more_k, (True, False)).softmax(-1)
    o = functional.na2d_av(attn, v, (3, 5), 2, more_v, (True, False))
    maps, tokens = ([x.movedim(1, -2) for x in group] for group in ((q, k, v), (more_k, more_v)))
    whole = functional.na2d(*maps, (3, 5), 2, (True, False), None, 1.0, *tokens)
    _assert_equal(o, whole.movedim(-2, 1))


@pytest.mark.parametrize("axes", SIZES)
def test_arguments_of_the_first_releases(axes: int, functional: Any) -> None:
    """Until 0.14.4 the size of the kernel is that of the tables."""
    q, k, v = (_normal(seed, 2, 3, *(7,) * axes, 4) for seed in range(3))
    rpb = _normal(3, 3, *(5,) * axes)
    qk, av = (getattr(functional, f"natten{axes}d{name}") for name in ("qkrpb", "av"))
    attn = qk(q, k, rpb, 2)
    _assert_equal(attn, qk(q, k, rpb, 3, 2))
    _assert_equal(av(attn, v, 2), av(attn, v, 3, 2))
    _assert_equal(qk(q, k, rpb, dilation=2), attn)
    with pytest.raises(ValueError, match=f"natten{axes}dqkrpb: needs kernel_size and dilation"):
        qk(q, k, None, 2)


@pytest.mark.parametrize("columns", [5, 6])
def test_what_transformers_hands_over(columns: int, functional: Any) -> None:
    """Maps (B, W, H, heads, D) in place of (B, heads, H, W, D), told by sizes, else by the caller."""
    call: Callable[..., Tensor] = eval("lambda f, *args: f(*args)", {"__name__": "transformers.models.dinat"})
    q, k, v = (_normal(seed, 2, 7, columns, 5, 4) for seed in range(3))  # heads last, in memory
    rpb = _normal(3, 5, 5, 5)
    right = [x.permute(0, 3, 1, 2, 4) for x in (q, k, v)]
    results = []
    for maps in (right, [x.contiguous() for x in right], [x.transpose(1, 2) for x in (q, k, v)]):
        attn = call(functional.natten2dqkrpb, *maps[:2], rpb, 3, 1).softmax(-1)
        results.append((attn, call(functional.natten2dav, attn, maps[2], 3, 1)))
    expected = functional.na2d_qk(*right[:2], 3, 1, rpb=rpb).softmax(-1)
    for attn, o in results:
        _assert_equal(attn, expected)
        _assert_equal(o, functional.na2d_av(expected, right[2], 3, 1))


def test_right_maps_of_any_strides_are_taken_as_they_are(functional: Any) -> None:
    """With as many heads as columns, in the very memory that transformers' maps have."""
    q, k, v = (_normal(seed, 2, 6, 4, 4, 8).transpose(1, 2) for seed in range(3))
    rpb = _normal(3, 4, 5, 5)
    attn = functional.natten2dqkrpb(q, k, rpb, 3, 1)
    _assert_equal(attn, functional.natten2dqkrpb(q.contiguous(), k.contiguous(), rpb, 3, 1))
    _assert_equal(functional.natten2dav(attn, v, 3, 1), functional.natten2dav(attn, v.contiguous(), 3, 1))


def test_errors_are_those_of_the_functions(functional: Any) -> None:
    q = _normal(0, 2, 3, 9, 11, 4)
    with pytest.raises(ValueError, match=r"na2d_qk: on axis 0 .* at most the map's 9, got 5 \* 2 = 10"):
        functional.na2d_qk(q, q, 5, 2)
    with pytest.raises(ValueError, match=r"na1d_qk: q must be \(B, L, heads, channels\)"):
        functional.na1d_qk(q, q, 3, 1)
    assert not hasattr(functional, "na4d")


@pytest.mark.parametrize("axes", SIZES)
def test_layers(axes: int) -> None:
    """``bias`` and padding are what layers had before 0.17; since then a small map is an error."""
    layer = getattr(importlib.import_module("natten"), f"NeighborhoodAttention{axes}D")
    x = torch.randn(2, *SIZES[axes], 8)
    assert layer(8, 2, 3, 1, False, True).rpb.shape == (2, *(5,) * axes)
    assert layer(8, 2, 3, bias=False).rpb is None
    assert layer(8, 2, 5, dilation=2, bias=True)(x).shape == x.shape
    with pytest.raises(ValueError, match="at most the map's"):
        layer(8, 2, 5, 2, rel_pos_bias=True)(x)


def test_layers_of_a_program_from_before_0_17() -> None:
    """OneFormer's DiNAT and the authors' NAT name no bias, and None where there is no dilation."""
    assert natten_compat.install(older_layers=True)
    layer = importlib.import_module("natten").NeighborhoodAttention2D(
        8, kernel_size=5, dilation=None, num_heads=2, qkv_bias=True, qk_scale=None, attn_drop=0.0, proj_drop=0.0
    )
    ours = NeighborhoodAttention2D(8, 2, 5, rel_pos_bias=True, pad_small_maps=True)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter)
    layer.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 7, 8)
    torch.testing.assert_close(layer(x), ours(x))
    with pytest.raises(TypeError, match=r"bias was the name of rel_pos_bias before 0\.17, got both"):
        type(layer)(8, 2, 5, rel_pos_bias=False)
    with pytest.raises(TypeError, match="positional"):
        type(layer)(8, 2, 5, 1, False)
    assert natten_compat.install()
    layer = importlib.import_module("natten").NeighborhoodAttention2D(8, 2, 5, None)
    assert layer.rpb is None and layer.dilation == [1, 1]


# Imports and metadata --------------------------------------------------------------------------------------------


def test_what_package_checks_look_at() -> None:
    spec = importlib.util.find_spec("natten")
    assert spec is not None and spec.name == "natten"
    natten = importlib.import_module("natten")
    assert natten.functional is sys.modules["natten.functional"]
    assert natten.na2d is natten.functional.na2d or natten.na2d.__name__ == "na2d"
    assert importlib.metadata.version("natten") == natten.__version__ == natten_compat.VERSION
    assert importlib.metadata.metadata("natten")["Name"] == "natten"
    assert "natten" in importlib.metadata.packages_distributions()["natten"]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("natten.flops")
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("natten-of-another-name")


def test_twice_and_undone() -> None:
    count = len(sys.meta_path)
    assert natten_compat.install() and len(sys.meta_path) == count
    importlib.import_module("natten")
    natten_compat.uninstall()
    natten_compat.uninstall()
    assert len(sys.meta_path) == count - 1 and "natten" not in sys.modules
    if importlib.util.find_spec("natten") is None:
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("natten")


@pytest.mark.parametrize("kind", ["complete", "without bias", "broken"])
def test_an_installed_natten(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays if it has all the names."""
    natten_compat.uninstall()
    patterns = ("na{}d", "na{}d_qk", "na{}d_av", "natten{}dqk", "natten{}dqkrpb", "natten{}dav")  # those of 0.17.4
    names = [pattern.format(axes) for axes in (1, 2, 3) for pattern in patterns]
    if kind != "complete":
        names = [name for name in names if not name.startswith("natten")]
    (tmp_path / "natten").mkdir()
    layers = "\n".join(f"class NeighborhoodAttention{axes}D: pass" for axes in (1, 2, 3))
    (tmp_path / "natten" / "__init__.py").write_text(f"theirs = True\n{layers}")
    body = "raise ImportError('built for another torch')" if kind == "broken" else ""
    (tmp_path / "natten" / "functional.py").write_text("\n".join([body, *(f"{name} = None" for name in names)]))
    monkeypatch.syspath_prepend(tmp_path)

    assert natten_compat.install() == (kind != "complete")
    assert hasattr(importlib.import_module("natten"), "theirs") == (kind == "complete")
    natten_compat.uninstall()
    assert hasattr(importlib.import_module("natten"), "theirs")
    del sys.modules["natten"]


# transformers ----------------------------------------------------------------------------------------------------

# The last map of a 40 x 64 image is 3 x 4: as many columns as heads, and fewer rows than the dilated kernel.
CONFIG: dict[str, Any] = {
    "embed_dim": 8,
    "depths": [1, 2, 2],
    "num_heads": [2, 4, 4],
    "kernel_size": 3,
    "dilations": [[3], [1, 2], [1, 2]],
    "mlp_ratio": 2.0,
}


def _transformers(cls: str, **options: Any) -> Any:
    """A model of transformers in float64, with weights that all make a difference."""
    transformers = pytest.importorskip("transformers", reason='needs transformers: pip install "subquad[dev]"')
    torch.manual_seed(0)
    config = transformers.DinatConfig(**CONFIG, layer_scale_init_value=0.5, drop_path_rate=0.0, **options)
    model = getattr(transformers, cls)(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _ours(theirs: Any) -> NAT:
    model = NAT(**CONFIG, layer_scale=0.5, num_classes=0, dtype=torch.float64)
    converted = weights.filter_of(model)(theirs.state_dict(), model)
    assert {name for name in model.state_dict() if name not in converted} <= {"norm.weight", "norm.bias"}
    model.load_state_dict(model.state_dict() | converted)
    return model.eval()


@pytest.mark.parametrize("size", [(40, 64), (64, 64), (44, 70)], ids=str)
def test_dinat_model(size: tuple[int, int]) -> None:
    """Outputs and the gradient of the image and of every weight."""
    theirs = _transformers("DinatModel")
    ours = _ours(theirs)
    images = [_normal(1, 2, 3, *size).requires_grad_() for _ in range(2)]
    found = theirs(images[0]).last_hidden_state
    expected = ours.forward_features(images[1])
    _assert_equal(found.view_as(expected), expected)
    cotangent = _normal(2, *expected.shape)
    (found.view_as(expected) * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    _assert_equal(images[0].grad, images[1].grad)
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    mapped = weights.filter_of(ours)(grads, ours)
    own = {name: p.grad for name, p in ours.named_parameters()}
    assert mapped.keys() == own.keys()
    for name, grad in own.items():
        torch.testing.assert_close(mapped[name], grad, rtol=0, atol=1e-11 * max(1, grad.abs().max().item()))


def test_dinat_backbone() -> None:
    """Maps behind its norms, and the gradient of the image."""
    theirs = _transformers("DinatBackbone", out_features=["stage1", "stage2", "stage3"])
    norms = theirs.hidden_states_norms
    ours = _ours(theirs)
    images = [_normal(1, 2, 3, 40, 64).requires_grad_() for _ in range(2)]
    found = theirs(images[0]).feature_maps
    maps = ours.forward_intermediates(images[1], intermediates_only=True, output_fmt="NHWC")
    expected = [norms[f"stage{i}"](x).permute(0, 3, 1, 2) for i, x in enumerate(maps, start=1)]
    for one, other in zip(found, expected, strict=True):
        _assert_equal(one, other)
    for outputs in (found, expected):
        sum((x * _normal(i, *x.shape)).sum() for i, x in enumerate(outputs)).backward()
    _assert_equal(images[0].grad, images[1].grad)


def test_attentions_are_those_of_the_windows() -> None:
    theirs = _transformers("DinatModel")
    attentions = theirs(_normal(1, 1, 3, 40, 64), output_attentions=True).attentions
    assert attentions[0].shape == (1, 2, 10, 16, 9)  # (B, heads, H, W, slots)
    _assert_equal(attentions[0].sum(-1), torch.ones(1, 2, 10, 16, dtype=torch.float64))

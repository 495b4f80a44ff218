"""The layers of neighborhood attention, beside the functions that they call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from subquad import ops
from subquad.ops import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D

LAYERS = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}
SIZES = {1: (11,), 2: (7, 10), 3: (6, 6, 7)}
EXACT = 1e-12
"""Of values close to 1, in float64: only the order of operations differs."""

layers = pytest.mark.parametrize("axes", LAYERS)


def _layer(axes: int = 2, *args: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return LAYERS[axes](*(args or (8, 2, 3, 2)), **options, dtype=torch.float64)


def _map(axes: int, dim: int = 8) -> Tensor:
    return torch.randn(2, *SIZES[axes], dim, dtype=torch.float64, generator=torch.Generator().manual_seed(axes))


@layers
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True, "rel_pos_bias": True}, {"stride": 2, "qk_scale": 0.3, "qkv_bias": False}],
    ids=["", "causal", "stride"],
)
def test_projections_around_the_function(axes: int, options: dict[str, Any]) -> None:
    layer, x = _layer(axes, **options), _map(axes)
    q, k, v = (x @ w.T for w in layer.qkv.weight.chunk(3))
    if layer.qkv.bias is not None:
        nn.init.normal_(layer.qkv.bias)
        q, k, v = (y + b for y, b in zip((q, k, v), layer.qkv.bias.chunk(3), strict=True))
    q, k, v = (y.unflatten(-1, (2, 4)) for y in (q, k, v))  # heads
    window = {name: options[name] for name in ("is_causal", "stride") if name in options}
    o = getattr(ops, f"na{axes}d")(q, k, v, 3, 2, **window, rpb=layer.rpb, scale=options.get("qk_scale", 4**-0.5))
    expected = o.flatten(-2) @ layer.proj.weight.T + layer.proj.bias
    torch.testing.assert_close(layer(x), expected, rtol=EXACT, atol=EXACT)


def test_names_of_parameters() -> None:
    shapes = {name: tuple(value.shape) for name, value in _layer(2, 8, 2, (3, 5), rel_pos_bias=True).named_parameters()}
    assert shapes == {
        "rpb": (2, 5, 9),
        "qkv.weight": (24, 8),
        "qkv.bias": (24,),
        "proj.weight": (8, 8),
        "proj.bias": (8,),
    }
    assert "rpb" not in dict(_layer().named_parameters())


def test_dropout_of_weights() -> None:
    """Queries of zero weigh all nine keys alike; of values of one, twice the share of those that are left remains."""
    layer = _layer(2, 4, 1, 3, attn_drop=0.5)
    nn.init.zeros_(layer.qkv.weight)
    nn.init.ones_(layer.qkv.bias)
    nn.init.zeros_(layer.proj.bias)
    nn.init.eye_(layer.proj.weight)
    left = layer(_map(2, 4)) * 9 / 2
    torch.testing.assert_close(left, left.round(), rtol=0, atol=1e-9)
    assert left.min() < 3 and left.max() > 6 and 4 < left.mean() < 5
    torch.testing.assert_close(layer.eval()(_map(2, 4)), torch.ones(2, 7, 10, 4, dtype=torch.float64))


def test_dropout_of_the_output() -> None:
    layer = _layer(1, proj_drop=0.5)
    dropped = layer(_map(1)) == 0
    assert 0.3 < dropped.double().mean() < 0.7
    assert not (layer.eval()(_map(1)) == 0).any()


def test_small_maps_attend_the_padding() -> None:
    """A map of 2 x 4 under windows of 5: full attention, to 5 x 5 tokens with the projection's bias at the rest."""
    attention = _layer(2, 8, 2, 5, pad_small_maps=True)
    x = torch.randn(3, 2, 4, 8, dtype=torch.float64)
    padded = torch.zeros(3, 5, 5, 8, dtype=torch.float64)
    padded[:, :2, :4] = x
    q, k, v = attention.qkv(padded).view(3, 25, 3, 2, 4).permute(2, 0, 3, 1, 4)
    o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(3, 5, 5, 8)
    torch.testing.assert_close(attention(x), attention.proj(o)[:, :2, :4], rtol=EXACT, atol=EXACT)


@layers
def test_large_maps_are_not_padded(axes: int) -> None:
    layer = _layer(axes, pad_small_maps=True)
    expected = layer(_map(axes))
    layer.pad_small_maps = False
    assert torch.equal(layer(_map(axes)), expected)
    with pytest.raises(ValueError, match=rf"na{axes}d: on axis 0 .* at most the map's 4, got 3 \* 2 = 6"):
        layer(_map(axes)[:, :4])


def test_dilation_reaches_further() -> None:
    """With one axis dilated by 2, a token sees its neighbours at even distances and nothing between."""
    attention = _layer(2, 4, 1, 3, 2)
    x = torch.randn(1, 9, 9, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(attention(x)[0, 4, 4].sum(), x)
    seen = grad[0].abs().sum(-1) > 0
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[2:7:2, 2:7:2] = True
    assert torch.equal(seen, expected)


@layers
@pytest.mark.parametrize("attn_drop", [0.0, 0.5])
def test_scripted(axes: int, attn_drop: float) -> None:
    layer = _layer(axes, rel_pos_bias=True, attn_drop=attn_drop, pad_small_maps=True)
    results = []
    for module in (layer, torch.jit.script(layer)):
        torch.manual_seed(1)
        results.append(module(_map(axes)))
    torch.testing.assert_close(*results, rtol=EXACT, atol=EXACT)


@layers
def test_exported_at_sizes_that_were_not_traced(axes: int) -> None:
    """Traced where the map is larger than the windows, run where it is smaller, and padded."""
    layer = _layer(axes, 8, 2, 3, 2, rel_pos_bias=True, pad_small_maps=True)
    x = torch.randn(2, *(7 + i for i in range(axes)), 8, dtype=torch.float64)
    sizes = (dict.fromkeys(range(axes + 1), Dim.AUTO),)
    exported = torch.export.export(layer, (x,), dynamic_shapes=sizes).module()
    for small in (_map(axes), x[:, 3:], x[:, 5:].transpose(1, -2)):
        torch.testing.assert_close(exported(small), layer(small), rtol=EXACT, atol=EXACT)


def test_bias_table_is_initialised_again() -> None:
    layer = LAYERS[2](64, 8, 7, rel_pos_bias=True, device="meta").to_empty(device="cpu")
    assert layer.rpb is not None
    nn.init.constant_(layer.rpb, torch.nan)
    layer.reset_parameters()
    assert 0.018 < layer.rpb.std() < 0.022


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((8, 3, 3), {}, "NeighborhoodAttention2D: num_heads must divide dim, got 3 heads for 8 channels"),
        ((8, 2, 0), {}, "NeighborhoodAttention2D: kernel_size must be a positive integer or 2 of them, got 0"),
        ((8, 2, 3, (1, 2, 3)), {}, r"dilation must be a positive integer or 2 of them, got \(1, 2, 3\)"),
        ((8, 2, 3), {"is_causal": (1, 0)}, r"is_causal must be a bool or 2 of them, got \(1, 0\)"),
        ((8, 2, 3), {"stride": (3, 4)}, "on axis 1 stride must be at most kernel_size 3, got 4"),
        ((8, 2, 3), {"attn_drop": 1.5}, "dropout probability"),
    ],
)
def test_options_that_cannot_be_built(args: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention2D(*args, **options)


def test_a_sequence_is_no_map() -> None:
    with pytest.raises(ValueError, match=r"q must be \(B, H, W, heads, channels\), got shape \(2, 11, 2, 4\)"):
        _layer(2)(_map(1))

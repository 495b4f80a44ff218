"""BiFormer: what the recorded cases of tests/parity do not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim

from subquad.backbones import weights
from subquad.backbones.biformer import BiFormer, FullAttention
from subquad.backbones.bilevel import BiLevelRoutingAttention
from subquad.tools.export import EXPORT_FORMS

MODEL = "test_biformer"


def _official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the names of the official code."""
    names = [
        (r"^stem\.conv1\.", "downsample_layers.0.0."),
        (r"^stem\.norm1\.", "downsample_layers.0.1."),
        (r"^stem\.conv2\.", "downsample_layers.0.3."),
        (r"^stem\.norm2\.", "downsample_layers.0.4."),
        (r"^stages\.(\d)\.downsample\.conv\.", r"downsample_layers.\1.0."),
        (r"^stages\.(\d)\.downsample\.norm\.bn\.", r"downsample_layers.\1.1."),
        (r"^(stages\.[0-2])\.(.*)\.qkv\.", r"\1.\2.qkv.qkv."),
        (r"^(stages\.[0-2])\.(.*)\.attn\.proj\.", r"\1.\2.attn.wo."),
        (r"^(stages\.\d)\.blocks\.", r"\1."),
        (r"\.fc1\.", ".0."),
        (r"\.fc2\.", ".3."),
        (r"^norm\.bn\.", "norm."),
        (r"^head\.fc\.", "head."),
    ]
    return weights.rename(state, names)


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_official_checkpoints(wrapper: str, tmp_path: Path) -> None:
    """A classifier's file, and a detector's: the backbone under a prefix, with a norm for each level."""
    state = timm.create_model(MODEL).state_dict()
    official = _official(state)
    assert not set(official) & set(state) - {name for name in state if ".norm" in name}
    if wrapper == "state_dict":
        official = {f"backbone.{name}": value for name, value in official.items()}
        official |= {f"backbone.extra_norms.{i}.weight": torch.ones(8) for i in range(4)}
    torch.save({wrapper: official, "meta": {"epoch": 12}}, tmp_path / "official.pth")
    model = timm.create_model(MODEL)
    weights.load_checkpoint(model, tmp_path / "official.pth")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def _attention(**options: Any) -> BiLevelRoutingAttention:
    torch.manual_seed(0)
    return BiLevelRoutingAttention(
        **({"dim": 8, "num_heads": 2, "n_win": 3, "topk": 9, "dtype": torch.float64} | options)
    )


def test_all_regions_are_full_attention_and_padding_is_attended() -> None:
    """On a map of 4 x 7 that is padded to 6 x 9, with the projection's bias as key and value of the padding."""
    attention = _attention()
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, 2, 0, 2))
    q, k, v = attention.qkv(padded).flatten(1, 2).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    o = F.scaled_dot_product_attention(q, k, v, scale=8**-0.5).transpose(1, 2).reshape(2, 6, 9, 8)
    lepe = attention.lepe(v.transpose(1, 2).reshape(2, 6, 9, 8))
    torch.testing.assert_close(attention(x), attention.proj(o + lepe)[:, :4, :7], rtol=1e-12, atol=1e-12)


def test_regions_see_only_what_they_chose() -> None:
    """With one region to choose, the keys of every other get no gradient from the attention."""
    attention = _attention(topk=1, n_win=2)
    torch.nn.init.zeros_(attention.lepe.weight)
    x = torch.randn(1, 4, 4, 8, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(attention(x)[0, 0, 0].sum(), x)
    seen = attention.by_region(grad.abs().sum(-1, keepdim=True)).sum((2, 3))[0, :, 0] > 0
    q, k, _ = attention.qkv(x).chunk(3, dim=-1)
    best = (attention.by_region(q).mean((2, 3)) @ attention.by_region(k).mean((2, 3)).mT)[0, 0].argmax()
    assert set(seen.nonzero().flatten().tolist()) == {0, int(best)}


@pytest.mark.parametrize("kv_pool", ["avgpool", "maxpool", "ada_avgpool", "ada_maxpool"])
def test_pooled_keys_stay_in_their_regions(kv_pool: str) -> None:
    attention = _attention(n_win=2, topk=1, kv_pool=kv_pool, kv_pool_size=2)
    x = torch.randn(1, 8, 12, 8, dtype=torch.float64)
    pooled = attention.pool(x, [4, 6])
    side = (2, 3) if not kv_pool.startswith("ada") else (2, 2)
    assert pooled.shape == (1, 2 * side[0], 2 * side[1], 8)
    region = x[:, 4:, :6].permute(0, 3, 1, 2)
    pool = F.adaptive_max_pool2d if "max" in kv_pool else F.adaptive_avg_pool2d
    expected = pool(region, side).permute(0, 2, 3, 1)
    torch.testing.assert_close(pooled[:, side[0] :, : side[1]], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("param_routing", [False, True])
def test_routing_does_not_depend_on_autocast(param_routing: bool) -> None:
    """The choice is made in float32 from what the projection gives; a soft one stays in float32 too."""
    options = {"soft_routing": True, "diff_routing": True, "param_routing": param_routing}
    attention = _attention(topk=2, n_win=2, **options, dtype=torch.float32)
    x = torch.randn(1, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        q, k, _ = attention.qkv(x).chunk(3, dim=-1)
        regions, factors = attention.score(q, k)
    exact = attention.score(q.double().float(), k.double().float())
    assert factors.dtype == torch.float32
    assert torch.equal(regions, exact[0])
    torch.testing.assert_close(factors, exact[1])


def test_soft_routing_without_gradient() -> None:
    attention = _attention(topk=2, n_win=2, soft_routing=True)
    x = torch.randn(1, 4, 4, 8, dtype=torch.float64)
    q, k, _ = attention.qkv(x).chunk(3, dim=-1)
    assert not attention.score(q, k)[1].requires_grad
    assert torch.isfinite(attention(x)).all()


def test_kinds_of_convolutions_beside_full_attention() -> None:
    x = torch.randn(2, 3, 4, 16, dtype=torch.float64)
    found = {}
    for lepe in ("none", "input", "values"):
        torch.manual_seed(0)
        attention = FullAttention(16, lepe, dtype=torch.float64)
        found[lepe] = attention
        assert hasattr(attention.lepe, "weight") == (lepe != "none")
    plain = found["none"]
    for lepe, source in (("input", x), ("values", x @ plain.qkv.weight[32:].mT)):
        other = found[lepe]
        other.qkv.load_state_dict(plain.qkv.state_dict())
        other.proj.load_state_dict(plain.proj.state_dict())
        expected = plain(x) + other.lepe(source) @ plain.proj.weight.mT
        torch.testing.assert_close(other(x), expected, rtol=1e-12, atol=1e-12)


def test_more_regions_for_detection() -> None:
    """No weight depends on the number of regions: released ones serve detection and segmentation."""
    state = timm.create_model(MODEL).state_dict()
    model = timm.create_model(MODEL, n_win=3).eval()
    model.load_state_dict(state)
    assert model(torch.randn(1, 3, 70, 101)).shape == (1, 1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topks": (1, 4, 16)}, "topks must have one entry for each of 4 stages"),
        ({"n_win": (7, 7)}, "n_win must have one entry for each of 4 stages"),
        ({"topks": (1, 4, 50, -2)}, "topk=50, n_win=7"),
        ({"topks": (1, 4, 16, -4)}, "topks must be positive, 0 or one of"),
        ({"head_dim": 48}, "head_dim must divide.*48 and 64"),
        ({"stem": "deep"}, "unknown stem 'deep', expected one of"),
        ({"kv_pool": "median"}, "unknown kv_pool 'median'"),
        ({"dims": (64, 128, 256, 500)}, "8 heads, which must divide its channels, got 500"),
        ({"depths": (2, 0, 2, 2)}, "depths and dims must be positive"),
        ({"diff_routing": True}, "param_routing needs diff_routing and that soft_routing"),
        ({"ragged": True, "kv_pool": "avgpool"}, "ragged regions have neither"),
    ],
)
def test_options_that_cannot_be_built(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BiFormer(**options)  # type: ignore[arg-type]


def test_ragged_regions_of_small_maps_are_full_attention() -> None:
    """2 x 2 tokens have fewer regions than are to be chosen, and regions have at least a token."""
    attention = _attention(ragged=True, topk=9)
    x = torch.randn(2, 2, 2, 8, dtype=torch.float64)
    q, k, v = attention.qkv(x).flatten(1, 2).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    o = F.scaled_dot_product_attention(q, k, v, scale=8**-0.5).transpose(1, 2).reshape(2, 2, 2, 8)
    lepe = attention.lepe(v.transpose(1, 2).reshape(2, 2, 2, 8))
    torch.testing.assert_close(attention(x), attention.proj(o + lepe), rtol=1e-12, atol=1e-12)


def _exported_ragged() -> tuple[BiLevelRoutingAttention, torch.export.ExportedProgram, list[Tensor]]:
    """With maps of fewer tokens a side and fewer regions than the traced one has."""
    attention = _attention(ragged=True, topk=5, dtype=torch.float32)
    example, *others = (torch.randn(*size, 8) for size in [(2, 7, 8), (1, 2, 9), (3, 2, 2), (1, 13, 4)])
    axes = ({0: Dim.AUTO, 1: Dim.AUTO, 2: Dim.AUTO},)
    return attention, torch.export.export(attention, (example,), dynamic_shapes=axes), others


def test_exported_ragged_regions_of_small_maps() -> None:
    """Of at least a token, and no more than there are, as in eager mode."""
    attention, program, maps = _exported_ragged()
    for x in maps:
        torch.testing.assert_close(program.module()(x), attention(x))


@pytest.mark.slow  # ten seconds, nearly all of it PyTorch's exporter
def test_onnx_of_ragged_regions_of_small_maps() -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason='ONNX needs pip install "subquad[export]"')
    attention, program, maps = _exported_ragged()
    written = torch.onnx.export(program.run_decompositions(EXPORT_FORMS), dynamo=True, verbose=False)
    assert written is not None
    session = onnxruntime.InferenceSession(written.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for x in (*maps, torch.randn(1, 1, 3, 8)):
        (o,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(o), attention(x))

"""Mixers and their hosts: what the recorded cases of tests/parity do not say."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.export import Dim

from subquad.backbones.hosts.cswin import MixerCSWin
from subquad.backbones.hosts.deit import MixerDeiT
from subquad.backbones.hosts.pvt import MixerPVT
from subquad.backbones.hosts.pvt_v2 import MixerPVT2
from subquad.backbones.hosts.swin import MixerSwin, checkpoint_filter_fn
from subquad.backbones.mixers import BARE_MIXERS, MIXERS, PREFIX_MIXERS, dynamic_conv, focused_features, polar_features
from subquad.backbones.weights import filter_of

mixers = pytest.mark.parametrize("mixer", MIXERS)
TWO_STAGES: dict[str, Any] = {"mixer_stages": (True, True), "sr_ratios": (2, 1), "mixer_options": ({}, {})}
SMALL_SWIN: dict[str, Any] = {"depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "embed_dim": 8, "img_size": 96}


@mixers
def test_hosts_take_any_size_on_one_instance(mixer: str) -> None:
    """Windows, shifted ones too, are padded; tables of positions are resampled."""
    hosts: list[nn.Module] = [
        MixerSwin(mixer, (1, 1, 0, 0), window_size=3, **SMALL_SWIN),
        MixerPVT(mixer, (1, 1, 1, 1), (8, 16, 16, 24), (1, 2, 2, 2), mlp_ratios=(2, 2, 2, 2), img_size=96),
        MixerPVT2(mixer, (1, 1, 1, 1), (8, 16, 16, 24), (1, 2, 2, 2), mlp_ratios=(2, 2, 2, 2), img_size=96),
    ]
    if mixer in BARE_MIXERS:
        hosts.append(MixerCSWin(mixer, (1, 0, 1, 0), stripes=(1, 2, 4), **SMALL_SWIN | {"num_heads": (2, 2, 2, 4)}))
    for host in hosts:
        host.eval()
        with torch.no_grad():
            for height, width in ((96, 96), (64, 160), (45, 101)):
                maps = host.forward_intermediates(torch.randn(1, 3, height, width), intermediates_only=True)
                assert [tuple(x.shape[2:]) for x in maps] == [(-(-height // r), -(-width // r)) for r in (4, 8, 16, 32)]
                assert all(x.isfinite().all() for x in maps)


@pytest.mark.parametrize("size", [(96, 96), (64, 64), (192, 128), (224, 96)], ids=str)
def test_windows_are_those_of_timm_at_any_size(size: tuple[int, int]) -> None:
    """An instance made for 64 px against timm's Swin made for the size: windows that cover the map are not shifted."""
    depths, heads = (2, 2, 2), (1, 2, 2)
    ours = MixerSwin("inline", (0, 0, 0), depths, heads, embed_dim=8, img_size=64, window_size=4, num_classes=5).eval()
    sizes = {"depths": depths, "num_heads": heads, "embed_dim": 8, "num_classes": 5}
    theirs = timm.models.SwinTransformer(img_size=size, window_size=4, patch_size=4, **sizes).eval()
    renames = {"stem.": "patch_embed.", "stages.": "layers.", ".attn.attn.": ".attn."}
    state = ours.state_dict()
    for mine, name in renames.items():
        state = {key.replace(mine, name): value for key, value in state.items()}
    theirs.load_state_dict(state)
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_exported_windows_take_other_sizes() -> None:
    """A program rolls by as much as the map at hand needs: not at all where one window covers an axis."""
    torch.manual_seed(0)
    model = MixerSwin("inline", (0, 0), (2, 2), (1, 2), embed_dim=8, img_size=64, window_size=4, num_classes=5).eval()
    axes = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(axes,)).module()
    for size in ((1, 128, 72), (3, 45, 101), (2, 224, 160), (1, 64, 16), (2, 16, 48)):
        x = torch.randn(size[0], 3, *size[1:])
        with torch.no_grad():
            torch.testing.assert_close(program(x), model(x))


PVT: dict[str, Any] = {"dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 2), "mlp_ratios": (2, 2, 2, 2)}
SWIN: dict[str, Any] = {"num_heads": (2, 2, 2, 4), "embed_dim": 8, "mlp_ratio": 2}
HOSTS: dict[str, Callable[[str], nn.Module]] = {
    "swin": lambda mixer: MixerSwin(mixer, (1, 1, 1, 0), (1, 1, 1, 1), **SWIN),
    "pvt": lambda mixer: MixerPVT(mixer, (1, 1, 1, 1), **PVT),
    "pvt_v2": lambda mixer: MixerPVT2(mixer, (1, 1, 1, 1), **PVT),
    "cswin": lambda mixer: MixerCSWin(mixer, (1, 1, 0, 0), (1, 1, 1, 1), **SWIN),
    "deit": lambda mixer: MixerDeiT(mixer, 8, 2, depth=1, class_token=mixer in PREFIX_MIXERS),
}
"""Made for 224 px."""


@pytest.mark.parametrize(
    ("host", "mixer"),
    [(host, mixer) for host in HOSTS for mixer in (BARE_MIXERS if host == "cswin" else MIXERS)],
)
def test_one_instance_from_224_to_detection_size(host: str, mixer: str) -> None:
    """Nothing of one size is left when the next comes."""
    torch.manual_seed(0)
    model: Any = HOSTS[host](mixer).eval()
    reductions = [16] if host == "deit" else [4, 8, 16, 32]
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        first = model(image)
        for height, width in ((384, 512), (800, 1333)):
            maps = model.forward_intermediates(torch.randn(1, 3, height, width), intermediates_only=True)
            assert [tuple(x.shape[2:]) for x in maps] == [(-(-height // r), -(-width // r)) for r in reductions]
            assert all(x.isfinite().all() for x in maps)
        assert torch.equal(model(image), first)


@pytest.mark.parametrize("mixer", ["flatten", "polaformer", "slab"])
def test_weights_for_another_image_size(mixer: str) -> None:
    """Fine-tuning at a larger size starts from resampled tables: of positions and of relative positions in windows."""
    small = MixerSwin(mixer, (1, 1, 0, 0), window_size=3, **SMALL_SWIN)
    large = MixerSwin(mixer, (1, 1, 0, 0), window_size=6, **SMALL_SWIN | {"img_size": 192})
    state = small.state_dict()
    position, table = "stages.0.blocks.0.attn.position", "stages.2.blocks.1.attn.attn.relative_position_bias_table"
    state[position] = torch.randn_like(state[position])
    state[table] = torch.arange(2.0).expand_as(state[table])
    filtered = checkpoint_filter_fn(state, large)
    large.load_state_dict(filtered)
    expected = nn.functional.interpolate(state[position].permute(0, 3, 1, 2), size=(48, 48), mode="bicubic")
    torch.testing.assert_close(filtered[position], expected.permute(0, 2, 3, 1))
    # a table that is constant over the window stays so
    torch.testing.assert_close(filtered[table], torch.arange(2.0).expand(11 * 11, 2))


@mixers
def test_mixers_declare_what_is_bound_to_a_size(mixer: str) -> None:
    """The declared tables, and no other parameters, are of another shape in a mixer for another map."""
    one, other = (dict(MIXERS[mixer](8, 2, size).named_parameters()) for size in ((4, 5), (7, 9)))
    assert one.keys() == other.keys()
    bound = {name for name in one if one[name].shape != other[name].shape}
    assert bound == set(dict(MIXERS[mixer].size_bound))  # type: ignore[attr-defined]


def test_biases_of_agents_for_another_image_size() -> None:
    """Along rows and columns linearly, in the official order of axes; the coarse tables stay as they are."""
    options = SMALL_SWIN | {"mixer": "agent", "mixer_blocks": (1, 1, 0, 0), "mixer_options": [{"agents": 9}] * 4}
    large = MixerSwin(**options | {"img_size": 192, "window_size": 14})
    block, sizes = "blocks.0.attn", {"ah": (9, 24, 1), "aw": (9, 1, 24), "ha": (24, 1, 9), "wa": (1, 24, 9)}
    official = {f"layers.0.{block}.{name}_bias": torch.randn(1, 1, *size) for name, size in sizes.items()}
    official[f"layers.0.{block}.an_bias"] = coarse = torch.randn(1, 9, 7, 7)
    fitted = checkpoint_filter_fn(official, large)
    assert torch.equal(fitted[f"stages.0.{block}.an_bias"], coarse)
    ah, aw, ha, wa = (official[f"layers.0.{block}.{name}_bias"][0] for name in sizes)
    lines = {"ah": ah[..., 0], "aw": aw[:, :, 0], "ha": ha[:, :, 0].mT, "wa": wa[:, 0].mT}  # (heads, agents, 24)
    for name, line in lines.items():
        expected = nn.functional.interpolate(line, size=48, mode="linear")
        found = fitted[f"stages.0.{block}.{name}_bias"]
        assert found.shape == large.state_dict()[f"stages.0.{block}.{name}_bias"].shape
        torch.testing.assert_close(found.flatten(2), expected)


@pytest.mark.parametrize("size", [(12, 12), (12, 5), (16, 4)], ids=["square", "oblong", "as many"])
def test_positions_of_hosts_for_another_image_size(size: tuple[int, int]) -> None:
    """The class token's own position goes to the class token; the others are resampled, for maps of any shape."""
    positions = torch.randn(1, 1 + 64, 16)
    maps = positions[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
    expected = nn.functional.interpolate(maps, size=size, mode="bicubic").permute(0, 2, 3, 1)
    image = (8 * size[0], 8 * size[1])
    deit = MixerDeiT("inline", 16, 2, depth=1, patch_size=8, img_size=image)
    token = torch.randn(1, 1, 16)
    fitted = filter_of(deit)({"cls_token": token, "pos_embed": positions}, deit)
    torch.testing.assert_close(fitted["pos_embed"], expected)
    torch.testing.assert_close(fitted["prefix_tokens"], token + positions[:, :1])
    pvt = MixerPVT("inline", (1, 1), (8, 16), (1, 2), mlp_ratios=(2, 2), img_size=image, **TWO_STAGES)
    fitted = filter_of(pvt)({"pos_embed2": positions[:, 1:]}, pvt)
    torch.testing.assert_close(fitted["stages.1.downsample.position"], expected)


def test_class_token_at_any_size_and_unfit_mixers() -> None:
    host = MixerDeiT("inline", 16, 2, depth=2, patch_size=8, img_size=64).eval()
    with torch.no_grad():
        for height, width in ((64, 64), (96, 40), (45, 101)):
            (taken,) = host.forward_intermediates(torch.randn(1, 3, height, width), indices=1, intermediates_only=True)
            assert taken.shape == (1, 16, -(-height // 8), -(-width // 8))
    with pytest.raises(
        ValueError, match=r"mixer must be one of \['agent', 'inline', 'softmax'\] with a class token, got"
    ):
        MixerDeiT("flatten", 16, 2)


def test_unknown_mixer_and_bad_stages() -> None:
    with pytest.raises(ValueError, match=r"unknown mixer 'linformer', expected one of \['agent'"):
        MixerSwin("linformer", (2, 2, 0, 0))
    with pytest.raises(ValueError, match=r"mixer_blocks must be at most depths=.*got \(3, 0, 0, 0\)"):
        MixerSwin("inline", (3, 0, 0, 0))
    with pytest.raises(ValueError, match="3 heads for 8 channels"):
        MixerSwin("inline", (1, 1, 1, 1), **SMALL_SWIN | {"num_heads": (3, 2, 2, 4)})
    with pytest.raises(ValueError, match="mixer_stages must have one entry for each of 4 stages"):
        MixerPVT("inline", (1, 1, 1, 1), mixer_stages=(True,))
    with pytest.raises(ValueError, match="mixer_options must have one entry for each of 4 stages"):
        MixerSwin("agent", (1, 1, 1, 1), mixer_options=[{"agents": 9}])
    with pytest.raises(ValueError, match=r"mlp_ratios must have one entry for each of 4 stages, got \(4, 4\)"):
        MixerPVT2("slab", (1, 1, 1, 1), mlp_ratios=(4, 4))
    with pytest.raises(ValueError, match=r"agents must have one entry for each of 12 blocks, got \(9,\)"):
        MixerDeiT("agent", 16, 2, agents=(9,))
    with pytest.raises(ValueError, match="agents are for the mixer 'agent', got mixer='softmax'"):
        MixerDeiT("softmax", 16, 2, depth=1, agents=(9,))
    with pytest.raises(ValueError, match="heads must have an even number of channels, got 6 over 2 heads"):
        MIXERS["polaformer"](6, 2, (2, 2))
    with pytest.raises(TypeError, match="depth_"):
        MixerPVT("inline", (1, 1, 1, 1), depth_=1)


@mixers
@pytest.mark.parametrize("heads", [3, 0, -2])
def test_heads_that_do_not_divide(mixer: str, heads: int) -> None:
    with pytest.raises(ValueError, match=f"num_heads must divide the channels, got {heads} heads for 8 channels"):
        MIXERS[mixer](8, heads, (2, 2))


@pytest.mark.parametrize("heads", [3, 0, -2])
@pytest.mark.parametrize("mixer", ["softmax", "inline"])
def test_heads_of_deit_that_do_not_divide(mixer: str, heads: int) -> None:
    with pytest.raises(ValueError, match=f"num_heads must divide the channels, got {heads} heads for 16 channels"):
        MixerDeiT(mixer, 16, heads, depth=1)


@pytest.mark.parametrize("size", [0, -5, (64, 0)])
def test_image_without_pixels(size: Any) -> None:
    hosts: list[Callable[..., nn.Module]] = [
        partial(MixerSwin, "inline", (1, 1, 0, 0), **SMALL_SWIN),
        partial(MixerPVT, "inline", (1, 1, 1, 1)),
        partial(MixerPVT2, "slab", (1, 1, 1, 1)),
        partial(MixerDeiT, "inline", 16, 2),
        partial(MixerCSWin, "slab", (1, 0, 1, 0), **SMALL_SWIN | {"num_heads": (2, 2, 2, 4)}),
    ]
    for host in hosts:
        with pytest.raises(ValueError, match="img_size must be positive, got"):
            host(img_size=size)


def test_sizes_of_nothing() -> None:
    for name in ("window_size", "patch_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            MixerSwin("inline", (1, 1, 0, 0), **SMALL_SWIN | {name: 0})
    for name in ("depth", "patch_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            MixerDeiT("inline", 16, 2, **{name: 0})
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        MixerDeiT("inline", 0, 2)
    with pytest.raises(ValueError, match="sr_ratios must be at least 1, got -1"):
        MixerPVT("inline", (1, 1, 1, 1), sr_ratios=(8, -1, 2, 1))


def test_hosts_hand_options_to_the_mixer() -> None:
    options = {"mixer": "agent", "mixer_options": [{"agents": number} for number in (1, 4, 9, 16)]}
    stages = {"depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2)}
    hosts: list[Any] = [
        MixerSwin(mixer_blocks=(1, 1, 1, 1), embed_dim=8, **stages, **options),
        MixerCSWin(mixer_blocks=(1, 1, 1, 1), embed_dim=8, **stages, **options),
        MixerPVT(dims=(8, 16, 16, 24), **stages, **options),
        MixerPVT2(dims=(8, 16, 16, 24), **stages, **options),
    ]
    for host in hosts:
        tables = [value for name, value in host.named_parameters() if name.endswith(".an_bias")]
        assert [table.shape[1] for table in tables] == [1, 4, 9, 16]


def test_agents_form_a_square() -> None:
    for number in (0, -4, 8):
        with pytest.raises(ValueError, match=f"^agents must be a square, got {number}"):
            MIXERS["agent"](8, 2, (2, 2), agents=number)
        with pytest.raises(ValueError, match=f"pooled_agents must be a square, got {number}"):
            MIXERS["agent"](8, 2, (2, 2), pooled_agents=number)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": "polaformer"}, r"unknown mixer 'polaformer' for CSWin, expected one of \['agent', 'flatten'"),
        ({"mixer_blocks": (1, 2, 0, 0)}, r"mixer_blocks must be at most depths=\(1, 1, 2, 1\), got \(1, 2, 0, 0\)"),
        ({"stripes": (1, 2)}, r"stripes must have a width for each of 4 stages but the last, got \(1, 2\)"),
        ({"stripes": (1, 0, 2)}, r"stripes .* got \(1, 0, 2\)"),
        ({"mixer_stripes": (0, 0)}, r"mixer_stripes must have a width for each of 4 stages, got \(0, 0\)"),
        ({"mixer_options": [{}]}, "mixer_options must have one entry for each of 4 stages"),
        ({"mixer_stripes": (2, 0, 0, 0)}, r"inline predicts one kernel for the whole map, got mixer_stripes=\(2, 0"),
        ({"num_heads": (1, 2, 2, 4)}, "stripes halve heads and channels, got 1 heads and 8 channels"),
    ],
)
def test_bad_options_of_cswin(options: dict[str, Any], message: str) -> None:
    good = SMALL_SWIN | {"mixer": "inline", "mixer_blocks": (0, 0, 0, 0), "num_heads": (2, 2, 2, 4)}
    MixerCSWin(**good)
    with pytest.raises(ValueError, match=message):
        MixerCSWin(**good | options)


@pytest.mark.parametrize("mixer", ["agent", "inline"])
def test_scripted_cswin(mixer: str) -> None:
    """InLine is called with one argument more than the others, Agent lacks a part: TorchScript compiles both."""
    model = MixerCSWin(mixer, (1, 0, 1, 0), stripes=(1, 2, 4), **SMALL_SWIN | {"num_heads": (2, 2, 2, 4)}).eval()
    x = torch.randn(1, 3, 64, 77)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize("host", ["deit", "pvt_v2"])
def test_hosts_without_a_test_model_are_scripted_and_exported(host: str) -> None:
    """The other hosts have models ``test_*``, over which timm's own tests run."""
    torch.manual_seed(0)
    model: nn.Module
    if host == "deit":
        model = MixerDeiT("agent", 16, 2, depth=2, patch_size=8, img_size=64, agents=(9, None), num_classes=3)
    else:
        model = MixerPVT2("polaformer", (1, 1, 1, 1), (8, 16, 16, 24), (1, 2, 2, 2), mlp_ratios=(2, 2, 2, 2))
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    axes = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    program = torch.export.export(model, (torch.randn(2, 3, 96, 128),), dynamic_shapes=(axes,)).module()
    scripted = torch.jit.script(model)
    for size in ((2, 96, 128), (1, 77, 101), (3, 160, 64)):
        x = torch.randn(size[0], 3, *size[1:])
        with torch.no_grad():
            expected = model(x)
            torch.testing.assert_close(program(x), expected)
            torch.testing.assert_close(scripted(x), expected)


def test_detectors_pool_to_more_agents() -> None:
    """The tables stay those of the classifier, whose checkpoint loads; as many as they are for is no change."""
    options = SMALL_SWIN | {"mixer": "agent", "mixer_blocks": (1, 1, 0, 0), "window_size": 3}
    torch.manual_seed(0)
    plain = MixerSwin(mixer_options=[{"agents": 9}] * 4, **options).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for pooled, same in ((9, True), (25, False)):
            other = MixerSwin(mixer_options=[{"agents": 9, "pooled_agents": pooled}] * 4, **options).eval()
            other.load_state_dict(plain.state_dict())
            assert torch.allclose(other.forward_features(x), plain.forward_features(x)) == same


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_focusing_survives_small_and_large_features(scale: float) -> None:
    """A token without a positive channel has features of 1e-6, whose third power underflows 16 bits."""
    q, k = -torch.rand(1, 3, 8).abs() * scale, torch.randn(1, 3, 8) * scale
    features = focused_features(q.half(), k.half(), torch.zeros(1, 3, 8), torch.zeros(8), 3)
    exact = focused_features(q.half().double(), k.half().double(), torch.zeros(1, 3, 8), torch.zeros(8).double(), 3)
    for mine, expected in zip(features, exact, strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=0)


def test_powers_of_nothing_have_gradients() -> None:
    """0 ** p, with a gradient to both, where a channel of a query or a key is 0 or of the other sign."""
    q, k, position = torch.zeros(1, 3, 2, 8), -torch.rand(1, 3, 2, 8), torch.zeros(1, 3, 2, 8)
    leaves = [q, k, position, torch.zeros(16), torch.zeros(2, 8)]  # the last two are scale and power
    features = polar_features(*(leaf.requires_grad_() for leaf in leaves))
    torch.stack(features).sum().backward()
    assert all(feature.isfinite().all() for feature in features)
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
    assert not features[0].any() and features[2][..., 8:].all()


def test_dynamic_convolution_is_a_grouped_one() -> None:
    x, kernels = torch.randn(3, 4 * 5, 6, dtype=torch.float64), torch.randn(3, 6, 9, dtype=torch.float64)
    maps = x.unflatten(1, (4, 5)).permute(0, 3, 1, 2).reshape(1, 18, 4, 5)
    expected = nn.functional.conv2d(maps, kernels.reshape(18, 1, 3, 3), padding=1, groups=18)
    expected = expected.reshape(3, 6, 20).transpose(1, 2)
    torch.testing.assert_close(dynamic_conv(x, kernels, 4, 5), expected)

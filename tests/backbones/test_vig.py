"""ViG: what the recorded cases of tests/parity do not say."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

from subquad import ops
from subquad.backbones.vig import GatedAttention, HierarchicalViG, ViG, checkpoint_filter_fn

TINY: dict[str, Any] = {"dim": 32, "depth": 2, "num_heads": 2, "img_size": 64, "num_classes": 5}
SMALL: dict[str, Any] = {"depths": (1, 1), "dims": (8, 12), "num_heads": (1, 2), "num_classes": 5}


def test_mixer_is_a_recurrence_over_tokens_with_a_local_branch() -> None:
    """The whole mixer once more in float64, token by token."""
    torch.manual_seed(0)
    mixer = GatedAttention(8, 2, conv_act=True, out_act=True).double()
    x = torch.randn(1, 3, 4, 8, dtype=torch.float64)
    s = F.silu(F.conv2d(x.permute(0, 3, 1, 2), mixer.conv.weight, padding=1, groups=8)).flatten(2)[0].T  # (L, C)
    q, k, v = (s @ mixer.qkv.weight.T).split([4, 4, 8], dim=-1)
    gates = s @ mixer.gate_down.weight.T @ mixer.gate_up.weight.T + mixer.gate_up.bias
    decays = torch.sigmoid(gates) ** (1 / 16)
    heads = []
    for h in range(2):
        key, value = slice(2 * h, 2 * h + 2), slice(4 * h, 4 * h + 4)
        total = torch.zeros(12, 4, dtype=torch.float64)
        for direction, order in enumerate((range(12), range(11, -1, -1))):
            state = torch.zeros(2, 4, dtype=torch.float64)
            for t in order:
                decay = decays[t, 4 * direction :][key]
                state = decay[:, None] * state + torch.outer(k[t, key], v[t, value])
                total[t] += q[t, key] @ state * 2**-0.5 / 2
        local = s[:, value]
        normed, local = (part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() for part in (total, local))
        share = torch.sigmoid(s @ mixer.blend.weight.T + mixer.blend.bias)[:, value]
        heads.append(normed * share + local * (1 - share))
    expected = (F.silu(torch.cat(heads, -1)) @ mixer.out_proj.weight.T).view(1, 3, 4, 8)
    torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-12)


def test_isotropic_models_halve_in_eval_alone() -> None:
    """So small activations, beside which the eps of the norm counts, differ from training to eval, large ones not."""
    model = ViG(**TINY)
    mixer = model.blocks[0].mixer
    x = torch.randn(1, 3, 3, 32)
    for size, same in ((1e3, True), (1.0, False)):
        training, evaluating = mixer.train()(size * x), mixer.eval()(size * x)
        assert torch.allclose(training, evaluating, rtol=1e-3, atol=1e-7) == same
    hierarchical = HierarchicalViG(**SMALL).stages[0].blocks[0].mixer
    y = 1e-3 * torch.randn(1, 3, 3, 8)
    torch.testing.assert_close(hierarchical.train()(y), hierarchical.eval()(y))


def test_float16_sums_do_not_overflow() -> None:
    """65,536 equal tokens without decay: the state passes what float16 holds, the normed result does not."""
    mixer = GatedAttention(8, 1).half()
    tokens = torch.full((1, 65_536, 1, 4), 4.0, dtype=torch.float16)
    out = ops.gated_linear_attention(
        tokens, tokens, torch.cat([tokens] * 2, -1), torch.full((1, 65_536, 2, 1, 4), 60000.0).half(),
        gate_normalizer=16.0,
    )  # fmt: skip
    assert not out.isfinite().all()
    with torch.no_grad():
        mixer.conv.weight.zero_()[:, :, 1, 1] = 4.0
        mixer.qkv.weight.fill_(0.25)
        mixer.gate_down.weight.zero_()
        mixer.gate_up.weight.zero_()
        mixer.gate_up.bias.fill_(60000.0)
        assert mixer(torch.ones(1, 256, 256, 8, dtype=torch.float16)).isfinite().all()


def test_positions_of_another_size_are_resampled() -> None:
    model = ViG(**TINY | {"img_size": (48, 80)})
    official = torch.randn(1, 36, 32)
    expected = F.interpolate(official.unflatten(1, (6, 6)).permute(0, 3, 1, 2), size=(3, 5), mode="bicubic")
    filtered = checkpoint_filter_fn({"pos_embed": official}, model)["pos_embed"]
    torch.testing.assert_close(filtered, expected.permute(0, 2, 3, 1))
    ours = checkpoint_filter_fn({"pos_embed": official.unflatten(1, (6, 6))}, model)["pos_embed"]
    torch.testing.assert_close(ours, filtered)
    assert checkpoint_filter_fn({"pos_embed": official[:, :15]}, model)["pos_embed"].shape == (1, 3, 5, 32)
    assert checkpoint_filter_fn({"pos_embed": official[:, :8]}, model)["pos_embed"].shape == (1, 8, 32)


@pytest.mark.parametrize("size", [(6, 64), (64, 5)])
def test_images_too_small_for_the_stem(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"at least 7 x 7 pixels, got {size[0]} x {size[1]}"):
        ViG(**TINY)(torch.randn(1, 3, *size))
    assert ViG(**TINY).eval()(torch.randn(1, 3, 7, 9)).isfinite().all()


def test_only_isotropic_models_start_by_xavier() -> None:
    isotropic = ViG(**TINY | {"dim": 128}).blocks[0].mixer
    hierarchical = HierarchicalViG(**SMALL | {"dims": (128, 128)}).stages[0].blocks[0].mixer
    for mixer in (isotropic, hierarchical):
        mixer.requires_grad_(False)
    bound = 2**-2.5 * (6 / 256) ** 0.5
    assert 0.95 * bound < isotropic.blend.weight.abs().max() <= bound
    assert isotropic.out_proj.weight.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert hierarchical.blend.weight.std() == pytest.approx(0.02, rel=0.05)
    for mixer in (isotropic, hierarchical):
        assert mixer.conv.weight.abs().max() <= 2**-2.5 * (6 / (9 + 9 * 128)) ** 0.5
        assert (mixer.gate_up.bias == 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {"num_heads": 3},
        {"num_heads": 0},
        {"patch_size": 15},
        {"img_size": 8},
        {"dim": 0},
        {"depth": 0},
        {"in_chans": 0},
    ],
    ids=str,
)
def test_isotropic_options_that_cannot_be_built(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}.* got"):
        ViG(**TINY | options)


@pytest.mark.parametrize(
    "options",
    [{"num_heads": (1,)}, {"num_heads": 2}, {"num_heads": (1, 5)}, {"depths": (1, 0)}, {"in_chans": 0}],
    ids=str,
)
def test_hierarchical_options_that_cannot_be_built(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}.* got"):
        HierarchicalViG(**SMALL | options)


def test_options_combine() -> None:
    isotropic = ViG(
        **TINY | {"img_size": (64, 32)}, conv_act=True, patch_size=8, in_chans=2, drop_path_rate=0.1, global_pool="max"
    )
    hierarchical = HierarchicalViG(**SMALL, out_act=True, in_chans=2, drop_path_rate=0.1)
    for model in (isotropic, hierarchical):
        model(torch.randn(2, 2, 41, 36)).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("name", "rate"), [("vig_tiny", 0.0), ("vig_base", 0.5), ("vig_h_base", 0.6)])
def test_drop_path_rises_to_the_published_rate(name: str, rate: float) -> None:
    model = timm.create_model(name, device="meta")
    blocks = model.blocks if isinstance(model, ViG) else [block for stage in model.stages for block in stage.blocks]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    torch.testing.assert_close(rates, torch.linspace(0, rate, len(rates)).tolist())

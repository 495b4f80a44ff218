"""VMamba: what the recorded cases of tests/parity do not say."""

from __future__ import annotations

import pytest
import timm
import torch

from subquad.backbones.vmamba import SS2D, VMamba, checkpoint_filter_fn

# As published by the authors of MzeroMiko/VMamba, there in millions; exact by instantiation of their models.
PARAMETERS = {
    "vmamba_tiny": 30_249_064,
    "vmamba_tiny_s2l5": 30_705_832,
    "vmamba_small": 50_147_752,
    "vmamba_small_s1l20": 49_012_840,
    "vmamba_base": 88_557_800,
    "vmamba_base_s1l20": 86_614_504,
    "vmamba_tiny_vanilla": 22_893_448,
    "vmamba_small_vanilla": 44_417_416,
    "vmamba_base_vanilla": 76_254_056,
}


def test_every_released_variant_is_listed() -> None:
    assert set(PARAMETERS) == {name for name in timm.list_models(module="vmamba") if not name.startswith("test_")}


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_parameter_count(name: str, parameters: int) -> None:
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(("name", "rate"), [("vmamba_tiny", 0.2), ("vmamba_base", 0.6)])
def test_drop_path_rises_to_the_published_rate(name: str, rate: float) -> None:
    model = timm.create_model(name, device="meta")
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    torch.testing.assert_close(rates, torch.linspace(0, rate, len(rates)).tolist())


def test_scan_starts_as_mamba_does() -> None:
    mixer = SS2D(64, d_state=16)
    torch.testing.assert_close(-mixer.A_log.exp()[2, 5], -torch.arange(1.0, 17.0))
    assert (mixer.D == 1).all()
    step = torch.nn.functional.softplus(mixer.dt_bias)
    assert 0.001 - 1e-6 < step.min() < 0.0015 and 0.07 < step.max() < 0.1 + 1e-6
    assert mixer.dt_weight.abs().max() <= 0.5  # rank 4


@pytest.mark.parametrize(
    "options",
    [
        {"depths": (1, 1), "dims": (8, 16, 24)},
        {"depths": (1, 0), "dims": 8},
        {"d_state": 0},
        {"d_state": 1.5},
        {"ssm_ratio": 0.0},
        {"mlp_ratio": -1.0},
        {"dt_rank": "full"},
        {"dt_rank": 0},
        {"kernel_size": 4},
        {"in_chans": 0},
        {"stem": "v1"},
        {"downsample": "v3"},
    ],
)
def test_options_that_cannot_be_built(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}.* got|unknown"):
        VMamba(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("downsample", ["conv", "patch", "merge"])
@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_options_combine(stem: str, downsample: str) -> None:
    model = VMamba(
        (1, 1), (8, 12), stem=stem, downsample=downsample, gated=True, out_act=True, patch_norm=False, dt_rank=3,
        kernel_size=5, in_chans=2, num_classes=4, drop_path_rate=0.1,
    )  # fmt: skip
    model(torch.randn(2, 2, 41, 36)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_filter_leaves_misshaped_entries_to_the_loader() -> None:
    model = timm.create_model("test_vmamba")
    state = model.state_dict() | {"layers.0.blocks.0.op.A_logs": torch.zeros(7, 1), "head.weight": torch.zeros(3, 48)}
    del state["stages.0.blocks.0.mixer.A_log"], state["head.fc.weight"]
    filtered = checkpoint_filter_fn(state, model)
    assert filtered["stages.0.blocks.0.mixer.A_log"].shape == (7, 1)
    assert filtered["head.fc.weight"].shape == (3, 48)

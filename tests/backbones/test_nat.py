"""NAT: what the recorded cases of tests/parity do not say."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.backbones import weights
from subquad.backbones.nat import NAT

FRAMES = {"conv": "levels", "patch": "layers"}
"""What stages are called officially, in NAT and DiNAT, and in DiNAT_s."""


def _official(state: dict[str, Tensor], stages: str) -> dict[str, Tensor]:
    """Our weights under the names of the official code."""
    names = [
        (r"^stem\.conv1\.", "patch_embed.proj.0."),
        (r"^stem\.conv2\.", "patch_embed.proj.1."),
        (r"^stem\.", "patch_embed."),
        *((rf"^stages\.{i + 1}\.downsample\.", f"{stages}.{i}.downsample.") for i in range(3)),
        (r"^stages\.", f"{stages}."),
        (r"\.ls([12])\.gamma$", r".gamma\1"),
        (r"^head\.fc\.", "head."),
    ]
    return weights.rename(state, names)


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_official_checkpoints(wrapper: str | None, frame: str, tmp_path: Path) -> None:
    """A flat file for classification; a detector's has the backbone under a prefix, with a norm for each level."""
    state = timm.create_model("test_nat", frame=frame).state_dict()
    official = _official(state, FRAMES[frame])
    if wrapper is not None:
        official = {f"backbone.{name}": value for name, value in official.items()}
        official |= {f"backbone.norm{i}.weight": torch.ones(8 * 2**i) for i in range(4)}
    torch.save(official if wrapper is None else {wrapper: official, "meta": {"epoch": 12}}, tmp_path / "official.pth")
    model = timm.create_model("test_nat", frame=frame)
    weights.load_checkpoint(model, tmp_path / "official.pth")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_no_weight_decay_of_the_bias_tables() -> None:
    names = timm.create_model("test_nat").no_weight_decay()
    assert len(names) == 5
    assert {name.rpartition(".")[2] for name in names} == {"rpb"}


def test_bias_tables_are_initialised_again() -> None:
    model = timm.create_model("test_nat", device="meta").to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    model.init_weights()
    table = model.stages[1].blocks[1].attn.rpb
    assert 0.01 < table.std() < 0.03


def test_a_table_for_another_kernel_size(tmp_path: Path) -> None:
    """As the authors made the weights for windows of 11 from those for 7."""
    state = timm.create_model("test_nat").state_dict()
    torch.save(state, tmp_path / "weights.pth")
    model = timm.create_model("test_nat", kernel_size=5)
    weights.load_checkpoint(model, tmp_path / "weights.pth")
    name = "stages.1.blocks.1.attn.rpb"
    expected = F.interpolate(state[name][None], size=(9, 9), mode="bicubic")[0]
    torch.testing.assert_close(model.state_dict()[name], expected)
    with pytest.raises(ValueError, match="rpb"):
        weights.load_checkpoint(timm.create_model("test_nat", num_heads=(1, 2, 4, 4)), tmp_path / "weights.pth")


def test_dilations_of_another_task() -> None:
    """Weights fit them; what the released detectors do with small maps is an option."""
    state = timm.create_model("test_nat").state_dict()
    dilations = ((1,), (1, 4), (3,), (1,))
    padded = timm.create_model("test_nat", dilations=dilations).eval()
    strict = timm.create_model("test_nat", dilations=dilations, pad_small_maps=False).eval()
    for model in (padded, strict):
        model.load_state_dict(state)
    large, small = torch.randn(1, 3, 160, 176), torch.randn(1, 3, 64, 160)
    torch.testing.assert_close(padded(large), strict(large))
    assert padded(small).isfinite().all()
    with pytest.raises(ValueError, match=r"on axis 0 .* at most the map's 8, got 3 \* 4 = 12"):
        strict(small)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": (2, 4, 8)}, "one entry a stage.*num_heads"),
        ({"num_heads": (3, 4, 8, 16)}, "3 heads for 64 channels"),
        ({"depths": (3, 0, 6, 5)}, r"depths must be positive, got \(3, 0, 6, 5\)"),
        ({"frame": "swin"}, r"unknown frame 'swin', expected one of \['conv', 'patch'\]"),
        ({"kernel_size": 0}, "kernel_size must be a positive integer, got 0"),
        ({"kernel_size": (7, 7)}, r"kernel_size must be a positive integer, got \(7, 7\)"),
        ({"dilations": (1, 1, 1, 1)}, r"dilations must be positive, one a block of .* got \(1, 1, 1, 1\)"),
        ({"dilations": ((1,), (1, 2, 1, 2), (1,) * 6, (1,) * 5)}, r"one a block of depths=\(3, 4, 6, 5\)"),
        ({"dilations": ((1, 0, 1), (1,) * 4, (1,) * 6, (1,) * 5)}, "dilations must be positive"),
    ],
)
def test_options_that_cannot_be_built(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NAT(**options)  # type: ignore[arg-type]

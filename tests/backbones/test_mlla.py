"""MLLA: what the recorded cases of tests/parity do not say."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from subquad.backbones import weights
from subquad.backbones.mlla import MLLA

MODEL = "test_mlla"


def _official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the names of the official code, with the rotary tables that it keeps."""
    names = [
        (r"^stem\.", "patch_embed."),
        *((rf"^stages\.{i + 1}\.downsample\.", f"layers.{i}.downsample.conv.") for i in range(3)),
        (r"^stages\.", "layers."),
        (r"\.gate_proj\.", ".act_proj."),
        (r"(blocks\.\d+)\.conv\.", r"\1.dwc."),
        (r"\.conv\.expand\.", ".conv.0."),
        (r"\.conv\.conv\.", ".conv.1."),
        (r"\.conv\.reduce\.", ".conv.2."),
        (r"^head\.fc\.", "head."),
    ]
    return weights.rename(state, names) | {"layers.0.blocks.0.attn.rope.rotations": torch.zeros(24, 24, 4, 2)}


@pytest.mark.parametrize("wrapper", ["model", "state_dict_ema", "state_dict", None])
def test_official_checkpoints(wrapper: str | None, tmp_path: Path) -> None:
    state = timm.create_model(MODEL).state_dict()
    official = _official(state)
    content = official if wrapper is None else {wrapper: official, "config": argparse.Namespace(), "epoch": 299}
    torch.save(content, tmp_path / "official.pth")
    model = timm.create_model(MODEL)
    weights.load_checkpoint(model, tmp_path / "official.pth")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_weights_of_the_evaluation_come_before_averaged_ones(tmp_path: Path) -> None:
    state = timm.create_model(MODEL).state_dict()
    averaged = {name: value + 1 for name, value in state.items()}
    torch.save({"state_dict_ema": _official(averaged), "model": _official(state)}, tmp_path / "official.pth")
    for key, expected in ((None, state), ("state_dict_ema", averaged)):
        model = timm.create_model(MODEL)
        weights.load_checkpoint(model, tmp_path / "official.pth", key=key)
        assert torch.equal(model.norm.weight, expected["norm.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": (2, 4, 8)}, "one entry a stage.*num_heads"),
        ({"depths": (2, 0, 2, 2)}, r"depths must be positive, got \(2, 0, 2, 2\)"),
        ({"num_heads": (3, 4, 8, 16)}, "3 heads for 64 channels"),
        ({"num_heads": (64, 4, 8, 16)}, "64 heads for 64 channels"),
        ({"num_heads": (0, 4, 8, 16)}, "0 heads"),
        ({"embed_dim": 6, "num_heads": (1, 1, 1, 1)}, "embed_dim must be a multiple of 4.*got 6"),
    ],
)
def test_options_that_cannot_be_built(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLLA(**options)  # type: ignore[arg-type]

"""Checkpoints of the authors' detectors: loaded by mmengine into ``SubquadBackbone``, they give the recorded maps."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmengine", reason='needs mmengine: pip install "subquad[mm]"')

from mmengine.runner.checkpoint import load_checkpoint

from subquad.heads.openmmlab import SubquadBackbone, backbone


def _is_detector(case: Any) -> bool:
    return any(name.startswith("out/det") for name in case.tensors())


def _dump(case: Any, rename: list[tuple[str, str]]) -> dict[str, Any]:
    """As mmdet and mmseg save a model: without the classifier, with other parts and training state."""
    state = {f"backbone.{name}": value for name, value in _renamed(case, rename).items()}
    return {"meta": {"epoch": 12}, "state_dict": {**state, "neck.weight": torch.ones(2, 2), "neck.bias": torch.ones(2)}}


def _renamed(case: Any, rename: list[tuple[str, str]]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in case.state().items():
        if not re.match(case.system.CLASSIFIER, name):
            for pattern, replacement in rename:
                name = re.sub(pattern, replacement, name)
            renamed[name] = value
    # what recorded states lack of batch norms
    means = [name for name in renamed if name.endswith(".running_mean")]
    counters = {name.replace(".running_mean", ".num_batches_tracked"): torch.tensor(0) for name in means}
    return counters | renamed


@pytest.mark.cases(where=_is_detector)
@torch.no_grad()
def test_detector_checkpoint(
    case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assert_recorded: Callable[..., None]
) -> None:
    """Under the names of today and, where a system states others, of an older release."""
    monkeypatch.setattr(backbone, "_create", lambda *_, **__: case.system.build(case.sidecar["constructor"]))
    recorded = case.tensors()
    levels = tuple(i for i in range(4) if f"out/det{i}" in recorded)
    for rename in ([], getattr(case.system, "LEGACY_NAMES", [])):
        detector = nn.Module()
        detector.backbone = SubquadBackbone("test_vmamba", levels, out_norm=True)
        detector.neck = nn.Linear(2, 2)
        torch.save(_dump(case, rename), tmp_path / "detector.pth")
        load_checkpoint(detector, str(tmp_path / "detector.pth"), map_location="cpu", strict=True)
        assert torch.equal(detector.neck.weight, torch.ones(2, 2))
        for i, y in enumerate(detector.eval().backbone(recorded["input"])):
            assert_recorded(case, f"out/det{i}", y, recorded[f"out/det{i}"])

        started = SubquadBackbone("test_vmamba", levels, out_norm=True, checkpoint=str(tmp_path / "detector.pth"))
        started.init_weights()
        for name, value in detector.backbone.state_dict().items():
            assert torch.equal(started.state_dict()[name], value), name

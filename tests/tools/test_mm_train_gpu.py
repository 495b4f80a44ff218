"""``subquad mm_train`` at full size on GPUs: mixed precision, speed beside timm's Swin, two processes, sharding.

Run with ``pytest -m gpu -s tests/tools/test_mm_train_gpu.py``; each run prints a line with losses, speed and memory.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet", reason='needs mmdet and mmseg: pip install "subquad[mm]"')

import subquad.heads.openmmlab  # noqa: F401  before mmcv.ops
from subquad import configs
from subquad.tools import mm_train

pytestmark = pytest.mark.gpu

DETECTION = "mmdet/vmamba/mask-rcnn_vmamba-tiny_fpn_1x_coco.py"
SEGMENTATION = "mmseg/vmamba/upernet_vmamba-tiny_160k_ade20k-512.py"
# The models are of one size, and so are their maps.
BACKBONES = {
    "vmamba_tiny": (),
    "swin_tiny": (
        "model.backbone.model_name=swin_tiny_patch4_window7_224",
        "model.backbone.model_args.strict_img_size=False",
    ),
}


@pytest.mark.parametrize("config", [DETECTION, SEGMENTATION], ids=["mask-rcnn", "upernet"])
@pytest.mark.parametrize(("backbone", "amp"), [("vmamba_tiny", "bf16"), ("vmamba_tiny", "fp16"), ("swin_tiny", "bf16")])
@pytest.mark.timeout(600)
def test_fifty_iterations(
    backbone: str, config: str, amp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights learn made data at 1333 x 800 and 512 x 512."""
    # A config that asks for cuDNN's search leaves it on in the process; the shapes of a detector's heads never repeat.
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    torch.cuda.reset_peak_memory_stats()
    options = mm_train.Options(
        config,
        work_dir=tmp_path,
        smoke=True,
        full_size=True,
        iterations=50,
        amp=amp,
        cfg_options=BACKBONES[backbone],
    )
    summary = mm_train.run(options)
    assert len(summary.losses) == 50 and all(map(math.isfinite, summary.losses))
    assert np.mean(summary.losses[-10:]) < np.mean(summary.losses[:10])
    print(f"\n{backbone} {config.split('/')[-1]} {amp}: {summary}")


def _torchrun(processes: int, config: Path, work_dir: Path, *options: str) -> dict[str, Any]:
    """A smoke run in processes of its own; returns what ``smoke.json`` says."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "subquad.tools.mm_train", str(config), "--smoke", "--launcher", "pytorch"]
    command += ["--work-dir", str(work_dir), *options]
    environment = os.environ | {"NVIDIA_TF32_OVERRIDE": "0"}
    done = subprocess.run(command, cwd=work_dir.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((work_dir / "smoke.json").read_text())


@pytest.fixture
def plain_config(tmp_path: Path) -> Path:
    """Semantic FPN without anything random, on SGD, whose steps are as close as the gradients are."""
    bases = [
        str(configs.path(f"mmseg/_base_/{part}"))
        for part in ("models/semantic-fpn", "datasets/ade20k", "schedules/adamw_80k_semantic-fpn", "runtime")
    ]
    path = tmp_path / "plain.py"
    path.write_text(f"""
_base_ = {bases}
model = dict(
    backbone=dict(model_name="test_vmamba", drop_path_rate=0.0),
    neck=dict(in_channels=[16, 24, 32, 48]),
    decode_head=dict(dropout_ratio=0.0),
)
train_dataloader = dict(dataset=dict(pipeline=[
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="Resize", scale=(512, 512), keep_ratio=False),
    dict(type="PackSegInputs"),
]))
optim_wrapper = dict(optimizer=dict(_delete_=True, type="SGD", lr=0.01))
""")
    return path


@pytest.fixture
def weights(plain_config: Path, tmp_path: Path) -> Path:
    """Of the plain config: the strategies draw random ones in another order."""
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope("mmseg")
    cfg = Config.fromfile(plain_config).model
    cfg.backbone.pretrained = False
    model = MODELS.build(cfg)
    model.init_weights()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_two_gpus_are_one(plain_config: Path, tmp_path: Path) -> None:
    """At an equal global batch; the same eight images in each step, in another order."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    common = ("--iterations", "5", "--cfg-options")
    one = _torchrun(1, plain_config, tmp_path / "one", *common, "train_dataloader.batch_size=8")
    two = _torchrun(2, plain_config, tmp_path / "two", *common, "train_dataloader.batch_size=4")
    assert len(one["losses"]) == 5 and one["losses"][-1] < one["losses"][0]
    # sums in another order, grown over five steps
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-4)


@pytest.mark.parametrize("processes", [1, 2])
def test_sharded(processes: int, plain_config: Path, weights: Path, tmp_path: Path) -> None:
    """FSDP gives the losses of DDP from the same weights."""
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    common = ("--iterations", "3", "--load-from", str(weights), "--cfg-options", "train_dataloader.batch_size=4")
    plain = _torchrun(processes, plain_config, tmp_path / "ddp", *common)
    sharded = _torchrun(processes, plain_config, tmp_path / "fsdp", "--strategy", "fsdp", *common)
    np.testing.assert_allclose(sharded["losses"], plain["losses"], rtol=1e-4)


def test_standin_on_a_gpu_is_that_on_the_cpu() -> None:
    from mmcv import ops

    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(300, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + torch.rand(300, 2, generator=generator) * 40 + 1], dim=1)
    scores, classes = torch.rand(300, generator=generator), torch.arange(300) % 5
    how = {"type": "nms", "iou_threshold": 0.5}
    kept = [ops.batched_nms(boxes.to(d), scores.to(d), classes.to(d), how)[1].cpu() for d in ("cpu", "cuda")]
    assert torch.equal(*kept)

    rois = torch.cat([torch.zeros(300, 1), boxes], dim=1)
    x = torch.randn(1, 8, 32, 32, generator=generator)
    found = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device, memory_format=torch.channels_last).requires_grad_()
        pooled = ops.roi_align(leaf, rois.to(device), (7, 7), 0.25, 2)
        pooled.square().sum().backward()
        assert leaf.grad is not None
        found.append((pooled.detach().cpu(), leaf.grad.cpu()))
    # sums of up to 300 RoIs in another order
    for ours, reference in zip(*found[::-1], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4 * reference.abs().max().item())

    logits, target = torch.randn(64, 5, generator=generator), torch.arange(64) % 6
    losses = [
        ops.sigmoid_focal_loss(logits.to(d), target.to(d), 2.0, 0.25, None, "none").cpu() for d in ("cpu", "cuda")
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)

"""Training under autocast stays finite: 200 steps of every model and mixer with linear attention."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from subquad.backbones.hosts.cswin import MixerCSWin
from subquad.backbones.hosts.pvt import MixerPVT
from subquad.backbones.mixers import MIXERS

STEPS = 200
CSWIN = "inline in CSWin"  # where InLine takes the mean of what no norm has seen
FAMILIES = ["test_mlla", "test_ravlt", "test_mavit", "test_nalaformer"]


def _model(name: str) -> nn.Module:
    """A family's test model, or the mixer of that name in a small PVT, or InLine in a small CSWin."""
    torch.manual_seed(0)
    if name == CSWIN:
        sizes: dict[str, Any] = {"stripes": (1, 2, 2), "img_size": 32, "mlp_ratio": 2.0, "num_classes": 4}
        return MixerCSWin("inline", (1, 1, 1, 0), (1, 1, 1, 1), (2, 2, 2, 4), 8, **sizes)
    if name not in MIXERS:
        return timm.create_model(name, num_classes=4)
    # SLAB comes with a norm of its own, which is a batch norm alone for the last steps.
    options = {"norm": "prepbn", "norm_steps": STEPS * 4 // 5} if name == "slab" else {}
    return MixerPVT(
        name,
        (1, 1, 1, 1),
        (8, 16, 16, 24),
        (1, 2, 2, 2),
        mlp_ratios=(2, 2, 2, 2),
        img_size=32,
        num_classes=4,
        **options,
    )


def _train(name: str, device: str, dtype: torch.dtype) -> None:
    """At a learning rate and with inputs larger than usual, so that activations grow; one batch, to be learnt.

    The scaler of float16 halves its scale where a gradient overflows; a loss never does.
    """
    model = _model(name).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    images = 3 * torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.arange(4, device=device)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            loss = nn.functional.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    assert torch.stack(losses).isfinite().all()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    "name",
    # The mixers' official code overflows, or its users report NaN; the families run on request.
    [*MIXERS, CSWIN, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)],
)
def test_float16_on_a_cpu(name: str) -> None:
    _train(name, "cpu", torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES, *MIXERS, CSWIN])
def test_bfloat16_on_a_cpu(name: str) -> None:
    _train(name, "cpu", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*FAMILIES, *MIXERS, CSWIN])
def test_float16_on_a_gpu(name: str) -> None:
    _train(name, "cuda", torch.float16)

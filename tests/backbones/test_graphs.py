"""Training through CUDA graphs, as the README says: what a small model on a fast GPU needs."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn.functional import cross_entropy

import subquad.backbones  # noqa: F401


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["test_vmamba", "test_nat", "test_mlla", "test_vig"])
def test_graphed_training(name: str) -> None:
    """Losses and gradients of the replayed passes are those of the eager ones, on images that were not captured."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, drop_path_rate=0.0).cuda().train()
    size = model.default_cfg["input_size"][-1]
    images, labels = torch.randn(3, 2, 3, size, size, device="cuda"), torch.randint(7, (2,), device="cuda")

    def step(batch: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = cross_entropy(model(batch), labels)
        loss.backward()
        return [loss.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    eager = [step(batch) for batch in images]
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        torch.cuda.make_graphed_callables(model, (torch.zeros_like(images[0]),))
    for batch, expected in zip(images, eager, strict=True):
        found = step(batch)
        assert len(found) == len(expected)
        # One number after the other may come from another algorithm of cuBLAS: rounding of bfloat16.
        have, want = (torch.cat([value.flatten() for value in values]) for values in (found, expected))
        assert (have - want).norm() < 2e-2 * want.norm()

"""The models of the benchmark: ours from timm's registry, and the peers that timm brings."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import timm
import torch
from torch import Tensor, nn

import subquad  # noqa: F401  (registers our models)

# Published ImageNet-1K top-1 at 224: the repositories of VMamba (arXiv 2401.10166) and MLLA (2405.16605), Swin
# (2103.14030), ConvNeXt (2201.03545), DeiT (2012.12877).
TOP1 = {
    "vmamba_tiny": 82.6,
    "vmamba_tiny_s2l5": 82.5,
    "vmamba_small": 83.6,
    "vmamba_small_s1l20": 83.3,
    "vmamba_base": 83.9,
    "vmamba_base_s1l20": 83.8,
    "vmamba_tiny_vanilla": 82.2,
    "vmamba_small_vanilla": 83.5,
    "vmamba_base_vanilla": 83.7,
    "mlla_tiny": 83.5,
    "mlla_small": 84.4,
    "mlla_base": 85.3,
    "swin_tiny_patch4_window7_224": 81.3,
    "convnext_tiny": 82.1,
    "deit_small_patch16_224": 79.8,
}


@dataclass(frozen=True)
class ModelSystem:
    """A model of the benchmark.

    Attributes:
        name: shown in the tables and matched by the filters.
        timm_name: what ``timm.create_model`` builds.
        sized: whether it must be built for the resolution (``img_size``).
        channels_last: memory format of weights and images.
        ours: whether it is ours, and so has to pass the correctness gate.
        context: entered around all of its work, with the model.
    """

    name: str
    timm_name: str
    sized: bool = False
    channels_last: bool = False
    ours: bool = False
    context: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def build(self, resolution: int, device: torch.device) -> nn.Module:
        """A fresh model with random weights for square images of ``resolution``."""
        options: dict[str, Any] = {"img_size": resolution} if self.sized else {}
        model = timm.create_model(self.timm_name, pretrained=False, **options)
        return model.to(device).to(memory_format=self.memory_format)


PEERS = (
    ModelSystem("swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224", sized=True),
    ModelSystem("convnext_tiny", "convnext_tiny", channels_last=True),
    ModelSystem("deit_small_patch16_224", "deit_small_patch16_224", sized=True),
    ModelSystem("resnet50", "resnet50", channels_last=True),
)


def our_models() -> tuple[str, ...]:
    """Names of our models in timm's registry."""
    return tuple(name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("subquad."))


def ours(name: str) -> ModelSystem:
    """One of our models."""
    return ModelSystem(name, name, ours=True)


def core_off(name: str) -> ModelSystem:
    """One of our models whose op hands its input through: an upper bound for any work on the op's kernels."""
    return ModelSystem(f"{name}, core off", name, context=pass_through)


@contextmanager
def pass_through(model: nn.Module) -> Iterator[None]:
    """Replace the op in the module of the model's class: the scan by a cast to the output dtype, attention by v."""
    family = sys.modules[type(model).__module__]

    def scan(x: Tensor, *args: Any, out_dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        return x.to(out_dtype or x.dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return v

    op, hand_through = ("attend", attend) if hasattr(family, "attend") else ("selective_scan", scan)
    with patch.object(family, op, hand_through):
        yield

"""The models of the benchmark: ours from timm's registry, and the peers that timm brings."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import timm
import torch
from torch import Tensor, nn

from subquad.backbones import layers
from subquad.ops import NeighborhoodAttention2D
from subquad.ops.window_attention import patch as patch_windows

# Published ImageNet-1K top-1 at the model's default size: the authors' repositories of our families, Swin (2103.14030),
# ConvNeXt (2201.03545), DeiT (2012.12877).
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
    "vim_tiny": 76.1,
    "vim_tiny_stride8": 78.3,
    "vim_small": 80.5,
    "vim_small_stride8": 81.6,
    "vim_base": 81.9,
    "msvmamba_nano": 77.3,
    "msvmamba_micro": 79.8,
    "msvmamba_tiny": 82.8,
    "msvmamba_tiny_v2": 83.0,
    "msvmamba_small_v2": 84.1,
    "msvmamba_base_v2": 84.4,
    "vig_tiny": 77.2,
    "vig_small": 81.7,
    "vig_base": 82.6,
    "vig_h_tiny": 82.8,
    "vig_h_small": 83.8,
    "vig_h_base": 84.2,
    "mlla_tiny": 83.5,
    "mlla_small": 84.4,
    "mlla_base": 85.3,
    "nalaformer_tiny": 82.6,
    "nalaformer_small": 84.3,
    "nalaformer_base": 85.2,
    "nalaformer_large": 85.7,
    "nat_mini": 81.8,
    "nat_tiny": 83.2,
    "nat_small": 83.7,
    "nat_base": 84.3,
    "dinat_mini": 81.8,
    "dinat_tiny": 82.7,
    "dinat_small": 83.8,
    "dinat_base": 84.4,
    "dinat_large": 86.6,
    "dinat_large_384": 87.4,
    "dinat_large_384_11x11": 87.5,
    "dinat_s_tiny": 81.8,
    "dinat_s_small": 83.5,
    "dinat_s_base": 83.8,
    "dinat_s_large": 86.5,
    "dinat_s_large_384": 87.4,
    "nat_isotropic_small": 80.0,
    "nat_isotropic_base": 81.6,
    "dinat_isotropic_small": 80.8,
    "dinat_isotropic_base": 82.1,
    "vitrpb_small": 81.2,
    "vitrpb_base": 82.5,
    "biformer_tiny": 81.4,
    "biformer_small": 83.8,
    "biformer_base": 84.3,
    "biformer_stl": 82.7,
    "biformer_stl_nchw": 82.7,
    "flatten_swin_tiny": 82.1,
    "flatten_swin_small": 83.5,
    "flatten_swin_base": 83.8,
    "flatten_swin_base_384": 85.0,
    "inline_swin_tiny": 82.4,
    "inline_swin_small": 83.6,
    "inline_swin_base": 84.1,
    "flatten_pvt_tiny": 77.8,
    "inline_pvt_tiny": 78.2,
    "inline_pvt_small": 82.0,
    "inline_pvt_medium": 83.2,
    "inline_pvt_large": 83.6,
    "inline_deit_tiny": 74.5,
    "inline_deit_small": 80.2,
    "inline_deit_base": 82.3,
    "flatten_pvt_v2_b0": 71.1,
    "agent_swin_tiny": 82.6,
    "agent_swin_small": 83.7,
    "agent_swin_small_288": 84.1,
    "agent_swin_base": 84.0,
    "agent_swin_base_384": 84.9,
    "agent_pvt_tiny": 78.4,
    "agent_pvt_small": 82.2,
    "agent_pvt_medium": 83.4,
    "agent_pvt_medium_256": 83.8,
    "agent_pvt_large": 83.7,
    "agent_deit_tiny": 74.9,
    "agent_deit_small": 80.5,
    "agent_deit_small_448": 83.1,
    "agent_deit_base": 82.0,
    "agent_cswin_tiny": 83.1,
    "agent_cswin_small": 83.9,
    "agent_cswin_base": 84.7,
    "agent_cswin_base_384": 85.8,
    "flatten_cswin_tiny": 83.1,
    "inline_cswin_tiny": 83.2,
    "inline_cswin_small": 83.8,
    "inline_cswin_base": 84.5,
    "polaformer_pvt_tiny": 78.8,
    "polaformer_pvt_small": 81.9,
    "polaformer_swin_tiny": 82.6,
    "polaformer_swin_small": 83.6,
    "polaformer_swin_base": 83.8,
    "slab_cswin_tiny": 82.8,
    "slab_swin_tiny": 81.8,
    "slab_swin_small": 83.6,
    "slab_pvt_tiny": 76.5,
    "slab_deit_tiny": 74.3,
    "slab_deit_small": 80.0,
    "prepbn_swin_tiny": 81.4,
    "prepbn_pvt_tiny": 76.0,
    "prepbn_pvt_small": 80.1,
    "prepbn_pvt_medium": 81.7,
    "prepbn_deit_tiny": 73.6,
    "prepbn_deit_small": 80.2,
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
        change: what is done to the built model.
        context: entered around all of its work, with the model.
    """

    name: str
    timm_name: str
    sized: bool = False
    channels_last: bool = False
    ours: bool = False
    change: Callable[[nn.Module], nn.Module] = lambda model: model
    context: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def build(self, resolution: int, device: torch.device) -> nn.Module:
        """A fresh model with random weights for square images of ``resolution``."""
        options: dict[str, Any] = {"img_size": resolution} if self.sized else {}
        model = self.change(timm.create_model(self.timm_name, pretrained=False, **options))
        return model.to(device).to(memory_format=self.memory_format)


PEERS = (
    ModelSystem("swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224", sized=True),
    ModelSystem(
        "swin_tiny_patch4_window7_224, patched",
        "swin_tiny_patch4_window7_224",
        sized=True,
        ours=True,
        change=patch_windows,
    ),
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


def _hand_through_scan(x: Tensor, *args: Any, out_dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    y = x.to(out_dtype or x.dtype)
    return (y, None) if kwargs.get("return_last_state") else y


def _hand_through_attention(
    q: Tensor, k: Tensor, v: Tensor, *args: Any, out_dtype: torch.dtype | None = None, **kwargs: Any
) -> Tensor:
    return v.to(out_dtype or v.dtype)


_HAND_THROUGH: dict[str, Callable[..., Any]] = {
    "attend": _hand_through_attention,
    "gated_linear_attention": _hand_through_attention,
    "selective_scan": _hand_through_scan,
}
"""For each op that a model may be built on, what takes its place."""


@contextmanager
def pass_through(model: nn.Module) -> Iterator[None]:
    """Replace the ops, in the module of the model's class and in the shared layers, by casts to the output dtype."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(NeighborhoodAttention2D, "attend", lambda layer, q, k, v: v))
        for module in (sys.modules[type(model).__module__], layers):
            for op, function in _HAND_THROUGH.items():
                if hasattr(module, op):
                    stack.enter_context(patch.object(module, op, function))
        yield

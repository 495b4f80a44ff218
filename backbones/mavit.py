"""MAViT (arXiv 2507.00698): magnitude-aware linear attention, MALA, which scales and shifts instead of dividing.

Official code and weights: https://github.com/qhfan/MALA. The parameters are those of RAVLT, name for name: only the
name of the model says which attention a checkpoint is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from subquad.backbones.registry import register_variants
from subquad.backbones.rotary_pyramid import GatedRotaryAttention, RotaryPyramid, cfg, read_official

__all__ = ["MAViT"]


class MAViT(RotaryPyramid):
    """MAViT; arguments as in ``RotaryPyramid`` but for the mixer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, mixer=partial(GatedRotaryAttention, normalizer="magnitude"), **kwargs)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """An official checkpoint under our names and in our shapes; ours pass unchanged (see ``read_official``)."""
    return read_official(state_dict, model)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return cfg(
        license="unknown",
        notes=(
            "The official code has no licence file.",
            "Weights: https://huggingface.co/aldjalkdf/MAViT, to be loaded with `subquad convert` or checkpoint_path.",
        ),
        origin_url="https://github.com/qhfan/MALA",
        paper_name="Rectifying Magnitude Neglect in Linear Attention",
        paper_ids="arXiv:2507.00698",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "mavit_tiny.in1k": _cfg(),
        "mavit_small.in1k": _cfg(),
        "mavit_base.in1k": _cfg(),
        "mavit_large.in1k": _cfg(),
        "test_mavit.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)

VARIANTS: dict[str, dict[str, Any]] = {
    "mavit_tiny": {
        "depths": (2, 2, 6, 2),
        "dims": (64, 128, 256, 512),
        "num_heads": (1, 2, 4, 8),
        "projection": 2048,
        "drop_path_rate": 0.1,
    },
    "mavit_small": {
        "depths": (3, 5, 9, 3),
        "dims": (64, 128, 320, 512),
        "num_heads": (1, 2, 5, 8),
        "projection": 2048,
        "drop_path_rate": 0.15,
    },
    "mavit_base": {
        "depths": (4, 6, 12, 6),
        "dims": (96, 192, 384, 512),
        "num_heads": (1, 2, 6, 8),
        "layer_scale": (1.0, 1.0, 1e-6, 1e-6),
        "projection": 2048,
        "drop_path_rate": 0.4,
    },
    "mavit_large": {
        "depths": (4, 7, 19, 8),
        "dims": (96, 192, 448, 640),
        "num_heads": (1, 2, 7, 10),
        "layer_scale": (1e-6, 1e-6, 1e-6, 1e-6),
        "projection": 2560,
        "drop_path_rate": 0.55,
    },
    "test_mavit": {
        "depths": (1, 1, 1, 1),
        "dims": (8, 16, 16, 24),
        "num_heads": (1, 2, 2, 2),
        "mlp_ratio": 2.0,
        "projection": 32,
    },
}

register_variants(__name__, MAViT, VARIANTS, checkpoint_filter_fn)

"""RAVLT (arXiv 2411.07635): rank-augmented linear attention, RALA, whose keys are weighted by a softmax.

Official code and weights: https://github.com/qhfan/RALA.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from subquad.backbones.registry import register_variants
from subquad.backbones.rotary_pyramid import GatedRotaryAttention, RotaryPyramid, cfg, read_official

__all__ = ["RAVLT"]


class RAVLT(RotaryPyramid):
    """RAVLT; arguments as in ``RotaryPyramid`` but for the mixer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, mixer=partial(GatedRotaryAttention, normalizer="softmax_weighted"), **kwargs)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """An official checkpoint under our names and in our shapes; ours pass unchanged (see ``read_official``)."""
    return read_official(state_dict, model)


def _cfg(file: str = "", **kwargs: Any) -> dict[str, Any]:
    return cfg(
        url=f"https://huggingface.co/aldjalkdf/RAVLT/resolve/main/{file}" if file else "",
        license="mit",
        notes=("MIT is what the model card of the weights says; the official code has no licence file.",),
        origin_url="https://github.com/qhfan/RALA",
        paper_name="Breaking the Low-Rank Dilemma of Linear Attention",
        paper_ids="arXiv:2411.07635",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "ravlt_tiny.in1k": _cfg("RAVLT_T.pth"),
        "ravlt_small.in1k": _cfg("RAVLT_S.pth"),
        "ravlt_base.in1k": _cfg("RAVLT_B.pth"),
        "ravlt_large.in1k": _cfg("RAVLT_L.pth"),
        "test_ravlt.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)

VARIANTS: dict[str, dict[str, Any]] = {
    "ravlt_tiny": {
        "depths": (2, 2, 6, 2),
        "dims": (64, 128, 256, 512),
        "num_heads": (1, 2, 4, 8),
        "drop_path_rate": 0.1,
    },
    "ravlt_small": {
        "depths": (3, 5, 9, 3),
        "dims": (64, 128, 320, 512),
        "num_heads": (1, 2, 5, 8),
        "drop_path_rate": 0.15,
    },
    "ravlt_base": {
        "depths": (4, 6, 12, 6),
        "dims": (96, 192, 384, 512),
        "num_heads": (1, 2, 6, 8),
        "layer_scale": (1.0, 1.0, 1e-6, 1e-6),
        "drop_path_rate": 0.4,
    },
    "ravlt_large": {
        "depths": (4, 7, 19, 8),
        "dims": (96, 192, 448, 640),
        "num_heads": (1, 2, 7, 10),
        "layer_scale": (1e-6, 1e-6, 1e-6, 1e-6),
        "drop_path_rate": 0.55,
    },
    "test_ravlt": {
        "depths": (1, 1, 1, 1),
        "dims": (8, 16, 16, 24),
        "num_heads": (1, 2, 2, 2),
        "mlp_ratio": 2.0,
        "projection": 32,
    },
}

register_variants(__name__, RAVLT, VARIANTS, checkpoint_filter_fn)

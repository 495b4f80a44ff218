"""RAVLT (arXiv 2411.07635): rank-augmented linear attention, RALA, whose keys are weighted by a softmax.

Official code and weights: https://github.com/qhfan/RALA.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from subquad.backbones.registry import default_cfg, register_variants
from subquad.backbones.rotary_pyramid import SIZES, TEST_SIZE, GatedRotaryAttention, RotaryPyramid, read_official

__all__ = ["RAVLT"]


class RAVLT(RotaryPyramid):
    """RAVLT; arguments as in ``RotaryPyramid`` but for the mixer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, mixer=partial(GatedRotaryAttention, normalizer="softmax_weighted"), **kwargs)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """An official checkpoint under our names and in our shapes; ours pass unchanged (see ``read_official``)."""
    return read_official(state_dict, model)


_cfg = partial(
    default_cfg,
    folder="https://huggingface.co/aldjalkdf/RAVLT/resolve/main/",
    first_conv="stem.layers.0",
    license="mit",
    notes=("MIT is what the model card of the weights says; the official code has no licence file.",),
    origin_url="https://github.com/qhfan/RALA",
    paper_name="Breaking the Low-Rank Dilemma of Linear Attention",
    paper_ids="arXiv:2411.07635",
)

default_cfgs = generate_default_cfgs(
    {
        "ravlt_tiny.in1k": _cfg("RAVLT_T.pth"),
        "ravlt_small.in1k": _cfg("RAVLT_S.pth"),
        "ravlt_base.in1k": _cfg("RAVLT_B.pth"),
        "ravlt_large.in1k": _cfg("RAVLT_L.pth"),
        "test_ravlt.untrained": _cfg(size=96),
    }
)

VARIANTS: dict[str, dict[str, Any]] = {f"ravlt_{size}": options for size, options in SIZES.items()}
VARIANTS["test_ravlt"] = TEST_SIZE

register_variants(__name__, RAVLT, VARIANTS, checkpoint_filter_fn)

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

from subquad.backbones.registry import default_cfg, register_variants
from subquad.backbones.rotary_pyramid import SIZES, TEST_SIZE, GatedRotaryAttention, RotaryPyramid, read_official

__all__ = ["MAViT"]


class MAViT(RotaryPyramid):
    """MAViT; arguments as in ``RotaryPyramid`` but for the mixer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, mixer=partial(GatedRotaryAttention, normalizer="magnitude"), **kwargs)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """An official checkpoint under our names and in our shapes; ours pass unchanged (see ``read_official``)."""
    return read_official(state_dict, model)


_cfg = partial(
    default_cfg,
    first_conv="stem.layers.0",
    license="unknown",
    notes=(
        "The official code has no licence file.",
        "Weights: https://huggingface.co/aldjalkdf/MAViT, `subquad convert` reads them.",
    ),
    origin_url="https://github.com/qhfan/MALA",
    paper_name="Rectifying Magnitude Neglect in Linear Attention",
    paper_ids="arXiv:2507.00698",
)

default_cfgs = generate_default_cfgs(
    {
        "mavit_tiny.in1k": _cfg(),
        "mavit_small.in1k": _cfg(),
        "mavit_base.in1k": _cfg(),
        "mavit_large.in1k": _cfg(),
        "test_mavit.untrained": _cfg(size=96),
    }
)

VARIANTS: dict[str, dict[str, Any]] = {
    f"mavit_{size}": {**options, "projection": 2560 if size == "large" else 2048} for size, options in SIZES.items()
}
VARIANTS["test_mavit"] = TEST_SIZE

register_variants(__name__, MAViT, VARIANTS, checkpoint_filter_fn)

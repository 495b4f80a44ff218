"""RAVLT: upstream's constructor arguments and variants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from subquad.backbones.ravlt import RAVLT

MANIFEST_PATTERN = r"ravlt_"

MANIFESTS = {name: name for name in ("ravlt_tiny", "ravlt_small", "ravlt_base", "ravlt_large")}

CLASSIFIER = r"(proj|norm|head)\."
OUTPUT_NORM = r"extra_norms\.(?P<i>\d+)\."


def options(constructor: Mapping[str, Any]) -> dict[str, Any]:
    """Our arguments; a mixer is linear (l) or softmax (v), and a stage has factors in its branches or not."""
    depths = constructor["depths"]
    flags = constructor.get("flagss") or [["l"] * 40, ["l"] * 40, ["v"] * 40, ["v"] * 40][: len(depths)]
    inits = zip(constructor["layerscales"], constructor["layer_init_values"], strict=True)
    return {
        "depths": depths,
        "dims": constructor["embed_dims"],
        "num_heads": constructor["num_heads"],
        "linear": [[flag == "l" for flag in stage[:depth]] for stage, depth in zip(flags, depths, strict=True)],
        "mlp_ratio": constructor["mlp_ratios"],
        "layer_scale": [init if used else None for used, init in inits],
        "projection": constructor["projection"],
        "num_classes": constructor.get("num_classes", 1000),
        "drop_path_rate": constructor["drop_path_rate"],
    }


def build(constructor: Mapping[str, Any]) -> nn.Module:
    return RAVLT(**options(constructor))


def probes(model: nn.Module) -> dict[str, nn.Module]:
    return {}

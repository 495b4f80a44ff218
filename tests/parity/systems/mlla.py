"""MLLA: upstream's constructor arguments, variants and module names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from subquad.backbones.mlla import MLLA

MANIFEST_PATTERN = r"mlla_"

MANIFESTS = {name: name for name in ("mlla_tiny", "mlla_small", "mlla_base")}

CLASSIFIER = r"(norm|head)\."
OUTPUT_NORM = r"norm(?P<i>\d+)\."


def build(constructor: Mapping[str, Any]) -> nn.Module:
    return MLLA(
        constructor["depths"],
        constructor["embed_dim"],
        constructor["num_heads"],
        mlp_ratio=constructor.get("mlp_ratio", 4.0),
        num_classes=constructor.get("num_classes", 1000),
        drop_path_rate=constructor["drop_path_rate"],
    )


def probes(model: nn.Module) -> dict[str, nn.Module]:
    return {}

"""NAT: upstream's constructor arguments, variants and module names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from subquad.backbones.nat import NAT

MANIFEST_PATTERN = r"nat_(mini|tiny|small|base)$"

MANIFESTS = {name: name for name in ("nat_mini", "nat_tiny", "nat_small", "nat_base")}

CLASSIFIER = r"(norm|head)\."
OUTPUT_NORM = r"norm(?P<i>\d+)\."


def build(constructor: Mapping[str, Any]) -> nn.Module:
    if "variant" in constructor:
        return timm.create_model(constructor["variant"])
    return NAT(
        constructor["depths"],
        constructor["embed_dim"],
        constructor["num_heads"],
        kernel_size=constructor["kernel_size"],
        dilations=constructor.get("dilations"),
        mlp_ratio=constructor["mlp_ratio"],
        layer_scale=constructor.get("layer_scale"),
        num_classes=constructor["num_classes"],
        drop_path_rate=constructor["drop_path_rate"],
    )


def probes(model: nn.Module) -> dict[str, nn.Module]:
    return {}

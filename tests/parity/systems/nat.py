"""NAT and DiNAT: upstream's constructor arguments, the same for both, and variants."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import timm
from torch import nn

from subquad.backbones.nat import NAT


def _build(constructor: Mapping[str, Any]) -> nn.Module:
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


def _system(name: str, variants: str, **others: str) -> SimpleNamespace:
    manifests = {f"{name}_{variant}": f"{name}_{variant}" for variant in variants.split()} | others
    return SimpleNamespace(
        __name__=name,
        MANIFEST_PATTERN=rf"({'|'.join(manifests)})$",
        MANIFESTS=manifests,
        CLASSIFIER=r"(norm|head)\.",
        OUTPUT_NORM=r"norm(?P<i>\d+)\.",
        build=_build,
        probes=lambda model: {},
    )


SYSTEMS = {
    "nat": _system("nat", "mini tiny small base"),
    "dinat": _system(
        "dinat",
        "mini tiny small base large large_384 large_384_11x11",
        # weights before fine-tuning, recorded for 1000 classes too
        dinat_large_21k="dinat_large",
        dinat_large_21k_11x11="dinat_large_384_11x11",
    ),
}

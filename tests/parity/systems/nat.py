"""NAT, DiNAT, DiNAT_s and the isotropic ones: upstream's constructor arguments and variants."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import timm
from torch import Tensor, nn

from subquad.backbones.nat import NAT
from subquad.backbones.nat_isotropic import IsotropicNAT


def _build(constructor: Mapping[str, Any]) -> nn.Module:
    if "variant" in constructor:
        return timm.create_model(constructor["variant"])
    return NAT(
        constructor["depths"],
        constructor["embed_dim"],
        constructor["num_heads"],
        kernel_size=constructor["kernel_size"],
        dilations=constructor.get("dilations"),
        frame="patch" if constructor["class"] == "DiNAT_s" else "conv",
        mlp_ratio=constructor["mlp_ratio"],
        layer_scale=constructor.get("layer_scale"),
        num_classes=constructor["num_classes"],
        drop_path_rate=constructor["drop_path_rate"],
    )


def _build_isotropic(constructor: Mapping[str, Any]) -> nn.Module:
    if "variant" in constructor:
        return timm.create_model(constructor["variant"])
    return IsotropicNAT(
        constructor["embed_dim"],
        constructor["depth"],
        constructor["num_heads"],
        kernel_size=constructor["kernel_size"],
        dilation=constructor["dilation"] or 1,
        img_size=constructor["img_size"],
        patch_size=constructor["patch_size"],
        mlp_ratio=constructor["mlp_ratio"],
        num_classes=constructor["num_classes"],
        drop_path_rate=constructor["drop_path_rate"],
    )


def _last_map(model: nn.Module, image: Tensor, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"stage0": maps[f"stage{len(maps) - 1}"]}


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
    "dinat_s": _system("dinat_s", "tiny small base large large_384", dinat_s_large_21k="dinat_s_large"),
    "nat_isotropic": SimpleNamespace(
        __name__="nat_isotropic",
        MANIFEST_PATTERN=r"(nat_isotropic|dinat_isotropic|vitrpb)_",
        MANIFESTS={
            f"{name}_{size}": f"{name}_{size}"
            for name in ("nat_isotropic", "dinat_isotropic", "vitrpb")
            for size in ("small", "base")
        },
        CLASSIFIER=r"(norm|head)\.",
        OUTPUT_NORM=r"norm(?P<i>\d+)\.",
        build=_build_isotropic,
        probes=lambda model: {},
        outputs=_last_map,
    ),
}

"""RAVLT, MAViT and NaLaFormer: upstream's constructor arguments, the same for all three, and variants."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import nn

from subquad.backbones.mavit import MAViT
from subquad.backbones.nalaformer import NaLaFormer
from subquad.backbones.ravlt import RAVLT


def _build(model: type[nn.Module], constructor: Mapping[str, Any]) -> nn.Module:
    """A mixer is linear (l) or softmax (v), and a stage has factors in its branches or not."""
    depths = constructor["depths"]
    flags = constructor.get("flagss") or [["l"] * 40, ["l"] * 40, ["v"] * 40, ["v"] * 40]
    inits = zip(constructor["layerscales"], constructor["layer_init_values"], strict=True)
    return model(
        depths=depths,
        dims=constructor["embed_dims"],
        num_heads=constructor["num_heads"],
        linear=[[flag == "l" for flag in stage[:depth]] for stage, depth in zip(flags, depths, strict=True)],
        mlp_ratio=constructor["mlp_ratios"],
        layer_scale=[init if used else None for used, init in inits],
        projection=constructor["projection"],
        num_classes=constructor.get("num_classes", 1000),
        drop_path_rate=constructor["drop_path_rate"],
    )


def _system(model: type[nn.Module], sizes: str) -> SimpleNamespace:
    family = model.__name__.lower()
    return SimpleNamespace(
        __name__=family,
        MANIFEST_PATTERN=rf"{family}_",
        MANIFESTS={f"{family}_{size}": f"{family}_{size}" for size in sizes.split()},
        CLASSIFIER=r"(proj|norm|head)\.",
        OUTPUT_NORM=r"extra_norms\.(?P<i>\d+)\.",
        build=partial(_build, model),
        probes=lambda model: {},
    )


SYSTEMS = {
    "ravlt": _system(RAVLT, "tiny small base large"),
    "mavit": _system(MAViT, "tiny small base large"),
    "nalaformer": _system(NaLaFormer, "xtiny tiny small base large"),
}

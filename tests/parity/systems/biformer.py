"""BiFormer: upstream's constructor arguments, variants, and which stages have which mixers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from subquad.backbones.biformer import BiFormer

MANIFESTS = {
    name: name for name in ("biformer_tiny", "biformer_small", "biformer_base", "biformer_stl", "biformer_stl_nchw")
}
MANIFEST_PATTERN = r"biformer_"
CLASSIFIER = r"(norm|head)\."
OUTPUT_NORM = r"extra_norms\.(?P<i>\d+)\."


def build(constructor: Mapping[str, Any]) -> nn.Module:
    if "variant" in constructor:
        return timm.create_model(constructor["variant"])
    shared = {
        "depths": constructor["depth"],
        "dims": constructor["embed_dim"],
        "topks": constructor["topks"],
        "head_dim": constructor["head_dim"],
        "lepe_size": constructor["side_dwconv"],
        "num_classes": constructor["num_classes"],
        "mlp_ratio": constructor["mlp_ratios"][0],
    }
    assert len(set(constructor["mlp_ratios"])) == 1
    if constructor["class"] != "BiFormer":
        ragged = constructor["class"] == "nchwBiFormerSTL"
        topks = [-3 if topk == -1 else topk for topk in constructor["topks"]] if ragged else constructor["topks"]
        return BiFormer(
            **(shared | {"topks": topks, "n_win": constructor["n_wins"], "ragged": ragged}), stem="patch", pos_size=0
        )
    return BiFormer(
        **shared,
        n_win=constructor["n_win"],
        qk_dims=constructor["qk_dims"],
        pos_size=constructor["before_attn_dwconv"],
        kv_pool=constructor["kv_downsample_mode"],
        kv_pool_sizes=constructor["kv_per_wins"],
        pre_norm=constructor.get("pre_norm", True),
        mlp_dwconv=constructor.get("mlp_dwconv", False),
        layer_scale=constructor.get("layer_scale_init_value"),
        drop_path_rate=constructor["drop_path_rate"],
    )


def probes(model: Any) -> dict[str, nn.Module]:
    return {}

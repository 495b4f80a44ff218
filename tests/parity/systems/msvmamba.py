"""MSVMamba: upstream's constructor arguments, variants and module names of both versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from subquad.backbones.msvmamba import MSVMamba

MANIFEST_PATTERN = r"msvmamba"

MANIFESTS = {
    "msvmamba_nano": "msvmamba_nano",
    "msvmamba_micro": "msvmamba_micro",
    "msvmamba_tiny": "msvmamba_tiny",
    "msvmambav3_tiny": "msvmamba_tiny_v2",
    "msvmambav3_small": "msvmamba_small_v2",
    "msvmambav3_base": "msvmamba_base_v2",
}

CLASSIFIER = r"classifier\."
OUTPUT_NORM = r"outnorm(?P<i>\d+)\."

_STEMS = {"v1": "patch", "v2": "conv"}
_DOWNSAMPLES = {"v1": "merge", "v2": "patch", "v3": "conv"}

_FIXED = {
    "patch_size": 4,
    "ssm_act_layer": "silu",
    "ssm_conv": 3,
    "ssm_conv_bias": True,
    "ssm_drop_rate": 0.0,
    "add_se": True,
}
_FIXED_V1 = {
    "mlp_ratio": 0.0,
    "sscore_type": "multiscale_4scan_12",
    "norm_layer": "ln",
    "convFFN": True,
    "add_conv": True,
    "sep_norm": False,
    "ms_stage": [0, 1, 2, 3],
    "ms_split": [1, 3],
    "ffn_dropout": 0.0,
}
_FIXED_V2 = {"norm_layer": "ln2d", "convffn": True, "full_res_index": 1, "posembed": False, "axis_stage": []}
"""What our model does not make a choice of: any other value is another architecture."""


def build(constructor: Mapping[str, Any]) -> nn.Module:
    second = constructor["forward_type"].startswith("vms")
    for name, value in (_FIXED | (_FIXED_V2 if second else _FIXED_V1)).items():
        assert constructor[name] == value, f"{name}={constructor[name]!r} has no counterpart"
    return MSVMamba(
        constructor["depths"],
        constructor["dims"],
        d_state=constructor["ssm_d_state"],
        ssm_ratio=constructor["ssm_ratio"],
        dt_rank=constructor["ssm_dt_rank"],
        gated=constructor["forward_type"] != "vms_noz",
        merge="raw" if second else "normed",
        ffn_ratio=constructor["conv_ffn_ratio"] if second else 2.0,
        post_norm=second,
        stem=_STEMS[constructor["patchembed_version"]],
        downsample=_DOWNSAMPLES[constructor["downsample_version"]],
        patch_norm=constructor["patch_norm"],
        num_classes=constructor["num_classes"],
        drop_path_rate=constructor["drop_path_rate"],
    )


def probes(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that exist on both sides; upstream's in_proj is ours only without a gate, which we project apart."""
    block = model.stages[0].blocks[0]
    found = {
        "patch_embed": model.stem,
        "layers.0.blocks.0.norm": block.norm1,
        "layers.0.blocks.0.op": block.mixer,
        "layers.0.blocks.0.op.conv2d": block.mixer.conv,
        "layers.0.blocks.0.op.conv2d_b1": block.mixer.half_conv,
        "layers.0.blocks.0.op.se": block.mixer.se,
        "layers.0.blocks.0.norm2": block.norm2,
        "layers.0.blocks.0.convFFN": block.ffn,
        "layers.0.downsample": model.stages[1].downsample,
        "classifier.norm": model.norm,
    }
    if not block.mixer.norm_scans:
        found["layers.0.blocks.0.op.out_norm"] = block.mixer.out_norm
    return found

"""VMamba, and MSVMamba in its frame: upstream's constructor arguments, variants and module names."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import nn

from subquad.backbones.msvmamba import MSVMamba
from subquad.backbones.vmamba import VMamba

_MANIFESTS = {
    "vmamba_tiny_s1l8": "vmamba_tiny",
    "vmamba_tiny_s2l5": "vmamba_tiny_s2l5",
    "vmamba_small_s2l15": "vmamba_small",
    "vmamba_small_s1l20": "vmamba_small_s1l20",
    "vmamba_base_s2l15": "vmamba_base",
    "vmamba_base_s1l20": "vmamba_base_s1l20",
    "vanilla_vmamba_tiny": "vmamba_tiny_vanilla",
    "vanilla_vmamba_small": "vmamba_small_vanilla",
    "vanilla_vmamba_base": "vmamba_base_vanilla",
}

_MULTI_SCALE_MANIFESTS = {
    "msvmamba_nano": "msvmamba_nano",
    "msvmamba_micro": "msvmamba_micro",
    "msvmamba_tiny": "msvmamba_tiny",
    "msvmambav3_tiny": "msvmamba_tiny_v2",
    "msvmambav3_small": "msvmamba_small_v2",
    "msvmambav3_base": "msvmamba_base_v2",
}

_LEGACY_NAMES = [
    (r"^patch_embed\.0\.", "patch_embed.proj."),
    (r"^patch_embed\.2\.", "patch_embed.norm."),
    (r"(blocks\.\d+)\.norm\.", r"\1.ln_1."),
    (r"(blocks\.\d+)\.op\.", r"\1.self_attention."),
    (r"^classifier\.", ""),
]
"""To the names of January 2024."""

_STEMS = {"v1": "patch", "v2": "conv"}
_DOWNSAMPLES = {"v1": "merge", "v2": "patch", "v3": "conv"}
_BASE_TYPES = ("v0", "v01", "v02", "v03", "v04", "v05", "v2", "v3")

_FIXED = {"patch_size": 4, "ssm_act_layer": "silu", "ssm_drop_rate": 0.0}
_FIXED_VMAMBA = {
    "ssm_init": "v0",
    "mlp_act_layer": "gelu",
    "mlp_drop_rate": 0.0,
    "gmlp": False,
    "posembed": False,
}
_FIXED_MULTI_SCALE = {"ssm_conv": 3, "ssm_conv_bias": True, "add_se": True}
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
"""What our models do not make a choice of: any other value is another architecture."""


def _build(constructor: Mapping[str, Any]) -> nn.Module:
    base, *suffixes = constructor["forward_type"].split("_")
    assert base in _BASE_TYPES, f"forward_type {constructor['forward_type']} is not four cross routes"
    assert set(suffixes) <= {"noz", "oact"}, f"forward_type {constructor['forward_type']} has no counterpart"
    return VMamba(
        **_shared(constructor, _FIXED_VMAMBA),
        kernel_size=constructor["ssm_conv"],
        conv_bias=constructor["ssm_conv_bias"],
        gated="noz" not in suffixes,
        out_act="oact" in suffixes,
        mlp_ratio=constructor["mlp_ratio"],
        in_chans=constructor["in_chans"],
    )


def _build_multi_scale(constructor: Mapping[str, Any]) -> nn.Module:
    """Both versions."""
    second = constructor["forward_type"].startswith("vms")
    return MSVMamba(
        **_shared(constructor, _FIXED_MULTI_SCALE | (_FIXED_V2 if second else _FIXED_V1)),
        gated=constructor["forward_type"] != "vms_noz",
        merge="raw" if second else "normed",
        ffn_ratio=constructor["conv_ffn_ratio"] if second else 2.0,
        post_norm=second,
    )


def _shared(constructor: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in (_FIXED | fixed).items():
        assert constructor[name] == value, f"{name}={constructor[name]!r} has no counterpart"
    return {
        "depths": constructor["depths"],
        "dims": constructor["dims"],
        "d_state": constructor["ssm_d_state"],
        "ssm_ratio": constructor["ssm_ratio"],
        "dt_rank": constructor["ssm_dt_rank"],
        "stem": _STEMS[constructor["patchembed_version"]],
        "downsample": _DOWNSAMPLES[constructor["downsample_version"]],
        "patch_norm": constructor["patch_norm"],
        "num_classes": constructor["num_classes"],
        "drop_path_rate": constructor["drop_path_rate"],
    }


def _probes(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that exist on both sides; upstream's in_proj is ours only without a gate, which we project apart."""
    block = model.stages[0].blocks[0]
    found = _shared_probes(model) | {"layers.0.blocks.0.op.out_norm": block.mixer.out_norm}
    if block.mixer.gate_proj is None:
        found["layers.0.blocks.0.op.in_proj"] = block.mixer.in_proj
    if block.mlp is not None:
        found |= {"layers.0.blocks.0.norm2": block.norm2, "layers.0.blocks.0.mlp": block.mlp}
    return found


def _multi_scale_probes(model: nn.Module) -> dict[str, nn.Module]:
    block = model.stages[0].blocks[0]
    found = _shared_probes(model) | {
        "layers.0.blocks.0.op.conv2d_b1": block.mixer.half_conv,
        "layers.0.blocks.0.op.se": block.mixer.se,
        "layers.0.blocks.0.norm2": block.norm2,
        "layers.0.blocks.0.convFFN": block.ffn,
    }
    if not block.mixer.norm_scans:
        found["layers.0.blocks.0.op.out_norm"] = block.mixer.out_norm
    return found


def _shared_probes(model: nn.Module) -> dict[str, nn.Module]:
    block = model.stages[0].blocks[0]
    return {
        "patch_embed": model.stem,
        "layers.0.blocks.0.norm": block.norm1,
        "layers.0.blocks.0.op": block.mixer,
        "layers.0.blocks.0.op.conv2d": block.mixer.conv,
        "layers.0.downsample": model.stages[1].downsample,
        "classifier.norm": model.norm,
    }


_NAMES = {"CLASSIFIER": r"classifier\.", "OUTPUT_NORM": r"outnorm(?P<i>\d+)\."}

SYSTEMS = {
    "vmamba": SimpleNamespace(
        **_NAMES,
        __name__="vmamba",
        MANIFEST_PATTERN=r"(vanilla_)?vmamba_",
        MANIFESTS=_MANIFESTS,
        LEGACY_NAMES=_LEGACY_NAMES,
        build=_build,
        probes=_probes,
    ),
    "msvmamba": SimpleNamespace(
        **_NAMES,
        __name__="msvmamba",
        MANIFEST_PATTERN=r"msvmamba",
        MANIFESTS=_MULTI_SCALE_MANIFESTS,
        build=_build_multi_scale,
        probes=_multi_scale_probes,
    ),
}

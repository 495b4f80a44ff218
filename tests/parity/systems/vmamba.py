"""VMamba: upstream's constructor arguments, variants and module names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from subquad.backbones.vmamba import VMamba

MANIFEST_PATTERN = r"(vanilla_)?vmamba_"

MANIFESTS = {
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

CLASSIFIER = r"classifier\."
OUTPUT_NORM = r"outnorm(?P<i>\d+)\."

LEGACY_NAMES = [
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

_FIXED = {
    "patch_size": 4,
    "ssm_act_layer": "silu",
    "ssm_init": "v0",
    "ssm_drop_rate": 0.0,
    "mlp_act_layer": "gelu",
    "mlp_drop_rate": 0.0,
    "gmlp": False,
    "posembed": False,
}
"""What our model does not make a choice of: any other value is another architecture."""


def build(constructor: Mapping[str, Any]) -> nn.Module:
    for name, value in _FIXED.items():
        assert constructor[name] == value, f"{name}={constructor[name]!r} has no counterpart"
    base, *suffixes = constructor["forward_type"].split("_")
    assert base in _BASE_TYPES, f"forward_type {constructor['forward_type']} is not four cross routes"
    assert set(suffixes) <= {"noz", "oact"}, f"forward_type {constructor['forward_type']} has no counterpart"
    return VMamba(
        constructor["depths"],
        constructor["dims"],
        d_state=constructor["ssm_d_state"],
        ssm_ratio=constructor["ssm_ratio"],
        dt_rank=constructor["ssm_dt_rank"],
        kernel_size=constructor["ssm_conv"],
        conv_bias=constructor["ssm_conv_bias"],
        gated="noz" not in suffixes,
        out_act="oact" in suffixes,
        mlp_ratio=constructor["mlp_ratio"],
        stem=_STEMS[constructor["patchembed_version"]],
        downsample=_DOWNSAMPLES[constructor["downsample_version"]],
        patch_norm=constructor["patch_norm"],
        in_chans=constructor["in_chans"],
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
        "layers.0.blocks.0.op.out_norm": block.mixer.out_norm,
        "layers.0.downsample": model.stages[1].downsample,
        "classifier.norm": model.norm,
    }
    if block.mixer.gate_proj is None:
        found["layers.0.blocks.0.op.in_proj"] = block.mixer.in_proj
    if block.mlp is not None:
        found |= {"layers.0.blocks.0.norm2": block.norm2, "layers.0.blocks.0.mlp": block.mlp}
    return found

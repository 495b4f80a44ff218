"""ViG: upstream's constructor arguments, variants and module names, isotropic and hierarchical."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from subquad.backbones.vig import HierarchicalViG, ViG

MANIFEST_PATTERN = r"vig_"

MANIFESTS = {name: name for name in ("vig_tiny", "vig_small", "vig_base", "vig_h_tiny", "vig_h_small", "vig_h_base")}

CLASSIFIER = r"classifier\."
OUTPUT_NORM = r"outnorm(?P<i>\d+)\."

_FIXED = {"expand_k": 0.5, "expand_v": 1.0, "hidden_act": "swish", "rope_mode": "none"}
_FIXED_ISOTROPIC = {
    "if_cls_token": False,
    "classification_mode": "avgpool",
    "if_abs_pos_embed": True,
    "if_rc_pe": False,
    "use_lower_bound": False,
    "use_msg": False,
    "use_swiglu": True,
    "use_dirpe": False,
    "scan_mode": "default",
    "patch_embed_version": "v2",
    "use_bias_in_patch": True,
    "use_act_in_patch": False,
    "use_bias_in_dwconv": False,
    "init_values": None,
}
_FIXED_HIERARCHICAL = {
    "patch_size": 4,
    "gmlp": True,
    "patch_norm": True,
    "norm_layer": "ln2d",
    "downsample_version": "v3",
    "patchembed_version": "v2",
}
"""What our models do not make a choice of: any other value is another architecture."""


def _is_isotropic(constructor: Mapping[str, Any]) -> bool:
    return "embed_dim" in constructor


def _dims(constructor: Mapping[str, Any]) -> Sequence[int]:
    dims = constructor["dims"]
    return [dims * 2**i for i in range(4)] if isinstance(dims, int) else dims


def build(constructor: Mapping[str, Any]) -> nn.Module:
    isotropic = _is_isotropic(constructor)
    for name, value in (_FIXED | (_FIXED_ISOTROPIC if isotropic else _FIXED_HIERARCHICAL)).items():
        assert constructor[name] == value, f"{name}={constructor[name]!r} has no counterpart"
    options: dict[str, Any] = {
        "num_heads": constructor["num_heads"],
        "conv_act": constructor["use_act_in_conv"],
        "out_act": constructor["use_out_act"],
        "num_classes": constructor["num_classes"],
        "drop_path_rate": constructor["drop_path_rate"],
    }
    if not isotropic:
        return HierarchicalViG(constructor["depths"], constructor["dims"], **options)
    sizes = {"img_size": constructor["img_size"], "patch_size": constructor["patch_size"]}
    return ViG(constructor["embed_dim"], constructor["depth"], **options, **sizes)


def _mixer(dim: int, heads: int) -> dict[str, tuple[int, ...]]:
    return {
        "in_proj.0.weight": (dim, 1, 3, 3),
        "qkv_proj.weight": (2 * dim, dim),
        "gk_proj.0.weight": (16, dim),
        "gk_proj.1.weight": (dim, 16),
        "gk_proj.1.bias": (dim,),
        "g_norm.weight": (dim // heads,),
        "l_norm.weight": (dim // heads,),
        "g_proj.weight": (dim, dim),
        "g_proj.bias": (dim,),
        "o_proj.weight": (dim, dim),
    }


def _layer(name: str, *weight: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def upstream_shapes(constructor: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    classes = constructor["num_classes"]
    shapes: dict[str, tuple[int, ...]] = {}
    if _is_isotropic(constructor):
        dim, patch = constructor["embed_dim"], constructor["patch_size"]
        half, hidden = patch // 2, math.ceil(int(8 * dim / 3) / 256) * 256
        shapes |= {"pos_embed": (1, (constructor["img_size"] // patch) ** 2, dim), "norm.weight": (dim,)}
        shapes |= _layer("patch_embed.proj.0", dim // 2, 3, half + 1, half + 1) | _layer("patch_embed.proj.1", dim // 2)
        shapes |= _layer("patch_embed.proj.3", dim, dim // 2, 3, 3) | _layer("patch_embed.proj.4", dim)
        for i in range(constructor["depth"]):
            block = f"blocks.{i}."
            shapes |= {f"{block}attn.{key}": value for key, value in _mixer(dim, constructor["num_heads"]).items()}
            shapes |= {block + "attn_norm.weight": (dim,), block + "mlp_norm.weight": (dim,)}
            shapes |= {block + "mlp.gate_proj.weight": (2 * hidden, dim), block + "mlp.down_proj.weight": (dim, hidden)}
        return shapes | _layer("head", classes, dim)
    dims = _dims(constructor)
    shapes |= _layer("patch_embed.0", dims[0] // 2, 3, 3, 3) | _layer("patch_embed.2", dims[0] // 2)
    shapes |= _layer("patch_embed.5", dims[0], dims[0] // 2, 3, 3) | _layer("patch_embed.7", dims[0])
    for i, dim in enumerate(dims):
        hidden = math.ceil(int(8 * dim / 3) / 32) * 32
        for j in range(constructor["depths"][i]):
            block = f"layers.{i}.blocks.{j}."
            shapes |= {f"{block}op.{key}": value for key, value in _mixer(dim, constructor["num_heads"][i]).items()}
            shapes |= _layer(block + "norm", dim) | _layer(block + "norm2", dim)
            shapes |= {block + "mlp.fc1.weight": (2 * hidden, dim), block + "mlp.fc2.weight": (dim, hidden)}
        if i < 3:
            down = f"layers.{i}.downsample."
            shapes |= _layer(down + "1", dims[i + 1], dim, 3, 3) | _layer(down + "3", dims[i + 1])
        if "out_indices" in constructor:
            shapes |= _layer(f"outnorm{i}", dim)
    # A detection backbone has no classifier; ours needs weights for one, which its maps do not depend on.
    return shapes | _layer("classifier.norm", dims[-1]) | _layer("classifier.head", classes, dims[-1])


def probes(model: nn.Module) -> dict[str, nn.Module]:
    return {}


def outputs(model: Any, image: Tensor, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stage maps, normed where upstream was the detection backbone; patches and tokens of the isotropic models."""
    if isinstance(model, HierarchicalViG):
        normed = {name.replace("det", "stage"): value for name, value in maps.items() if name.startswith("det")}
        return {**maps, **normed} | ({"logits": normed["stage3"]} if normed else {})
    seen = {
        "patch_embed": model.stem(image).permute(0, 3, 1, 2),
        "block0": maps["stage0"],
        "last_block": maps[f"stage{len(model.blocks) - 1}"],
        "norm": model.forward_features(image).mT.unflatten(2, maps["stage0"].shape[2:]),
    }
    return seen | {f"stage{i}": value for i, value in enumerate(seen.values())}

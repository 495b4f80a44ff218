"""Vim: upstream's constructor arguments, variants and module names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from subquad.backbones.vim import Vim

MANIFEST_PATTERN = r"vim_"

MANIFESTS = {
    "vim_tiny_patch16_224": "vim_tiny",
    "vim_tiny_patch16_stride8_224": "vim_tiny_stride8",
    "vim_small_patch16_224": "vim_small",
    "vim_small_patch16_stride8_224": "vim_small_stride8",
    "vim_base_patch16_224": "vim_base",
}

CLASSIFIER = r"(head|norm_f)\."
OUTPUT_NORM = r"outnorm(?P<i>\d+)\."

_FIXED = {
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "final_pool_type": "mean",
    "if_abs_pos_embed": True,
    "if_rope": False,
    "if_rope_residual": False,
    "bimamba_type": "v2",
}
"""What our model does not make a choice of: any other value is another architecture."""


def build(constructor: Mapping[str, Any]) -> nn.Module:
    for name, value in _FIXED.items():
        assert constructor[name] == value, f"{name}={constructor[name]!r} has no counterpart"
    place = "middle" if constructor["use_middle_cls_token"] else 0
    return Vim(
        constructor["embed_dim"],
        constructor["depth"],
        img_size=_img_size(constructor),
        patch_size=constructor.get("patch_size", 16),
        stride=constructor.get("stride", 16),
        class_token=place if constructor["if_cls_token"] else None,
        average=constructor["if_divide_out"],
        rms_norm=constructor["rms_norm"],
        init_values=constructor.get("init_layer_scale"),
        num_classes=constructor["num_classes"],
    )


def _img_size(constructor: Mapping[str, Any]) -> tuple[int, int]:
    size = constructor.get("img_size", 224)
    return (size, size) if isinstance(size, int) else tuple(size)


def upstream_shapes(constructor: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    dim, patch, stride = constructor["embed_dim"], constructor.get("patch_size", 16), constructor.get("stride", 16)
    inner, rank, state = 2 * dim, math.ceil(dim / 16), 16
    height, width = _img_size(constructor)
    patches = ((height - patch) // stride + 1) * ((width - patch) // stride + 1)
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, patches + constructor["if_cls_token"], dim)}
    if constructor["if_cls_token"]:
        shapes["cls_token"] = (1, 1, dim)
    direction = {
        "conv1d{}.weight": (inner, 1, 4),
        "conv1d{}.bias": (inner,),
        "x_proj{}.weight": (rank + 2 * state, inner),
        "dt_proj{}.weight": (inner, rank),
        "dt_proj{}.bias": (inner,),
        "A{}_log": (inner, state),
        "D{}": (inner,),
    }
    norms = ("weight",) if constructor["rms_norm"] else ("weight", "bias")
    for i in range(constructor["depth"]):
        mixer = f"layers.{i}.mixer."
        shapes |= {mixer + name.format(suffix): shape for suffix in ("", "_b") for name, shape in direction.items()}
        shapes |= {mixer + "in_proj.weight": (2 * inner, dim), mixer + "out_proj.weight": (dim, inner)}
        shapes |= {f"layers.{i}.norm.{name}": (dim,) for name in norms}
        if constructor.get("init_layer_scale") is not None:
            shapes[mixer + "gamma"] = (dim,)
    shapes |= {f"norm_f.{name}": (dim,) for name in norms}
    shapes |= {"patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    return shapes | {"head.weight": (constructor["num_classes"], dim), "head.bias": (constructor["num_classes"],)}


def probes(model: nn.Module) -> dict[str, nn.Module]:
    return {}


def outputs(model: Any, image: Tensor, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What upstream's first layer returns, and all tokens before and behind the last norm; "stages" of fill cases."""
    residual, height, width = model.embed(image)
    block = model.blocks[0]
    hidden = block.layer_scale(block.mixer(block.norm(residual)))
    tokens = residual
    for block in model.blocks:
        tokens = block(tokens, height, width)
    seen = {
        "layer0_hidden": hidden,
        "layer0_residual": residual,
        "prenorm_tokens": tokens,
        "norm_tokens": model.norm(tokens),
    }
    torch.testing.assert_close(seen["norm_tokens"], model.forward_features(image))
    return seen | {f"stage{i}": value for i, value in enumerate(seen.values())}

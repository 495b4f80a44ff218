"""Where the mixers come from: what the default cfgs of all hosts say of them."""

from __future__ import annotations

from typing import Any

from subquad.backbones.registry import default_cfg

_NO_LICENSE = "The official code has no licence file, and none is stated for the weights."

_ORIGINS: dict[str, dict[str, Any]] = {
    "agent": {
        "license": "unknown",
        "notes": (_NO_LICENSE,),
        "origin_url": "https://github.com/LeapLabTHU/Agent-Attention",
        "paper_name": "Agent Attention: On the Integration of Softmax and Linear Attention",
        "paper_ids": "arXiv:2312.08874",
    },
    "flatten": {
        "license": "unknown",
        "notes": (_NO_LICENSE,),
        "origin_url": "https://github.com/LeapLabTHU/FLatten-Transformer",
        "paper_name": "FLatten Transformer: Vision Transformer using Focused Linear Attention",
        "paper_ids": "arXiv:2308.00442",
    },
    "inline": {
        "license": "unknown",
        "notes": (_NO_LICENSE,),
        "origin_url": "https://github.com/LeapLabTHU/InLine",
        "paper_name": "Bridging the Divide: Reconsidering Softmax and Linear Attention",
        "paper_ids": "arXiv:2412.06590",
    },
    "polaformer": {
        "license": "mit",
        "notes": ("Weights: https://huggingface.co/ZachMeng/PolaFormer, to be loaded with `subquad convert`.",),
        "origin_url": "https://github.com/ZacharyMeng/PolaFormer",
        "paper_name": "PolaFormer: Polarity-aware Linear Attention for Vision Transformers",
        "paper_ids": "arXiv:2501.15061",
    },
    "slab": {
        "license": "unknown",
        "notes": (_NO_LICENSE,),
        "origin_url": "https://github.com/xinghaochen/SLAB",
        "paper_name": "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive "
        "Re-parameterized Batch Normalization",
        "paper_ids": "arXiv:2405.11582",
        "crop_mode": "center",
    },
}


def host_cfg(mixer: str, share: str = "", file: str = "", **kwargs: Any) -> dict[str, Any]:
    """Default cfg of a host with a mixer, whose images are mostly squashed to a square before the crop.

    Args:
        mixer: one of ``MIXERS``.
        share: of the authors' file, "" for none.
        file: name for the copy of it.
        kwargs: more of ``default_cfg``.
    """
    return default_cfg(file if share else "", share=share, **{"crop_mode": "squash"} | _ORIGINS[mixer] | kwargs)


def slab_cfg(name: str, **kwargs: Any) -> dict[str, Any]:
    """Default cfg for a file of SLAB's release, which holds models with its mixer and such with its norm alone."""
    folder = "https://github.com/xinghaochen/SLAB/releases/download/ckpts/"
    return default_cfg(f"{name}.pth", folder=folder, **_ORIGINS["slab"], **kwargs)

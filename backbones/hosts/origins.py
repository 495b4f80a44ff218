"""Where the mixers come from: what the default cfgs of all hosts say of them, and how their files are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from subquad.backbones import mixers, weights
from subquad.backbones.prepbn import fit_norms
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


def read_host(
    state_dict: Mapping[str, Any], expected: Mapping[str, Tensor], names: Sequence[tuple[str, str | None]]
) -> dict[str, Tensor]:
    """An official checkpoint under our names, mixers and norms in the form of the model; ours pass unchanged.

    Args:
        expected: state dict of the model.
        names: official names to ours, in order.

    Raises:
        ValueError: if there are no tensors in it (see ``weights.unwrap``).
    """
    state = weights.rename(weights.unwrap(state_dict), names)
    return fit_norms(mixers.fit_mixers(state, expected), expected)

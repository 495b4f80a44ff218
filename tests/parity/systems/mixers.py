"""Mixers in their hosts: upstream's constructor arguments, which differ from host to host, and variants."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import nn

from subquad.backbones.hosts.cswin import MixerCSWin
from subquad.backbones.hosts.deit import MixerDeiT
from subquad.backbones.hosts.pvt import MixerPVT
from subquad.backbones.hosts.pvt_v2 import MixerPVT2
from subquad.backbones.hosts.swin import MixerSwin

_LETTERS = {"agent": "A", "flatten": "L", "inline": "I", "polaformer": "L", "slab": "L"}
_NAMES_OF_SIZES = {
    "t": "tiny",
    "s": "small",
    "m": "medium",
    "b": "base",
    "b_384": "base_384",
    "s_288": "small_288",
    "m_256": "medium_256",
    "s_448": "small_448",
}
_SIZES = {
    "cswin": _NAMES_OF_SIZES,
    "swin": _NAMES_OF_SIZES,
    "deit": _NAMES_OF_SIZES,
    "pvt": {**_NAMES_OF_SIZES, "b": "large"},
    "pvt_v2": {},
}


def _mixer_blocks(letter: str, constructor: Mapping[str, Any], depths: list[int]) -> list[int]:
    """Blocks with the mixer in each stage; M is for the number of them that follows the letters."""
    kinds = constructor.get("attn_type", "S" * len(depths))
    mixed = int(kinds[len(depths) :] or 0)
    return [
        depth if kind == letter else mixed if kind == "M" else 0 for kind, depth in zip(kinds, depths, strict=False)
    ]


def _options(constructor: Mapping[str, Any]) -> list[dict[str, int]]:
    """The number of agents of each stage, where there are agents."""
    agents = constructor.get("agent_num")
    return [{"agents": int(number)} for number in agents] if agents else [{} for _ in constructor["num_heads"]]


def _norm(mixer: str, constructor: Mapping[str, Any]) -> str:
    if mixer != "slab":
        return "layer"
    return "repbn" if constructor.get("norm_layer") == "RepBN" else "prepbn"


def _swin(mixer: str, constructor: Mapping[str, Any]) -> nn.Module:
    linear_window = constructor["window_size"]
    return MixerSwin(
        mixer,
        _mixer_blocks(_LETTERS[mixer], constructor, constructor["depths"]),
        constructor["depths"],
        constructor["num_heads"],
        constructor["embed_dim"],
        img_size=tuple(constructor["img_size"])
        if isinstance(constructor["img_size"], list)
        else constructor["img_size"],
        window_size=(7 if linear_window <= 56 else 12)
        if mixer in ("flatten", "polaformer", "slab")
        else max(7, linear_window // 8),
        patch_size=constructor.get("patch_size", 4),
        mlp_ratio=constructor["mlp_ratio"],
        mixer_options=_options(constructor),
        num_classes=constructor.get("num_classes", 1000),
        drop_path_rate=constructor["drop_path_rate"],
        norm=_norm(mixer, constructor),
    )


def _cswin(mixer: str, constructor: Mapping[str, Any]) -> nn.Module:
    depths, side = constructor["depth"], constructor["img_size"]
    widths = [int(width) for width in constructor["la_split_size"].split("-")]
    return MixerCSWin(
        mixer,
        _mixer_blocks(_LETTERS[mixer], constructor, depths),
        depths,
        constructor["num_heads"],
        constructor["embed_dim"],
        stripes=constructor["split_size"],
        mixer_stripes=[0 if width == side // 2 ** (i + 2) else width for i, width in enumerate(widths)],
        mixer_options=_options(constructor),
        img_size=side,
        mlp_ratio=constructor["mlp_ratio"],
        num_classes=constructor["num_classes"],
        norm=_norm(mixer, constructor),
    )


def _pvt(mixer: str, constructor: Mapping[str, Any]) -> nn.Module:
    letter = _LETTERS[mixer]
    return MixerPVT(
        mixer,
        constructor["depths"],
        constructor["embed_dims"],
        constructor["num_heads"],
        mlp_ratios=constructor["mlp_ratios"],
        mixer_stages=[kind == letter for kind in constructor["attn_type"]],
        sr_ratios=constructor["sr_ratios"],
        mixer_options=_options(constructor),
        img_size=constructor["img_size"],
        num_classes=constructor["num_classes"],
        norm=_norm(mixer, constructor),
    )


def _pvt_v2(mixer: str, constructor: Mapping[str, Any]) -> nn.Module:
    return MixerPVT2(
        mixer,
        constructor["depths"],
        constructor["embed_dims"],
        constructor["num_heads"],
        mlp_ratios=constructor["mlp_ratios"],
        img_size=constructor["img_size"],
        num_classes=constructor["num_classes"],
    )


def _taps(model: nn.Module) -> dict[str, nn.Module]:
    if not isinstance(model, MixerPVT2):
        return {}
    return {f"out/stage{i}": stage.blocks[-1].out_norm for i, stage in enumerate(model.stages)}


def _agents_of_blocks(constructor: Mapping[str, Any]) -> list[int | None] | None:
    """Pairs of blocks share an entry of ``agent_num``; blocks behind ``agent_layer`` have softmax attention."""
    if "agent_num" not in constructor:
        return None
    entries = [int(constructor["agent_num"][i]) for i in (0, 1, 2, 2, 2, 3)]
    return [entries[j // 2] if j < constructor.get("agent_layer", 12) else None for j in range(constructor["depth"])]


def _deit(mixer: str, constructor: Mapping[str, Any]) -> nn.Module:
    norm = _norm(mixer, constructor)
    return MixerDeiT(
        "softmax" if norm == "repbn" else mixer,
        constructor["embed_dim"],
        constructor["num_heads"],
        depth=constructor["depth"],
        agents=_agents_of_blocks(constructor),
        mlp_ratio=constructor.get("mlp_ratio", 4.0),
        patch_size=constructor.get("patch_size", 16),
        img_size=constructor.get("img_size", 224),
        num_classes=constructor.get("num_classes", 1000),
        class_token=norm != "prepbn",
        norm=norm,
    )


def _upstream_shapes(mixer: str, constructor: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of upstream's float entries, from those of our model."""
    state = _build(mixer, constructor).state_dict()
    pvt = "embed_dims" in constructor
    names = _PVT_NAMES if pvt else _CSWIN_NAMES if "la_split_size" in constructor else _SWIN_NAMES
    prefix_tokens = 1 if "prefix_tokens" in state else 0
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in state.items():
        prefix, _, leaf = name.rpartition(".attn.qkv.")
        if not value.is_floating_point():
            continue
        if not prefix or "la_split_size" in constructor:
            shapes |= [_upstream(name, tuple(value.shape), names, prefix_tokens)]
            continue
        gate = "g" if f"{prefix}.attn.power" in state else ""
        width = value.shape[0] // (4 if gate else 3)
        parts = {f"q{gate}": 2 if gate else 1, "kv": 2} if pvt else {f"qkv{gate}": 4 if gate else 3}
        for part, count in parts.items():
            shape = (count * width, *value.shape[1:])
            shapes |= [_upstream(f"{prefix}.attn.{part}.{leaf}", shape, names, prefix_tokens)]
    return shapes


def _upstream(
    name: str, shape: tuple[int, ...], names: list[tuple[str, str]], prefix_tokens: int
) -> tuple[str, tuple[int, ...]]:
    for pattern, replacement in [*names, *_MIXER_NAMES]:
        name = re.sub(pattern, replacement, name)
    leaf = re.split(r"\.attn\.|\.attns\.\d\.", name)[-1]
    if name == "pos_embed":
        shape = (1, prefix_tokens + shape[1] * shape[2], shape[3])
    elif leaf == "positional_encoding" or name.startswith("pos_embed"):
        shape = (1, shape[1] * shape[2], shape[3])
    elif leaf == "scale":
        shape = (1, 1, *shape)
    elif leaf in ("ah_bias", "aw_bias", "ac_bias"):
        shape = (1, *shape)
    elif leaf in ("ha_bias", "wa_bias", "ca_bias"):
        heads, agents, *size = shape
        shape = (1, heads, *size, agents)
    elif leaf == "power":
        shape = (1, shape[0], 1, shape[1])
    return name, shape


_PVT_NAMES = [
    (r"^stem\.position$", "pos_embed1"),
    (r"^stem\.embed\.", "patch_embed1."),
    *((rf"^stages\.{i}\.downsample\.position$", f"pos_embed{i + 1}") for i in range(1, 4)),
    *((rf"^stages\.{i}\.downsample\.embed\.", f"patch_embed{i + 1}.") for i in range(1, 4)),
    *((rf"^stages\.{i}\.blocks\.", f"block{i + 1}.") for i in range(4)),
]
_SWIN_NAMES = [
    (r"^stem\.", "patch_embed."),
    *((rf"^stages\.{i + 1}\.downsample\.", f"layers.{i}.downsample.") for i in range(3)),
    (r"^stages\.", "layers."),
    (r"\.attn\.attn\.", ".attn."),
]
_CSWIN_NAMES = [
    (r"^stem\.proj\.", "stage1_conv_embed.0."),
    (r"^stem\.norm\.", "stage1_conv_embed.2."),
    *((rf"^stages\.{i}\.downsample\.", f"merge{i}.") for i in range(1, 4)),
    *((rf"^stages\.{i}\.blocks\.", f"stage{i + 1}.") for i in range(4)),
    (r"\.attn\.(qkv|proj)\.", r".\1."),
    (r"\.attn\.branches\.(\d)\.lepe\.", r".attns.\1.get_v."),
    (r"\.attn\.branches\.(\d)\.attn\.", r".attns.\1."),
    (r"(attns\.\d)\.position$", r"\1.positional_encoding"),
    (r"(attns\.\d)\.conv\.", r"\1.dwc."),
]
_MIXER_NAMES = [
    (r"^prefix_tokens$", "cls_token"),
    (r"^head\.fc\.", "head."),
    (r"\.attn\.position$", ".attn.positional_encoding"),
    (r"\.attn\.conv\.", ".attn.dwc."),
    (r"\.attn\.predict1\.", ".attn.residual.0."),
    (r"\.attn\.predict2\.", ".attn.residual.2."),
]


def _build(mixer: str, constructor: Mapping[str, Any]) -> nn.Module:
    assert constructor.get("focusing_factor", 3) == 3 and constructor.get("kernel_size", 5) == 5
    if isinstance(constructor.get("depth"), int):
        return _deit(mixer, constructor)
    if "la_split_size" in constructor:
        return _cswin(mixer, constructor)
    return (_pvt if "embed_dims" in constructor else _swin)(mixer, constructor)


def _build_case(mixer: str, case: Any) -> nn.Module:
    """PVT and PVT v2 have the same arguments."""
    if case.sidecar["case"].startswith("pvt_v2"):
        return _pvt_v2(mixer, case.sidecar["constructor"])
    return _build(mixer, case.sidecar["constructor"])


def _probes(model: nn.Module) -> dict[str, nn.Module]:
    """DeiT's tokens were recorded with the class token."""
    if not isinstance(model, MixerDeiT):
        return {}
    return {f"out/block{i}": block for i, block in enumerate(model.blocks)} | {"out/norm": model.norm}


_CASES = r"(^|_)swin_|^cswin|^pvt(_run_96x64|_v2)?$|(^|_)deit($|_tiny_fill)"


def _system(mixer: str, manifests: Mapping[str, str], cases: str = _CASES) -> SimpleNamespace:
    return SimpleNamespace(
        __name__=mixer,
        MANIFEST_PATTERN=rf"({'|'.join(manifests)})$",
        # PVT's norm, in the files of some mixers, is never used; DeiT's class token takes its position in on loading,
        # and that of SLAB is never used.
        SURPLUS={
            name: 2 * 512
            for name in manifests
            if re.search(r"_pvt_[tsmb]", name) and mixer in ("flatten", "polaformer")
        }
        | {"inline_deit_t": 192, "inline_deit_s": 320, "inline_deit_b": 384}
        | {"agent_deit_t": 192, "agent_deit_s": 384, "agent_deit_s_448": 384, "agent_deit_b": 768}
        | {"slab_deit_t": 192, "slab_deit_s": 384, "deit_t_prepbn": 192, "deit_s_prepbn": 384}
        # scales that nothing uses, in 2 blocks of 64 and 4 of 128 channels
        | {"slab_cswin_t": 2 * 64 + 4 * 128, "slab_cswin_s": 2 * 64 + 4 * 128},
        MANIFESTS=manifests,
        CLASSIFIER=r"(norm|head)\.",
        OUTPUT_NORM=r"(?!)",  # no case of a detection backbone; norm1 to norm4 are PVT v2's own
        FLOAT32=True,
        CASES=cases,
        build_case=partial(_build_case, mixer),
        upstream_shapes=partial(_upstream_shapes, mixer),
        probes=_probes,
        taps=_taps,
    )


def _manifests(mixer: str, pattern: str, hosts: Mapping[str, str]) -> dict[str, str]:
    """Upstream's names, ``pattern`` with a host and a size, to ours."""
    return {
        pattern.format(host=host, size=size): f"{mixer}_{host}_{_SIZES[host].get(size, size)}"
        for host, sizes in hosts.items()
        for size in sizes.split()
    }


_SLAB = _manifests("slab", "slab_{host}_{size}", {"swin": "t s b", "pvt": "t s m", "deit": "t s", "cswin": "t s"})
_PREPBN = _manifests("prepbn", "{host}_{size}_prepbn", {"swin": "t", "pvt": "t s m", "deit": "t s"})
_AGENT_HOSTS = {"swin": "t s s_288 b b_384", "pvt": "t s m m_256 b", "deit": "t s s_448 b", "cswin": "t s b b_384"}
_FLATTEN_HOSTS = {"swin": "t s b b_384", "pvt": "t s m b", "pvt_v2": "b0 b1 b2 b3 b4", "cswin": "t s b b_384"}
_INLINE_HOSTS = {"swin": "t s b b_384", "pvt": "t s m b", "deit": "t s b", "cswin": "t s b b_384"}
_POLA_HOSTS = {"swin": "t s b b_384", "pvt": "t s m b"}

SYSTEMS = {
    "agent": _system("agent", _manifests("agent", "agent_{host}_{size}", _AGENT_HOSTS)),
    "flatten": _system("flatten", _manifests("flatten", "flatten_{host}_{size}", _FLATTEN_HOSTS)),
    "inline": _system("inline", _manifests("inline", "inline_{host}_{size}", _INLINE_HOSTS)),
    "polaformer": _system("polaformer", _manifests("polaformer", "pola_{host}_{size}", _POLA_HOSTS)),
    "slab": _system("slab", _SLAB | _PREPBN, r"^(swin|pvt|deit|slab_deit|cswin)"),
}

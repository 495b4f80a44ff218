"""Batch norms of hosts, folded into the layers next to them for inference (SLAB, arXiv 2405.11582, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.pvt_v2 import Attention, OverlapPatchEmbed
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from subquad.backbones.hosts.blocks import Block, SoftmaxAttention
from subquad.backbones.hosts.stripes import CrossShapedAttention
from subquad.backbones.layers import ConvDownsample, PatchEmbed
from subquad.backbones.mixers import AgentAttention, PositionedMixer
from subquad.backbones.prepbn import ChannelAffine, ProgressiveNorm, RepNorm, affine_of

__all__ = ["fold_norms"]


def fold_norms(model: nn.Module) -> nn.Module:
    """Replace the norms of a host built with ``norm="repbn"`` or ``"prepbn"``, in place, by what they do in eval mode.

    Most become part of the convolution in front of them or of the projections behind them. Some stay as one product and
    one sum for each channel: the last norm (in PVT v2 that of each stage), those before windows (whose padding comes
    after the norm, and stays zero) and, but in CSWin, those before InLine (which predicts a kernel from what they
    give). The model gives the same at every image size.

    Raises:
        ValueError: for a model in training mode, or one without such norms.
    """
    if model.training:
        raise ValueError("norms can only be folded in eval mode, got a model in training mode")
    if not any(isinstance(module, RepNorm) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no batch norms to fold, expected one of the models slab_* and prepbn_*"
        )
    for module in list(model.modules()):
        if isinstance(module, PatchEmbed | OverlapPatchEmbed):
            _fold_backwards(module, module.proj)
        elif isinstance(module, ConvDownsample):
            _fold_backwards(module, module.conv)
        elif isinstance(module, PatchMerging):
            _fold_forwards(module, "norm", [module.reduction])
        elif isinstance(module, Attention):
            _fold_forwards(module, "norm", [module.kv])
        elif isinstance(module, Block):
            _fold_forwards(module, "norm1", _readers(module))
            _fold_forwards(module, "norm2", [module.mlp.fc1])  # type: ignore[list-item]
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, RepNorm | ProgressiveNorm):
                a, b = affine_of(child)
                dtype = next(child.parameters()).dtype
                setattr(module, name, ChannelAffine(a.detach().to(dtype), b.detach().to(dtype)))
    return model


def _readers(block: Block) -> list[Any]:
    """The layers that alone see what a block's first norm gives, as it is; none if others do, or zeros are added."""
    attention = block.attn
    if getattr(block, "window", 0) > 0:
        return []
    if isinstance(attention, Attention):
        return [attention.q, attention.kv] if attention.sr is None else [attention.q, attention.sr]
    alone = PositionedMixer | AgentAttention | SoftmaxAttention | CrossShapedAttention
    return [attention.qkv] if isinstance(attention, alone) else []


def _fold_backwards(module: PatchEmbed | OverlapPatchEmbed | ConvDownsample, conv: nn.Conv2d) -> None:
    """conv, then a y + b: a scales the outputs of conv, its bias too."""
    if isinstance(module.norm, RepNorm | ProgressiveNorm):
        a, b = affine_of(module.norm)
        _set(conv, conv.weight.double() * a[:, None, None, None], a * _bias(conv) + b)
        module.norm = nn.Identity()


def _fold_forwards(module: nn.Module, name: str, readers: Sequence[nn.Linear | nn.Conv2d]) -> None:
    """a x + b, then linear layers or convolutions without padding: a scales their inputs, b goes into their biases."""
    norm = getattr(module, name)
    if not readers or not isinstance(norm, RepNorm | ProgressiveNorm):
        return
    a, b = affine_of(norm)
    for layer in readers:
        weight = layer.weight.double()
        bias = _bias(layer) + weight.flatten(1).unflatten(1, (len(a), -1)).sum(2) @ b
        _set(layer, weight * a.view(1, -1, *[1] * (weight.dim() - 2)), bias)
    setattr(module, name, nn.Identity())


def _bias(layer: nn.Linear | nn.Conv2d) -> Tensor:
    return layer.weight.new_zeros((), dtype=torch.float64) if layer.bias is None else layer.bias.double()


def _set(layer: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    """New parameters in the dtype of the old weight; the layer may have had no bias."""
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(weight.detach().to(dtype))
    layer.bias = nn.Parameter(bias.detach().to(dtype))

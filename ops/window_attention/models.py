"""Models of timm and torchvision on window attention: ``patch`` and ``unpatch``.

A patched module keeps its class, parameters, buffers and state dict; one of its methods is shadowed by an attribute of
the instance. What reads the module's settings (a changed input size, a replaced projection) still works, because they
are read at each call. timm and torchvision need not be installed: modules are known by the names of their classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.ops.window_attention import window_attention, window_attention_packed

_Model = TypeVar("_Model", bound=nn.Module)


def patch(model: _Model) -> _Model:
    """Compute every windowed attention of a model with ``subquad.ops.window_attention``, exactly as before.

    Served are, of timm, ``swin_*``, ``swinv2_*``, ``davit_*``, ``twins_svt_*``, ``tiny_vit_*``, ``maxvit_*`` and
    ``maxxvit*`` (windows and grids), of ``gcvit_*`` and ``sam2_hiera_*`` those blocks whose queries are the tokens of
    the window (neither global nor pooled), and torchvision's ``swin_t`` to ``swin_v2_b``. What the op cannot express
    stays as it is: ``samvit_*`` has a bias that depends on the query, and ``swinv2_cr_*`` in training draws one for
    each pair. Patching again changes nothing.

    Returns:
        The model itself.

    Raises:
        TypeError: for what is no module.
        ValueError: if no module of the model is served, or one drops attention weights in training.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: expected a model, got {model!r}")
    found = [(module, rule) for module in model.modules() if (rule := _rule(module)) is not None]
    if not found:
        raise ValueError(
            f"patch: found no windowed attention in {type(model).__name__}, expected one of timm's swin, swinv2, "
            "davit, twins_svt, tiny_vit, maxvit, gcvit or sam2_hiera models, or of torchvision's swin models"
        )
    for module, rule in found:
        if rule.dropout(module) > 0:
            raise ValueError(
                f"patch: {type(module).__name__} drops attention weights with probability {rule.dropout(module)}, "
                "which window attention cannot; build the model with 0"
            )
    for module, rule in found:
        setattr(module, rule.method, _Shadow(module, rule.attend))
    return model


def unpatch(model: _Model) -> _Model:
    """Undo ``patch``; a model that is not patched stays as it is. Returns the model itself."""
    for module in model.modules():
        for name in [name for name, value in vars(module).items() if isinstance(value, _Shadow)]:
            delattr(module, name)
    return model


class _Shadow:
    """A method of one module; unlike a bound method it survives pickling under another name."""

    def __init__(self, module: nn.Module, attend: Callable[..., Tensor]) -> None:
        self.module = module
        self.attend = attend

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.attend(self.module, *args, **kwargs)


class _Rule(NamedTuple):
    """How one class of modules is patched.

    Attributes:
        method: the method that is shadowed.
        attend: takes its place; called with the module first.
        dropout: probability with which a module drops attention weights.
        serves: whether the op expresses what a module of the class does.
    """

    method: str
    attend: Callable[..., Tensor]
    dropout: Callable[[Any], float]
    serves: Callable[[Any], bool] = lambda module: True


def _rule(module: nn.Module) -> _Rule | None:
    cls = type(module)  # itself: a subclass may compute something else
    rule = _RULES.get(f"{cls.__module__}.{cls.__qualname__}")
    return rule if rule is not None and rule.serves(module) else None


# What takes the place of each method -----------------------------------------------------------------------------


def _swin(block: Any, x: Tensor) -> Tensor:
    """timm's ``SwinTransformerBlock._attn``: map (B, H, W, C) to map."""
    attn = block.attn
    qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1))
    o = window_attention_packed(
        qkv,
        block.window_size,
        block.shift_size,
        table=attn.relative_position_bias_table,
        scale=attn.scale,
        **_padding(x, block.window_size, attn.qkv.bias, qkv),
    )
    return attn.proj_drop(attn.proj(o.flatten(3)))


def _swin_v2(block: Any, x: Tensor) -> Tensor:
    """timm's ``SwinTransformerV2Block._attn``: cosine attention, a bias table from an MLP."""
    attn = block.attn
    bias = None if attn.q_bias is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    if bias is None or attn.qkv_bias_separate:
        qkv = attn.qkv(x) if bias is None else attn.qkv(x) + bias
    else:
        qkv = F.linear(x, attn.qkv.weight, bias)
    table = attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads)
    o = _cosine(
        qkv.unflatten(-1, (3, attn.num_heads, -1)),
        block.window_size,
        block.shift_size,
        attn.logit_scale,
        table,
        bias,
    )
    return attn.proj_drop(attn.proj(o.flatten(3)))


def _cosine(
    qkv: Tensor,
    window: tuple[int, int],
    shift: tuple[int, int],
    logit_scale: Tensor,
    table: Tensor,
    bias: Tensor | None,
    **options: Any,
) -> Tensor:
    """Attention of Swin v2: logits are cosines times a learned factor for each head."""
    q, k, v = qkv.unbind(3)
    factor = logit_scale.clamp(max=math.log(100.0)).exp().squeeze(-1)  # (heads, 1)
    q, k = F.normalize(q, dim=-1) * factor, F.normalize(k, dim=-1)
    return window_attention(
        q.to(v.dtype),
        k.to(v.dtype),
        v,
        window,
        shift,
        table=16 * torch.sigmoid(table),
        scale=1.0,
        **options,
        pad_v=_padding(qkv, window, bias, qkv).get("pad_v"),  # keys have no bias, so padding's have no direction
    )


def _torchvision(attn: Any, x: Tensor) -> Tensor:
    """torchvision's ``ShiftedWindowAttention.forward``."""
    qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1))
    o = window_attention_packed(
        qkv,
        attn.window_size,
        attn.shift_size,
        table=attn.relative_position_bias_table,
        order="pad_roll",
        drop_shift="axis",
        **_padding(x, attn.window_size, attn.qkv.bias, qkv),
    )
    return F.dropout(attn.proj(o.flatten(3)), attn.dropout, attn.training)


def _torchvision_v2(attn: Any, x: Tensor) -> Tensor:
    """torchvision's ``ShiftedWindowAttentionV2.forward``."""
    bias = attn.qkv.bias
    if bias is not None:
        q, k, v = bias.chunk(3)
        bias = torch.cat([q, torch.zeros_like(k), v])
    qkv = F.linear(x, attn.qkv.weight, bias).unflatten(-1, (3, attn.num_heads, -1))
    table = attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads)
    o = _cosine(
        qkv, attn.window_size, attn.shift_size, attn.logit_scale, table, bias, order="pad_roll", drop_shift="axis"
    )
    return F.dropout(attn.proj(o.flatten(3)), attn.dropout, attn.training)


def _davit(block: Any, x: Tensor) -> Tensor:
    """timm's ``SpatialBlock.forward`` of DaViT: map (B, C, H, W) to map."""
    height, width = x.shape[2:]
    attn = block.attn
    shortcut = block.cpe1(x).flatten(2).transpose(1, 2)
    qkv = attn.qkv(block.norm1(shortcut)).unflatten(1, (height, width)).unflatten(-1, (3, attn.num_heads, -1))
    o = window_attention_packed(
        qkv, block.window_size, scale=attn.scale, **_padding(qkv, block.window_size, attn.qkv.bias, qkv)
    )
    x = shortcut + block.drop_path1(attn.proj(o.flatten(3).flatten(1, 2)))
    x = block.cpe2(x.transpose(1, 2).unflatten(2, (height, width)))
    if block.mlp is not None:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + block.drop_path2(block.mlp(block.norm2(tokens)))
        x = tokens.transpose(1, 2).unflatten(2, (height, width))
    return x


def _twins(attn: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
    """timm's ``LocallyGroupedAttn.forward`` of Twins: tokens (B, N, C) to tokens."""
    qkv = attn.qkv(x).unflatten(1, tuple(size)).unflatten(-1, (3, attn.num_heads, -1))
    o = window_attention_packed(qkv, attn.ws, scale=attn.scale, **_padding(qkv, (attn.ws, attn.ws), attn.qkv.bias, qkv))
    return attn.proj_drop(attn.proj(o.flatten(3).flatten(1, 2)))


def _partition(block: Any, x: Tensor) -> Tensor:
    """timm's ``_partition_attn`` of MaxViT, channels last: windows or grid of a map (B, H, W, C)."""
    attn = block.attn
    o = _partition_core(attn, attn.qkv(x), block.partition_size, grid=not block.partition_block)
    return attn.proj_drop(attn.proj(o.flatten(3)))


def _partition_2d(block: Any, x: Tensor) -> Tensor:
    """Likewise with channels first: a map (B, C, H, W)."""
    attn = block.attn
    o = _partition_core(attn, attn.qkv(x).permute(0, 2, 3, 1), block.partition_size, grid=not block.partition_block)
    return attn.proj_drop(attn.proj(o.flatten(3).permute(0, 3, 1, 2)))


def _partition_parallel(block: Any, x: Tensor) -> Tensor:
    """timm's ``ParallelPartitionAttention._partition_attn`` of MaxViT: windows and grid side by side."""
    found = []
    for attn, grid in ((block.attn_block, False), (block.attn_grid, True)):
        o = _partition_core(attn, attn.qkv(x), block.partition_size, grid)
        found.append(attn.proj_drop(attn.proj(o.flatten(3))))
    return torch.cat(found, dim=-1)


def _partition_core(attn: Any, qkv: Tensor, size: tuple[int, int], grid: bool) -> Tensor:
    rel_pos = attn.rel_pos
    if attn.head_first:
        q, k, v = qkv.unflatten(-1, (attn.num_heads, 3, -1)).unbind(4)
    else:
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).unbind(3)
    kind = type(rel_pos).__name__
    if kind == "RelPosBiasTf":
        table = rel_pos.relative_position_bias_table.flatten(1).mT
    elif kind == "RelPosMlp":
        table = rel_pos.bias_act(rel_pos.mlp(rel_pos.rel_coords_log).view(-1, attn.num_heads))
        table = table if rel_pos.bias_gain is None else rel_pos.bias_gain * table
    else:
        table = None if rel_pos is None else rel_pos.relative_position_bias_table
    return window_attention(
        q,
        k,
        v,
        size,
        table=table,
        scale=attn.scale,
        index="k-q" if kind == "RelPosBiasTf" else "q-k",
        grid=grid,
    )


def _tiny_vit(block: Any, x: Tensor) -> Tensor:
    """timm's ``TinyVitBlock.forward``: map (B, H, W, C) to map."""
    attn, side = block.attn, block.window_size
    parts = (attn.key_dim, attn.key_dim, attn.val_dim)
    # Padding is added in front of the norm, which makes its bias of it.
    _, pad_k, pad_v = attn.qkv(attn.norm.bias).unflatten(-1, (attn.num_heads, -1)).split(parts, dim=-1)
    q, k, v = attn.qkv(attn.norm(x)).unflatten(-1, (attn.num_heads, -1)).split(parts, dim=-1)
    distance = torch.arange(1 - side, side, device=x.device).abs()
    table = attn.attention_biases[:, distance[:, None] * side + distance].flatten(1).mT
    pads = {"pad_k": pad_k.to(k.dtype), "pad_v": pad_v.to(v.dtype)}
    o = window_attention(q, k, v, side, table=table, scale=attn.scale, **pads)
    x = x + block.drop_path1(attn.proj(o.flatten(3)))
    x = block.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return x + block.drop_path2(block.mlp(x))


def _gcvit(block: Any, x: Tensor, q_global: Tensor | None = None) -> Tensor:
    """timm's ``GlobalContextVitBlock._window_attn`` without global queries: map (B, H, W, C) to map."""
    attn, (height, width) = block.attn, block.window_size
    if not torch.compiler.is_exporting() and (x.shape[1] % height or x.shape[2] % width):
        size = f"{x.shape[1]} x {x.shape[2]}"
        raise ValueError(f"windows of {height} x {width} must divide the map, got {size}")
    qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1))
    table = attn.rel_pos.relative_position_bias_table
    o = window_attention_packed(qkv, block.window_size, table=table, scale=attn.scale)
    return attn.proj_drop(attn.proj(o.flatten(3)))


def _hiera(block: Any, x: Tensor) -> Tensor:
    """timm's ``MultiScaleBlock.forward`` of SAM 2's Hiera, in windows without pooling: map (B, H, W, C) to map."""
    attn, normed = block.attn, block.norm1(x)
    shortcut = x if block.dim == block.dim_out else block.proj(normed)
    qkv = attn.qkv(normed).unflatten(-1, (3, attn.num_heads, -1))
    padding = _padding(normed, block.window_size, attn.qkv.bias, qkv)
    o = window_attention_packed(qkv, block.window_size, scale=attn.scale, **padding)
    x = shortcut + block.drop_path1(block.ls1(attn.proj(o.flatten(3))))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _padding(x: Tensor, window: tuple[int, int], bias: Tensor | None, qkv: Tensor) -> dict[str, Any]:
    """Key and value of padding, which a projection makes from zeros: its bias. Nothing for a map of whole windows."""
    whole = not torch.compiler.is_exporting() and x.shape[1] % window[0] == 0 and x.shape[2] % window[1] == 0
    if bias is None or whole:
        return {}
    _, pad_k, pad_v = bias.to(qkv.dtype).view(3, qkv.shape[-2] if qkv.dim() == 6 else -1, qkv.shape[-1]).unbind(0)
    return {"pad_k": pad_k, "pad_v": pad_v}


_RULES = {
    "timm.models.swin_transformer.SwinTransformerBlock": _Rule("_attn", _swin, lambda m: m.attn.attn_drop.p),
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": _Rule("_attn", _swin_v2, lambda m: m.attn.attn_drop.p),
    "timm.models.davit.SpatialBlock": _Rule("forward", _davit, lambda m: 0.0),
    "timm.models.twins.LocallyGroupedAttn": _Rule("forward", _twins, lambda m: m.attn_drop.p),
    "timm.models.maxxvit.PartitionAttentionCl": _Rule("_partition_attn", _partition, lambda m: m.attn.attn_drop.p),
    "timm.models.maxxvit.PartitionAttention2d": _Rule("_partition_attn", _partition_2d, lambda m: m.attn.attn_drop.p),
    "timm.models.maxxvit.ParallelPartitionAttention": _Rule(
        "_partition_attn", _partition_parallel, lambda m: m.attn_block.attn_drop.p
    ),
    "timm.models.tiny_vit.TinyVitBlock": _Rule("forward", _tiny_vit, lambda m: 0.0),
    "timm.models.gcvit.GlobalContextVitBlock": _Rule(
        "_window_attn", _gcvit, lambda m: m.attn.attn_drop.p, lambda m: not m.attn.use_global
    ),
    "timm.models.hieradet_sam2.MultiScaleBlock": _Rule(
        "forward", _hiera, lambda m: 0.0, lambda m: m.is_windowed and m.q_stride is None
    ),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": _Rule(
        "forward", _torchvision, lambda m: m.attention_dropout
    ),
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": _Rule(
        "forward", _torchvision_v2, lambda m: m.attention_dropout
    ),
}
"""By the class's full name."""

"""Layers of neighborhood attention with the constructor arguments and parameter names of NATTEN's."""

# Annotations are not postponed: TorchScript reads those of the functions and methods.

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.ops.maps import crop, exporting
from subquad.ops.neighborhood_attention import na1d, na2d, na3d
from subquad.ops.neighborhood_attention.arguments import check_stride, per_axis
from subquad.ops.neighborhood_attention.split import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]

_FUSED = {1: na1d, 2: na2d, 3: na3d}
_SPLIT = {1: (na1d_qk, na1d_av), 2: (na2d_qk, na2d_av), 3: (na3d_qk, na3d_av)}


class _NeighborhoodAttention(nn.Module):
    axes: int

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        stride: int | Sequence[int] = 1,
        pad_small_maps: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name, dd = type(self).__name__, {"device": device, "dtype": dtype}
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"{name}: num_heads must divide dim, got {num_heads} heads for {dim} channels")
        self.num_heads = num_heads
        self.kernel_size = per_axis(name, "kernel_size", kernel_size, self.axes)
        self.dilation = per_axis(name, "dilation", dilation, self.axes)
        self.stride = per_axis(name, "stride", stride, self.axes)
        self.is_causal = per_axis(name, "is_causal", is_causal, self.axes, bool)
        for axis, (step, kernel) in enumerate(zip(self.stride, self.kernel_size, strict=True)):
            check_stride(name, axis, step, kernel)
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else float(qk_scale)
        self.pad_small_maps = pad_small_maps
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        table = [2 * kernel - 1 for kernel in self.kernel_size]
        self.rpb = nn.Parameter(torch.empty(num_heads, *table, **dd)) if rel_pos_bias else None
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the bias table."""
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def extra_repr(self) -> str:
        names = ("num_heads", "kernel_size", "dilation", "stride", "is_causal", "pad_small_maps")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, *S, dim) to one of the same shape."""
        size = list(x.shape[1:-1])
        if self.pad_small_maps:
            x = _pad(x, self.kernel_size, self.dilation)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)  # each (B, *S, heads, d)
        if self.training and self.attn_drop.p > 0:
            o = self._attend_some(q, k, v)
        else:
            o = self.attend(q, k, v)
        if self.pad_small_maps:
            o = crop(o, size)
        return self.proj_drop(self.proj(o.flatten(-2)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What is between the projections, on (B, *S, heads, d)."""
        window = (self.kernel_size, self.dilation, self.stride, self.is_causal)
        if torch.jit.is_scripting():
            # The operators themselves, because TorchScript cannot compile the checks of the public functions.
            kernel_size, dilation, stride, is_causal = window
            found = torch.ops.subquad.neighborhood_attention(
                q, k, v, self.rpb, None, None, kernel_size, dilation, stride, is_causal, self.scale
            )
            o = found[0]
        else:
            o = _FUSED[self.axes](q, k, v, *window, rpb=self.rpb, scale=self.scale)
        return o

    def _attend_some(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """With weights dropped."""
        window = (self.kernel_size, self.dilation, self.stride, self.is_causal)
        if torch.jit.is_scripting():
            kernel_size, dilation, stride, is_causal = window
            logits = torch.ops.subquad.neighborhood_qk(
                q, k, self.rpb, None, kernel_size, dilation, stride, is_causal, self.scale
            )
            attn = self.attn_drop(logits.softmax(-1))
            o = torch.ops.subquad.neighborhood_av(attn, v, None, kernel_size, dilation, stride, is_causal)
        else:
            qk, av = _SPLIT[self.axes]
            attn = self.attn_drop(qk(q, k, *window, rpb=self.rpb, scale=self.scale).softmax(-1))
            o = av(attn, v, *window)
        return o


class NeighborhoodAttention1D(_NeighborhoodAttention):
    """Neighborhood attention of a sequence (B, L, dim); see ``NeighborhoodAttention2D``."""

    axes = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    """Neighborhood attention of a map (B, H, W, dim), with the projections before and behind it.

    Args:
        dim: channels.
        num_heads: a divisor of dim.
        kernel_size, dilation, is_causal, stride: of the windows, as in ``na2d``: one value or one an axis.
        rel_pos_bias: learn a relative positional bias ``rpb`` (num_heads, 2 K - 1 an axis).
        qkv_bias: whether the projection to queries, keys and values has a bias.
        qk_scale: factor of the products, (dim / num_heads)^-0.5 by default.
        attn_drop: dropout of the weights in training, which then are in memory (``na2d_qk``).
        proj_drop: dropout of the output.
        pad_small_maps: what to do where kernel_size * dilation exceeds the map: False for an error, True to add zeros
            below and to the right, and attend to them. As they are added before the projection, their keys and values
            are its bias. NATTEN did so before 0.17, and the released detectors of DiNAT depend on it.
        device, dtype: where and how parameters are made.

    Raises:
        ValueError: for options that do not fit, naming the argument and the axis.
    """

    axes = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    """Neighborhood attention of a volume (B, T, H, W, dim); see ``NeighborhoodAttention2D``."""

    axes = 3


def _pad(x: Tensor, kernel_size: list[int], dilation: list[int]) -> Tensor:
    """A map (B, *S, C) with zeros behind it on each axis, at least as long as kernel_size * dilation."""
    symbolic = exporting()
    pads = [0, 0]
    for axis in range(len(kernel_size) - 1, -1, -1):
        length, least = x.shape[axis + 1], kernel_size[axis] * dilation[axis]
        pads += [0, _symbolic_missing(length, least) if symbolic else max(least - length, 0)]
    return F.pad(x, pads) if symbolic or sum(pads) > 0 else x


@torch.jit.unused
def _symbolic_missing(length: int, least: int) -> int:
    missing: Any = torch.sym_max(length, least) - length
    return missing

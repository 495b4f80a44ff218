"""Layer norms of pre-norm residual blocks, in eager mode by ``subquad.ops.layer_norm``."""

# Annotations are not postponed here: TorchScript reads those of the functions and methods.

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn

from subquad.ops import add_layer_norm, layer_norm


@register_notrace_function
def normalize(x: Tensor, weight: Tensor, bias: Tensor, eps: float, result: str) -> Tensor:
    """What ``LayerNorm`` computes: in eager mode, in TorchScript and as a leaf of torch.fx."""
    if torch.jit.is_scripting():
        y = F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)
    elif _is_traced():
        y = _plain_norm(x, weight, bias, eps, result)
    else:
        y = layer_norm(x, weight, bias, eps=eps, dtype=_wanted(x, result))
    return y


@register_notrace_function
def add_and_normalize(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What ``AddLayerNorm`` computes: in eager mode, in TorchScript and as a leaf of torch.fx."""
    if torch.jit.is_scripting():
        total = x + branch
        y = F.layer_norm(total, weight.shape, weight.to(total.dtype), bias.to(total.dtype), eps)
    elif _is_traced():
        total = x + branch
        y = _plain_norm(total, weight, bias, eps, "projection")
    else:
        total, y = add_layer_norm(x, branch, weight, bias, eps=eps, dtype=_wanted(x, "projection"))
    return total, y


def _is_traced() -> bool:
    """Whether PyTorch's own operators are better than one of ours: compilers fuse these, exports know them."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _wanted(x: Tensor, result: str) -> torch.dtype | None:
    """Dtype of the result under autocast; None for that of the input."""
    kind = x.device.type
    if result == "input" or x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return None
    if not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind) if result == "projection" else torch.float32


def _plain_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, result: str) -> Tensor:
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        if weight.dtype != x.dtype:
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    dtype = _wanted(x, result)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(kind, enabled=False):
        y = F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
        return y.to(x.dtype if dtype is None else dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm of the last axis by ``subquad.ops.layer_norm``, in the dtype that its reader wants.

    Args:
        dim: channels.
        result: dtype of the result under autocast: ``"projection"``, autocast's own, for the projection that follows
            would round to it anyway; ``"stream"``, float32, as PyTorch's norm, for what sums are taken of; or
            ``"input"``, that of the input, for a norm between an op and a projection. Without autocast all are the
            last. Statistics are in float32 in any case.
    """

    def __init__(
        self, dim: int, eps: float = 1e-5, *, result: str = "projection", device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)
        self.result = result

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, self.weight, self.bias, self.eps, self.result)


class AddLayerNorm(nn.LayerNorm):
    """The sum in a residual block and LayerNorm for the projection behind it, by ``subquad.ops.add_layer_norm``.

    Maps x and its branch to x + branch and its norm, in autocast's dtype under autocast.
    """

    def forward(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return add_and_normalize(x, branch, self.weight, self.bias, self.eps)


StreamNorm = partial(LayerNorm, result="stream")
"""The norm behind a stem, a downsampling or the last block."""

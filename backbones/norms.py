"""Layer norms of pre-norm residual blocks: large maps on a GPU by ``subquad.ops.layer_norm``, others by PyTorch."""

# Annotations are not postponed here: TorchScript reads those of the functions and methods.

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn

from subquad.ops import add_layer_norm, layer_norm
from subquad.ops.maps import is_compiling

_WORTH_A_KERNEL = 3 * 2**20
"""Numbers from which on an op of ours saves more of the GPU's time than it takes of the host's: see the notes."""


@register_notrace_function
def normalize(x: Tensor, weight: Tensor, bias: Tensor, eps: float, result: str) -> Tensor:
    """What ``LayerNorm`` computes: in eager mode, in TorchScript and as a leaf of torch.fx."""
    if torch.jit.is_scripting():
        y = F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)
    elif _by_op(x):
        y = layer_norm(x, weight, bias, eps=eps, dtype=_wanted(x, result))
    else:
        y = _plain_norm(x, weight, bias, eps, result)
    return y


@register_notrace_function
def add_and_normalize(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What ``AddLayerNorm`` computes: in eager mode, in TorchScript and as a leaf of torch.fx."""
    if torch.jit.is_scripting():
        total = x + branch
        y = F.layer_norm(total, weight.shape, weight.to(total.dtype), bias.to(total.dtype), eps)
    elif _by_op(x):
        total, y = add_layer_norm(x, branch, weight, bias, eps=eps, dtype=_wanted(x, "projection"))
    else:
        total = x + branch
        y = _plain_norm(total, weight, bias, eps, "projection")
    return total, y


def _by_op(x: Tensor) -> bool:
    """Whether an op of ours is better than PyTorch's operators, which compilers fuse and exports know."""
    return not is_compiling() and x.device.type != "cpu" and x.numel() >= _WORTH_A_KERNEL


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's dtype for activations like x, or None without autocast."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _wanted(x: Tensor, result: str) -> torch.dtype | None:
    """Dtype of the op's result on a GPU; None for that of its input."""
    autocast = None if result == "input" else autocast_dtype(x)
    return autocast if autocast is None or result == "projection" else torch.float32


def _plain_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, result: str) -> Tensor:
    autocast = autocast_dtype(x)
    if autocast is not None and result != "input":
        y = F.layer_norm(x, weight.shape, weight, bias, eps)  # in float32, or on a CPU as it comes
        return y.to(autocast) if result == "projection" else y
    if weight.dtype != x.dtype:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    return F.layer_norm(x, weight.shape, weight, bias, eps) if autocast is None else _as_is(x, weight, bias, eps)


def _as_is(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The norm without autocast, which would make it a float32 one."""
    kind = x.device.type
    if torch.compiler.is_compiling():
        with torch.autocast(kind, enabled=False):
            return F.layer_norm(x, weight.shape, weight, bias, eps)
    torch.set_autocast_enabled(kind, False)  # the context manager takes as long as the norm
    try:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    finally:
        torch.set_autocast_enabled(kind, True)


class LayerNorm(nn.LayerNorm):
    """LayerNorm of the last axis in the dtype that its reader wants.

    By ``subquad.ops.layer_norm`` where that is faster.

    Args:
        dim: channels.
        result: dtype of the result under autocast: ``"projection"``, autocast's own, for the projection that follows
            would round to it anyway; ``"stream"``, that of PyTorch's norm (float32 on a GPU, on a CPU the input's), for
            what sums are taken of; or ``"input"``, that of the input, for a norm between an op and a projection.
            Without autocast all are the last. Statistics are in float32 in any case.

    Raises:
        ValueError: for another ``result``.
    """

    def __init__(
        self, dim: int, eps: float = 1e-5, *, result: str = "projection", device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)
        if result not in ("projection", "stream", "input"):
            raise ValueError(f"result must be 'projection', 'stream' or 'input', got {result!r}")
        self.result = result

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, result={self.result!r}"

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, self.weight, self.bias, self.eps, self.result)


class AddLayerNorm(nn.LayerNorm):
    """The sum in a residual block and LayerNorm for the projection behind it.

    By ``subquad.ops.add_layer_norm`` where that is faster. Maps x and its branch to x + branch and its norm, in
    autocast's dtype under autocast.
    """

    def __init__(self, dim: int, eps: float = 1e-5, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)

    def forward(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return add_and_normalize(x, branch, self.weight, self.bias, self.eps)


StreamNorm = partial(LayerNorm, result="stream")
"""The norm behind a stem, a downsampling or the last block."""

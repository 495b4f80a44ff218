"""What modules and ops do with maps alike in eager mode, in TorchScript and in exported programs."""

# Annotations are not postponed: TorchScript reads those of the functions.

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from subquad.ops._library import is_traced

_Tables = TypeVar("_Tables")


def exporting() -> bool:
    """Whether ``torch.export`` is at work: its program would keep a branch on sizes as it was for the example."""
    found = False
    if not torch.jit.is_scripting():  # TorchScript cannot compile the question
        found = torch.compiler.is_exporting()
    return found


def is_compiling() -> bool:
    """Whether a compiler, an export or ``torch.jit.trace`` is at work, which would keep what depends on sizes."""
    found = False
    if not torch.jit.is_scripting():
        found = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return found


class Kept:
    """Tensors that depend on sizes alone, kept between calls where that is safe.

    It is not while a graph is captured, whose memory is the graph's, nor for tensors that somebody traces. Streams do
    not share, as one would have to wait for the other.

    Args:
        most: how many are kept.
    """

    def __init__(self, most: int = 16) -> None:
        self._most = most
        self._kept: dict[object, Any] = {}

    def get(self, make: Callable[..., _Tables], x: Tensor, *sizes: int) -> _Tables:
        """``make(x, *sizes)``, which looks at nothing of x but device and dtype; not to be modified."""
        if torch.compiler.is_compiling() or is_traced((x,)):
            return make(x, *sizes)
        stream = 0
        if x.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return make(x, *sizes)
            stream = torch.cuda.current_stream(x.device).cuda_stream
        key = make, x.device, x.dtype, stream, sizes
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) >= self._most:
                self._kept.pop(next(iter(self._kept)), None)
            with torch.inference_mode(False), torch.no_grad():  # to serve a training step too
                found = self._kept[key] = make(x, *sizes)
        tables: _Tables = found
        return tables


def crop(x: Tensor, size: list[int]) -> Tensor:
    """The first positions of maps (B, *S, ...) along each of the axes S, as many as ``size`` says."""
    by_index = exporting()
    # A slice of the whole is free, its gradient is a copy; a compiler is not to compare sizes.
    always = by_index or is_compiling()
    for axis, length in enumerate(size, 1):
        if not always and x.shape[axis] == length:
            continue
        if by_index:
            # A slice's strides depend on whether there was padding: a guard on sizes. A selection is always contiguous.
            x = x.index_select(axis, torch.arange(length, device=x.device))
        else:
            x = x.narrow(axis, 0, length)
    return x

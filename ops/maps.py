"""What modules and ops do with maps alike in eager mode, in TorchScript and in exported programs."""

# Annotations are not postponed: TorchScript reads those of the functions.

import torch
from torch import Tensor


def exporting() -> bool:
    """Whether ``torch.export`` is at work: its program would keep a branch on sizes as it was for the example."""
    found = False
    if not torch.jit.is_scripting():  # TorchScript cannot compile the question
        found = torch.compiler.is_exporting()
    return found


def crop(x: Tensor, size: list[int]) -> Tensor:
    """The first positions of maps (B, *S, ...) along each of the axes S, as many as ``size`` says."""
    by_index = exporting()
    for axis, length in enumerate(size, 1):
        if by_index:
            # A slice's strides depend on whether there was padding: a guard on sizes. A selection is always contiguous.
            x = x.index_select(axis, torch.arange(length, device=x.device))
        else:
            x = x.narrow(axis, 0, length)
    return x

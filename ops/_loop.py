"""A loop that every exporter knows: what the export forms of the ops are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def scan(
    step: Callable[..., tuple[Tensor, ...]],
    init: tuple[Tensor, ...],
    xs: tuple[Tensor, ...],
    constants: tuple[Tensor, ...] = (),
) -> Sequence[Tensor]:
    """Last carries and stacked outputs of ``step(*carries, *slices of xs along axis 0, *constants)``.

    The operator itself: the function that PyTorch puts in front of it compiles ``step`` in a trace of its own, where
    the symbolic sizes of an export have no ranges. Outputs must not alias carries, hence the clones in the steps.
    """
    # Carries keep their strides from step to step, so all start with the ones that arithmetic gives: cloned, because an
    # axis of size 1 may have any stride in a contiguous tensor.
    init = tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in init)
    xs, constants = (tuple(tensor.contiguous() for tensor in tensors) for tensors in (xs, constants))
    return torch.ops.higher_order.scan(step, init, xs, constants)

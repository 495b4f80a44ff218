"""The one place for torch.library: how an op of ours becomes an operator of PyTorch.

An operator is opaque to ``torch.compile``, ``torch.export``, autocast, FLOP counting and FSDP: one node with a fake
(shape) function, an autograd formula whose backward is an operator of its own, and a FLOP formula for each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.library import CustomOpDef
from torch.utils.flop_counter import register_flop_formula


def define(
    name: str,
    function: Callable[..., Any],
    *,
    schema: str,
    fake: Callable[..., Any],
    flops: Callable[..., int],
) -> CustomOpDef:
    """Register ``function`` as the operator ``subquad::<name>``.

    Autocast policy: the function sees its inputs in the dtypes they have and runs with autocast off. Casting
    activations is the public wrapper's work (``autocast_dtype``), so that parameters and states stay in fp32.

    Args:
        name: operator name without namespace.
        function: eager implementation for every device.
        schema: arguments and results, as in ``"(Tensor x, int n) -> Tensor"``.
        fake: same arguments; returns empty tensors of the right shapes, dtypes and devices.
        flops: same arguments with shapes in place of tensors, plus ``out_shape``; multiply and add count separately.
    """

    @wraps(function)
    def without_autocast(*args: Any, **kwargs: Any) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    op = torch.library.custom_op(f"subquad::{name}", without_autocast, mutates_args=(), schema=schema)
    op.register_fake(fake)
    register_flop_formula(getattr(torch.ops.subquad, name))(flops)
    return op


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast asks activations to have on ``device``, or None outside autocast."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None

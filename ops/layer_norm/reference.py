"""The layer norm as its formula."""

from __future__ import annotations

from torch import Tensor

from subquad.ops.layer_norm.call import NormCall


def normalize(call: NormCall) -> tuple[Tensor, Tensor]:
    """x + branch (or x), and the norm of it."""
    total = call.x if call.branch is None else call.x + call.branch
    wide = total.to(call.working)
    centered = wide - wide.mean(-1, keepdim=True)
    variance = centered.square().mean(-1, keepdim=True)
    y = centered / (variance + call.eps).sqrt() * call.weight.to(call.working)
    if call.bias is not None:
        y = y + call.bias.to(call.working)
    return total, y.to(call.dtype)

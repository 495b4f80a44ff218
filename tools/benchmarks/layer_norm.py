"""The layer norm as a benchmark entry.

Variants: ``sum``, what a pre-norm block takes: x in float32, its branch and the norm of the sum in the activations'
dtype; and ``norm``, of x alone in that dtype, as between a scan and its projection. The output is the norm. The peer
adds, normalises and casts by PyTorch's own operators, as modules under autocast do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import add_layer_norm, explain, layer_norm, use_backend
from subquad.tools.benchmarks.registry import Case, Cost, Inputs, OpEntry, System, Tensors


def _cases() -> tuple[Case, ...]:
    """The stages of vmamba_tiny at 224 px, and the first at 1024 px."""
    shapes = [(128, 56 >> stage, 56 >> stage, 96 << stage) for stage in range(4)] + [(8, 256, 256, 96)]
    return tuple(Case(shape, variant) for variant in ("sum", "norm") for shape in shapes)


def _inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    batched = {"branch": torch.randn(case.shape, dtype=dtype, device=device)}
    if case.variant == "sum":
        batched["x"] = torch.randn(case.shape, device=device)
    dim = case.shape[-1]
    return Inputs(batched, {"weight": torch.randn(dim, device=device), "bias": torch.randn(dim, device=device)})


def _ours(case: Case, tensors: Tensors) -> Tensor:
    branch, weight, bias = tensors["branch"], tensors["weight"], tensors["bias"]
    if case.variant == "norm":
        return layer_norm(branch, weight, bias)
    return add_layer_norm(tensors["x"], branch, weight, bias, dtype=branch.dtype)[1]


def _backend(case: Case, tensors: Tensors) -> str:
    branch, weight = tensors["branch"], tensors["weight"]
    if case.variant == "norm":
        return explain(layer_norm, branch, weight).chosen or "none"
    return explain(add_layer_norm, tensors["x"], branch, weight).chosen or "none"


def _reference(case: Case, tensors: Tensors) -> Tensor:
    with use_backend("reference"):
        return _ours(case, tensors)


def _plain(case: Case, tensors: Tensors) -> Tensor:
    branch, weight, bias = tensors["branch"], tensors["weight"], tensors["bias"]
    total = branch.float() if case.variant == "norm" else tensors["x"] + branch
    return F.layer_norm(total, weight.shape, weight, bias).to(branch.dtype)


def _cost(case: Case, itemsize: int) -> Cost:
    """Bytes: x and branch in, sum and norm out; the backward pass reads sum and dnorm and writes dx and dbranch."""
    batch, height, width, dim = case.shape
    numbers = batch * height * width * dim
    if case.variant == "norm":
        return Cost(2 * numbers * itemsize, 5 * numbers * itemsize)
    return Cost(numbers * (8 + 2 * itemsize), numbers * (16 + 4 * itemsize))


ENTRY = OpEntry(
    name="layer_norm",
    axes="BxHxWxC",
    variants=("sum", "norm"),
    cases=_cases(),
    inputs=_inputs,
    ours=System("ours", _ours),
    peers=(System("torch", _plain),),
    reference=_reference,
    cost=_cost,
    backend=_backend,
)

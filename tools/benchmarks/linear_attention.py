"""Linear attention with ELU + 1 features as a benchmark entry, from raw queries and keys.

A variant is a normaliser; ``-rotary`` adds a rotary embedding of the content features.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import elu

from subquad.ops import explain, linear_attention, use_backend
from subquad.tools.benchmarks import recorded
from subquad.tools.benchmarks.registry import Case, Cost, Inputs, OpEntry, Recorded, System, Tensors

_NORMALIZERS = ("divide", "subtract", "magnitude", "softmax_weighted")
_VARIANTS = tuple(f"{name}{suffix}" for name in _NORMALIZERS for suffix in ("", "-rotary"))
_ROWS = 1_605_632
"""Images times heads times tokens of a case: 128 images of 4 heads and 56 x 56 tokens."""


def _cases() -> tuple[Case, ...]:
    """As many rows whatever the map: from windows to detection maps, with the head sizes of the models."""
    shapes = []
    for dim in (32, 64):
        for tokens in (49, 196, 784, 1024, 3136, 16384, 65536):
            heads = 4 if tokens >= 784 else 8
            shapes.append((max(1, _ROWS // (tokens * heads)), tokens, heads, dim))
    models = {"divide-rotary": (128, 3136, 2, 32), "softmax_weighted-rotary": (128, 3136, 1, 64)}
    models |= {"magnitude-rotary": (128, 3136, 1, 96), "subtract": (128, 3136, 3, 32)}
    return (*(Case(shape, "divide") for shape in shapes), *(Case(shape, name) for name, shape in models.items()))


def _inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    return Inputs({name: torch.randn(case.shape, dtype=dtype, device=device) for name in ("q", "k", "v")}, {})


def _arguments(case: Case, tensors: Tensors) -> dict[str, Any]:
    normalizer, _, rotary = case.variant.partition("-")
    _, tokens, _, dim = case.shape
    arguments: dict[str, Any] = {**tensors, "normalizer": normalizer, "feature_map": "elu1"}
    if normalizer != "divide":
        arguments["scale"] = dim**-0.5
    if rotary:
        steps = torch.arange(dim // 2, device=tensors["q"].device)
        angle = torch.arange(tokens, device=steps.device)[:, None, None] * 1e-4 ** (steps / steps.numel())
        arguments["rotary"] = (angle.cos(), angle.sin())
    return arguments


def _ours(case: Case, tensors: Tensors) -> Tensor:
    return linear_attention(**_arguments(case, tensors))


def _backend(case: Case, tensors: Tensors) -> str:
    with torch.no_grad():
        return explain(linear_attention, **_arguments(case, tensors)).chosen or "none"


def _reference(case: Case, tensors: Tensors) -> Tensor:
    """The PyTorch path in float64; the tests of the op compare it with the reference."""
    with use_backend("torch"):
        return _ours(case, tensors)


def _eager(case: Case, tensors: Tensors) -> Tensor:
    """The usual form: every step an operator on the inputs' dtype, the mean over the keys for the normaliser."""
    arguments = _arguments(case, tensors)
    normalizer, s = arguments["normalizer"], arguments.get("scale", 1.0)
    q, k = (elu(tensors[name].transpose(1, 2)) + 1 for name in ("q", "k"))  # (B, H, N, D)
    v = tensors["v"].transpose(1, 2)
    if normalizer == "softmax_weighted":
        k = k * (torch.softmax(s * q.mean(2, keepdim=True) @ k.mT, dim=-1) * k.shape[2]).mT
        s = 1.0
    q_c, k_c = (_rotate(value, arguments["rotary"]) if "rotary" in arguments else value for value in (q, k))
    root = (s / k.shape[2]) ** 0.5
    numerator = q_c @ ((k_c * root).mT @ (v * root))
    z = s * q @ k.mean(2, keepdim=True).mT
    if normalizer == "subtract":
        o = numerator + (1 - z) * v.mean(2, keepdim=True)
    elif normalizer == "magnitude":
        o = numerator * (1 + 1 / (z + 1e-6)) - z * v.mean(2, keepdim=True)
    else:
        o = numerator / (z + 1e-6)
    return o.transpose(1, 2)


def _rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (table.transpose(0, 1).to(x.dtype) for table in tables)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def _cost(case: Case, itemsize: int) -> Cost:
    """Bytes: q, k, v in and o out; the backward pass reads q, k, v and do and writes three gradients.

    The mean of the queries of ``softmax_weighted`` needs them once more in each pass. Exponentials: one a feature.
    """
    batch, tokens, heads, dim = case.shape
    elements = batch * tokens * heads * dim
    again = 1 if case.variant.startswith("softmax_weighted") else 0
    forward = (4 + again) * elements * itemsize
    return Cost(forward, forward + 7 * elements * itemsize, 2 * elements, 4 * elements)


def _recorded(case: Case) -> Recorded | None:
    """Softmax attention with as many rows."""
    batch, tokens, heads, dim = case.shape
    if case.variant != "divide" or (dim, tokens) not in recorded.SDPA or batch * tokens * heads < 0.95 * _ROWS:
        return None
    return Recorded(recorded.GPU, recorded.SDPA_SYSTEM, *recorded.SDPA[dim, tokens], None)


def _why_not_torch_path(device: torch.device) -> str | None:
    probe = Case((1, 4, 1, 4), "divide")
    backend = _backend(probe, _inputs(probe, torch.float32, device).all())
    return "it is what ours runs on this device" if backend == "torch" else None


ENTRY = OpEntry(
    name="linear_attention",
    axes="BxNxHxD",
    variants=_VARIANTS,
    cases=_cases(),
    inputs=_inputs,
    ours=System("ours", _ours),
    peers=(
        System("eager", _eager),
        System("torch_path", _ours, _why_not_torch_path, context=partial(use_backend, "torch")),
    ),
    reference=_reference,
    cost=_cost,
    backend=_backend,
    recorded=_recorded,
)

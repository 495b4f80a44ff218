"""Bidirectional gated linear attention with ViG's head sizes as a benchmark entry.

Forms: ``logits``, the gates as a projection gives them, in the activations' dtype; ``decays``, log decays in float32.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from subquad.ops import explain, gated_linear_attention, use_backend
from subquad.tools.benchmarks import recorded
from subquad.tools.benchmarks.registry import (
    Case,
    Cost,
    Inputs,
    OpEntry,
    Recorded,
    System,
    Tensors,
    why_not_importable,
)

_NORMALIZER = 16.0


def _inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    batch, length, heads, d_k, d_v = case.shape
    normal = partial(torch.randn, device=device, dtype=dtype)
    gates = normal(batch, length, 2, heads, d_k)
    if case.variant == "decays":
        gates = logsigmoid(gates.float()) / _NORMALIZER
    tokens = (batch, length, heads)
    return Inputs({"q": normal(*tokens, d_k), "k": normal(*tokens, d_k), "v": normal(*tokens, d_v), "gates": gates}, {})


def _arguments(case: Case, tensors: Tensors) -> dict[str, Any]:
    return {**tensors, "gate_normalizer": _NORMALIZER if case.variant == "logits" else None}


def _ours(case: Case, tensors: Tensors) -> Tensor:
    return gated_linear_attention(**_arguments(case, tensors))


def _backend(case: Case, tensors: Tensors) -> str:
    with torch.no_grad():
        return explain(gated_linear_attention, **_arguments(case, tensors)).chosen or "none"


def _reference(case: Case, tensors: Tensors) -> Tensor:
    """The PyTorch path in float64; the tests of the op compare it with the sequential reference."""
    with use_backend("torch"):
        return _ours(case, tensors)


def _cost(case: Case, itemsize: int) -> Cost:
    """Bytes: q, k, v, gates in, o out; backward reads the inputs again and do, writes the gradients.

    Exponentials: a decay for each direction, token and row of a state, with logits an exponential and a logarithm more;
    the backward pass, which stores none of them, computes them once more.
    """
    batch, length, heads, d_k, d_v = case.shape
    tokens = batch * length * heads
    gates = 2 * d_k * (itemsize if case.variant == "logits" else 4)
    arguments = tokens * ((2 * d_k + d_v) * itemsize + gates)
    out = tokens * d_v * itemsize
    exps = 2 * d_k * tokens * (3 if case.variant == "logits" else 1)
    return Cost(arguments + out, 3 * arguments + 2 * out, exps, 2 * exps)


def _recorded(case: Case) -> Recorded | None:
    if (found := recorded.GATED.get(case.shape)) is not None:
        return Recorded(recorded.GPU, recorded.GATED_SYSTEM, *found, None)
    if (forward := recorded.GATED_INFERENCE.get(case.shape)) is not None:
        return Recorded(recorded.GPU, recorded.GATED_INFERENCE_SYSTEM, forward, None, None)
    return None


def _chunk_gla(case: Case, tensors: Tensors) -> Tensor:
    """flash-linear-attention knows one direction: the other is its batch's second half, flipped."""
    function = import_module("fla.ops.gla").chunk_gla
    gates = tensors["gates"].float()
    if case.variant == "logits":
        gates = logsigmoid(gates) / _NORMALIZER
    q, k, v = (torch.cat([tensors[name], tensors[name].flip(1)]) for name in ("q", "k", "v"))
    o, _ = function(q, k, v, torch.cat([gates[:, :, 0], gates[:, :, 1].flip(1)]))
    forwards, backwards = o.chunk(2)
    return 0.5 * (forwards + backwards.flip(1))


def _why_not_chunk_gla(device: torch.device) -> str | None:
    return why_not_importable("fla.ops.gla") or (None if device.type == "cuda" else "fla.ops.gla needs a GPU")


def _why_not_torch_path(device: torch.device) -> str | None:
    probe = Case((1, 2, 1, 32, 64), "logits")
    backend = _backend(probe, _inputs(probe, torch.float32, device).all())
    return "it is what ours runs on this device" if backend == "torch" else None


ENTRY = OpEntry(
    name="gated_linear_attention",
    axes="BxTxHxKxV",
    variants=("logits", "decays"),
    cases=tuple(Case(shape, "logits") for shape in (*recorded.GATED, (8, 4096, 3, 32, 64), (8, 16384, 3, 32, 64))),
    inputs=_inputs,
    ours=System("ours", _ours),
    peers=(
        System("fla_chunk_gla", _chunk_gla, _why_not_chunk_gla),
        System("torch_path", _ours, _why_not_torch_path, context=partial(use_backend, "torch")),
    ),
    reference=_reference,
    cost=_cost,
    backend=_backend,
    recorded=_recorded,
)

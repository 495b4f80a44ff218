"""The 2-D selective scan with VMamba's four routes as a benchmark entry.

Forms, all from and to a channels-last map:

* ``core``: the step size is given at full rank E (no ``dt_weight``).
* ``low-rank``: the step size is given at rank R = E / 16 and expanded by the op.
* ``core+proj``: from x alone; one matrix product makes step size, B and C of every route.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from subquad.ops import explain, selective_scan, use_backend
from subquad.ops.selective_scan import CROSS
from subquad.ops.selective_scan.routes import ROUTES, route_order
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

_FORMS = ("core", "low-rank", "core+proj")
_VARIANTS = tuple(f"{form}-n{states}" for form in _FORMS for states in (1, 16))
_K = len(CROSS)

Scan = Callable[..., Tensor]
"""u (B, K*E, L), step (B, K*E, L), A (K*E, N), B and C (B, K, N, L), D and bias (K*E,) -> (B, K*E, L)."""


def _form(case: Case) -> tuple[str, int]:
    form, _, states = case.variant.rpartition("-n")
    return form, int(states)


def _rank(dim: int) -> int:
    return max(1, dim // 16)


def _cases() -> tuple[Case, ...]:
    """The recorded shapes, each as given and with the projections in front."""
    shapes = sorted(recorded.CORE, key=lambda key: key[1])
    forms = ("core", "core+proj")
    return tuple(Case(shape, f"{form}-n{states}") for form in forms for shape, states in shapes)


def _inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Values distributed as in a network at its initialisation, with decays that differ over channels and states."""
    batch, dim, height, width = case.shape
    form, states = _form(case)
    rank = _rank(dim)
    normal = partial(torch.randn, device=device)
    uniform = partial(torch.rand, device=device)
    step = torch.exp(uniform(_K, dim) * math.log(0.1 / 0.001) + math.log(0.001))
    parameters = {
        "A": -(0.5 + uniform(_K, dim, states)) * torch.arange(1, states + 1, device=device),
        "D": normal(_K, dim),
        "dt_bias": step + torch.log(-torch.expm1(-step)),  # softplus of it is `step`
    }
    if form != "core":
        parameters["dt_weight"] = (2 * uniform(_K, dim, rank) - 1) * rank**-0.5
    batched = {"x": normal(batch, height, width, dim, dtype=dtype)}
    if form == "core+proj":
        # In the activation dtype, as autocast hands it to the matrix product.
        weight = (2 * uniform(_K, rank + 2 * states, dim) - 1) * dim**-0.5
        parameters["x_proj"] = weight.to(dtype)
    else:
        batched["dt"] = 0.5 * normal(batch, height, width, _K, dim if form == "core" else rank, dtype=dtype)
        batched |= {name: normal(batch, height, width, _K, states, dtype=dtype) for name in ("B", "C")}
    return Inputs(batched, parameters)


def _arguments(case: Case, tensors: Tensors) -> dict[str, Any]:
    arguments: dict[str, Any] = {name: value for name, value in tensors.items() if name != "x_proj"}
    form, states = _form(case)
    if form == "core+proj":
        x, weight = tensors["x"], tensors["x_proj"]
        rows = linear(x, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])  # (B, H, W, K, R + 2N)
        split = rows.split([weight.shape[1] - 2 * states, states, states], dim=-1)
        arguments |= dict(zip(("dt", "B", "C"), split, strict=True))
    return {**arguments, "routes": CROSS}


def _ours(case: Case, tensors: Tensors) -> Tensor:
    y = selective_scan(**_arguments(case, tensors))
    assert isinstance(y, Tensor)
    return y


def _backend(case: Case, tensors: Tensors) -> str:
    with torch.no_grad():
        return explain(selective_scan, **_arguments(case, tensors)).chosen or "none"


def _reference(case: Case, tensors: Tensors) -> Tensor:
    """The PyTorch path in float64; the tests of the op compare it with the sequential reference."""
    with use_backend("torch"):
        return _ours(case, tensors)


def _cost(case: Case, itemsize: int) -> Cost:
    """Bytes: x, step (or its low-rank rows), B, C in, y out; backward reads them again and dy, writes the gradients.

    Exponentials: N decays and 2 for the softplus per route, pixel and channel; the backward pass, which may store none
    of them, computes them once more.
    """
    batch, dim, height, width = case.shape
    form, states = _form(case)
    pixels = batch * height * width
    rows = pixels * _K * ((dim if form == "core" else _rank(dim)) + 2 * states) * itemsize
    image = pixels * dim * itemsize
    exps = (states + 2) * _K * pixels * dim
    forward = 2 * image + rows
    return Cost(forward, forward + 3 * image + 2 * rows, exps, 2 * exps)


def _recorded(case: Case) -> Recorded | None:
    form, states = _form(case)
    batch, dim, height, width = case.shape
    shape = (batch, dim, height, width)
    if form == "core" and (shape, states) in recorded.CORE:
        return Recorded(recorded.GPU, recorded.SYSTEM, *recorded.CORE[shape, states])
    if form == "core+proj" and states == 1 and shape in recorded.CORE_PROJ:
        return Recorded(recorded.GPU, recorded.SYSTEM, *recorded.CORE_PROJ[shape], None)
    return None


# Peers that scan sequences (B, K*E, L): they copy the map once per route -----------------------------------------


def _to_sequences(case: Case, name: str, value: Tensor) -> Tensor:
    """Maps (B, H, W, E) to (B, E, H, W); per-route maps (B, H, W, K, F) to (B, K, F, L) in the order of the routes."""
    if name in ("x", "y"):
        return value.permute(0, 3, 1, 2).contiguous()
    if name not in ("dt", "B", "C"):
        return value.clone()
    pixels = value.flatten(1, 2)
    orders = _orders(case, value.device)
    return torch.stack([pixels[:, order, k].mT for k, order in enumerate(orders)], dim=1).contiguous()


def _from_sequences(case: Case, name: str, value: Tensor) -> Tensor:
    if name in ("x", "y"):
        return value.permute(0, 2, 3, 1)
    if name not in ("dt", "B", "C"):
        return value
    inverse = [order.argsort() for order in _orders(case, value.device)]
    maps = torch.stack([value[:, k, :, order].mT for k, order in enumerate(inverse)], dim=2)  # (B, L, K, F)
    return maps.unflatten(1, case.shape[2:])


def _orders(case: Case, device: torch.device) -> list[Tensor]:
    return [route_order(ROUTES[route], case.shape[2], case.shape[3], None, device) for route in CROSS]


def _cross_scan(x: Tensor) -> Tensor:
    """(B, E, H, W) to (B, 4, E, L)."""
    forwards = torch.stack([x.flatten(2), x.mT.flatten(2)], dim=1)
    return torch.cat([forwards, forwards.flip(-1)], dim=1)


def _cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """(B, 4, E, L) to (B, E, H, W)."""
    rows, columns = (y[:, :2] + y[:, 2:].flip(-1)).unbind(1)
    return rows.unflatten(-1, (height, width)) + columns.unflatten(-1, (width, height)).mT


def scan_sequences(scan: Scan, case: Case, tensors: Tensors) -> Tensor:
    """The op through a kernel that scans sequences, with cross scan, projections and merge around it in PyTorch."""
    form, states = _form(case)
    routes = _cross_scan(tensors["x"])
    if form == "core+proj":
        weight = tensors["x_proj"]
        rows = torch.einsum("bkel,kce->bkcl", routes, weight)
        dt, b, c = rows.split([weight.shape[1] - 2 * states, states, states], dim=2)
    else:
        dt, b, c = (tensors[name] for name in ("dt", "B", "C"))
    if form != "core":
        dt = torch.einsum("bkrl,ker->bkel", dt, tensors["dt_weight"].to(dt.dtype))
    y = scan(
        routes.flatten(1, 2),
        dt.flatten(1, 2).contiguous(),
        tensors["A"].flatten(0, 1),
        b.contiguous(),
        c.contiguous(),
        tensors["D"].flatten(),
        tensors["dt_bias"].flatten(),
    )
    return _cross_merge(y.unflatten(1, (_K, -1)), *case.shape[2:])


def _mamba_ssm(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor) -> Tensor:
    module = import_module("mamba_ssm.ops.selective_scan_interface")
    return module.selective_scan_fn(u, dt, a, b, c, d, delta_bias=bias, delta_softplus=True)


class _Oflex(torch.autograd.Function):
    """VMamba's extension with its float32 output."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        kernels = import_module("selective_scan_cuda_oflex")
        y, states, *_ = kernels.fwd(*tensors, True, 1, True)
        ctx.save_for_backward(*tensors, states)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        kernels = import_module("selective_scan_cuda_oflex")
        *tensors, states = ctx.saved_tensors
        return tuple(kernels.bwd(*tensors, grads[0].contiguous(), states, True, 1)[: len(tensors)])


def _sequence_peer(name: str, module: str, scan: Scan) -> System:
    def why_not(device: torch.device) -> str | None:
        return why_not_importable(module) or (None if device.type == "cuda" else f"{module} needs a GPU")

    return System(name, partial(scan_sequences, scan), why_not, _to_sequences, _from_sequences)


def _why_not_torch_path(device: torch.device) -> str | None:
    probe = Case((1, 16, 2, 2), "core-n1")
    backend = _backend(probe, _inputs(probe, torch.float32, device).all())
    return "it is what ours runs on this device" if backend == "torch" else None


ENTRY = OpEntry(
    name="selective_scan",
    axes="BxExHxW",
    variants=_VARIANTS,
    cases=_cases(),
    inputs=_inputs,
    ours=System("ours", _ours),
    peers=(
        _sequence_peer("mamba_ssm", "mamba_ssm.ops.selective_scan_interface", _mamba_ssm),
        _sequence_peer("vmamba_oflex", "selective_scan_cuda_oflex", lambda *tensors: _Oflex.apply(*tensors)),
        System("torch_path", _ours, _why_not_torch_path, context=partial(use_backend, "torch")),
    ),
    reference=_reference,
    cost=_cost,
    backend=_backend,
    recorded=_recorded,
)

"""The selective scan written as its formula: one step after another, in plain PyTorch, never optimised.

Runs in float64 for float64 inputs and in float32 otherwise; autograd through it gives reference gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.selective_scan.call import ScanCall
from subquad.ops.selective_scan.routes import route_order


def scan(call: ScanCall) -> tuple[Tensor, Tensor]:
    """Merged output (B, H, W, E) and the state after each route's last step, (B, K, E, N); differentiable."""
    batch, height, width, dim = call.x.shape
    working = torch.float64 if call.x.dtype == torch.float64 else torch.float32
    x = call.x.reshape(batch, height * width, dim).to(working)
    merged = torch.zeros_like(x)
    last_states = []
    for k, code in enumerate(call.routes):
        order = route_order(code, height, width, None if call.table is None else call.table[k], x.device)
        y, state = _scan_route(call, k, x[:, order], order, working)
        merged = merged.index_add(1, order, y)
        last_states.append(state)
    y = merged.reshape(call.x.shape)
    if call.z is not None:
        other = 0 if call.addend is None else call.addend.to(working)
        y = call.scale * (y + other) * F.silu(call.z.to(working))
    return y.to(call.out_dtype), torch.stack(last_states, dim=1)


def _scan_route(call: ScanCall, k: int, u: Tensor, order: Tensor, working: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scan of one route over u (B, L, E), already in the route's order."""
    batch, length, dim = u.shape
    groups = call.B.shape[-2]
    delta = call.dt.flatten(1, 2)[:, order, k].to(working)  # (B, L, R) or (B, L, E)
    if call.dt_weight is not None:
        delta = delta @ call.dt_weight[k].to(working).T  # (B, L, E)
    if call.dt_bias is not None:
        delta = delta + call.dt_bias[k].to(working)
    if call.dt_softplus:
        delta = F.softplus(delta, beta=1.0, threshold=20.0)
    A = call.A[k].to(working)  # (E, N)
    # (B, L, G, N) -> (B, L, E, N): channel e uses group e // (E / G)
    B = call.B.flatten(1, 2)[:, order, k].to(working).repeat_interleave(dim // groups, dim=2)
    C = call.C.flatten(1, 2)[:, order, k].to(working).repeat_interleave(dim // groups, dim=2)

    if call.initial_state is not None:
        h = call.initial_state[:, k].to(working)
    else:
        h = u.new_zeros(batch, dim, A.shape[-1])
    ys = []
    for t in range(length):
        decay = torch.exp(delta[:, t, :, None] * A)  # (B, E, N)
        h = decay * h + delta[:, t, :, None] * B[:, t] * u[:, t, :, None]
        ys.append((C[:, t] * h).sum(-1))
    y = torch.stack(ys, dim=1)
    if call.D is not None:
        y = y + call.D[k].to(working) * u
    return y, h

"""Gated linear attention written as its formula: one token after another, in plain PyTorch, never optimised.

Runs in float64 for float64 inputs and in float32 otherwise; autograd through it gives reference gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.gated_linear_attention.call import GatedCall, log_decays


def attend(call: GatedCall) -> Tensor:
    """Output (B, N, H, d_v); differentiable."""
    working = call.working_dtype
    q, k, v = (value.to(working) for value in (call.q, call.k, call.v))
    decays = log_decays(call.gates, call.gate_normalizer, working).exp()
    tokens = range(q.shape[1])
    forwards = _one_way(q, k, v, decays[:, :, 0], list(tokens))
    backwards = _one_way(q, k, v, decays[:, :, 1], list(reversed(tokens)))
    return (0.5 * call.scale * (forwards + backwards)).to(call.out_dtype)


def _one_way(q: Tensor, k: Tensor, v: Tensor, decays: Tensor, order: list[int]) -> Tensor:
    """q_t S_t with S_t = diag(decay_t) S + k_t v_t, S the state of the token visited before; in the tokens' order."""
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])  # (B, H, d_k, d_v)
    outputs: dict[int, Tensor] = {}
    for t in order:
        state = decays[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs[t] = (q[:, t, :, :, None] * state).sum(2)
    return torch.stack([outputs[t] for t in sorted(outputs)], dim=1)

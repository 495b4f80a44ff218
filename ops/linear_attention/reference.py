"""Linear attention written as its formula, in plain PyTorch, never optimised.

Runs in float64 for float64 inputs and in float32 otherwise; autograd through it gives reference gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.linear_attention.call import USES_VALUE_MEAN, AttentionCall, Statistics
from subquad.ops.linear_attention.formula import feature_map, normalize


def attend(call: AttentionCall) -> tuple[Tensor, Statistics]:
    """Output (B, M, H, E) and the statistics over the keys; differentiable."""
    q, k, v = (_heads_first(call, value) for value in (call.q, call.k, call.v))  # (B, H, M or N, D or E)
    q_n, k_n = feature_map(q, call.feature_map), feature_map(k, call.feature_map)
    if call.q_content is not None and call.k_content is not None:
        q_c, k_c = _heads_first(call, call.q_content), _heads_first(call, call.k_content)
    else:
        q_c, k_c = _rotate(q_n, call.cos, call.sin), _rotate(k_n, call.cos, call.sin)

    s, tokens = call.product_scale, call.k.shape[1]
    nothing = v.new_empty((*v.shape[:2], 0))
    query_mean = log_sum = value_mean = nothing
    if call.normalizer == "softmax_weighted":
        query_mean = q_n.mean(2)
        logits = call.scale * (k_n @ query_mean.unsqueeze(-1))  # (B, H, N, 1)
        log_sum = logits.logsumexp(2, keepdim=True)
        weights = tokens * torch.exp(logits - log_sum)
        k_n, k_c = weights * k_n, weights * k_c
        log_sum = log_sum.squeeze(-1)  # (B, H, 1)
    if call.normalizer in USES_VALUE_MEAN:
        value_mean = v.mean(2)
    key_mean = k_n.mean(2)
    state = k_c.transpose(-1, -2) @ v * (s / tokens)  # (B, H, D, E)

    numerator = q_c @ state  # (B, H, M, E)
    z = s * (q_n @ key_mean.unsqueeze(-1))  # (B, H, M, 1)
    o = normalize(call.normalizer, numerator, z, value_mean.unsqueeze(-2), call.eps)
    statistics = Statistics(state, key_mean, value_mean, query_mean, log_sum)
    return o.transpose(1, 2).to(call.v.dtype), statistics


def _heads_first(call: AttentionCall, x: Tensor) -> Tensor:
    return x.transpose(1, 2).to(call.working)


def _rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Turn each pair of channels (2t, 2t + 1) of x by its angle; tables (N, 1 or H, D / 2), none: leave x as it is."""
    if cos is None or sin is None:
        return x
    cos, sin = (table.to(x.dtype).transpose(0, 1) for table in (cos, sin))  # (1 or H, N, D / 2)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)

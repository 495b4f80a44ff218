"""The pieces of the formula that the reference and the PyTorch path share, on heads-first tensors (B, H, N, D or E)."""

from __future__ import annotations

import torch
from torch import Tensor


def feature_map(x: Tensor, name: str) -> Tensor:
    """Features of queries or keys, one of ``FEATURE_MAPS``."""
    if name == "elu1":
        return torch.exp(x.clamp(max=0)) + x.relu()
    return x.relu() if name == "relu" else x


def normalize(name: str, numerator: Tensor, z: Tensor, value_mean: Tensor, eps: float) -> Tensor:
    """The output (B, H, M, E) from q_c S, the normaliser z (B, H, M, 1) and the mean of the values (B, H, 1, E)."""
    if name in ("divide", "softmax_weighted"):
        return numerator / (z + eps)
    if name == "subtract":
        return numerator + (1 - z) * value_mean
    if name == "magnitude":
        return numerator * (1 + 1 / (z + eps)) - z * value_mean
    if name == "clamp":
        return numerator / z.clamp(min=eps)
    return numerator

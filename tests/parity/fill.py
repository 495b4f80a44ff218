"""Parameter values of the *fill* cases: a rule from upstream's parameter name and shape to float32 values.

The recorded outputs were made with these values: every draw from the random stream, and its order, is part of the rule.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import numpy as np

Array = np.ndarray

_TABLE_WORDS = ("pos_embed", "rpb", "position_bias", "bias_table", "_token")


def fill(name: str, shape: tuple[int, ...]) -> Array:
    """Values of the float parameter or buffer that upstream calls ``name``."""
    stream = np.random.RandomState(zlib.crc32(name.encode()))
    noise = stream.standard_normal(shape).astype(np.float32)

    def uniform(low: float, high: float) -> Array:
        return low + (high - low) * stream.random_sample(shape)

    return np.asarray(_values(name.lower(), shape, noise, uniform)).astype(np.float32)


def _values(name: str, shape: tuple[int, ...], noise: Array, uniform: Callable[[float, float], Array]) -> Array:
    leaf = name.rpartition(".")[2]
    if leaf == "running_var":
        return uniform(0.75, 1.25)
    if leaf == "running_mean":
        return 0.1 * noise
    if "a_log" in leaf or leaf in ("a_b_log", "alogs"):
        if len(shape) < 2:
            return np.log(uniform(1.0, 16.0))
        return np.log(np.arange(1, shape[-1] + 1, dtype=np.float32)) + 0.1 * noise
    if leaf in ("d", "ds", "d_b"):
        return 1.0 + 0.1 * noise
    if leaf in ("dt_projs_bias", "dt_bias") or name.endswith(("dt_proj.bias", "dt_proj_b.bias")):
        step = np.exp(uniform(math.log(0.001), math.log(0.1)))
        return np.log(np.expm1(step))
    if len(shape) <= 1:
        scale = leaf.startswith(("weight", "gamma", "scale", "ls", "layer_scale")) or leaf.endswith("gamma")
        return float(scale) + 0.1 * noise
    if shape[0] == 1 or any(word in name for word in _TABLE_WORDS):
        return 0.5 * noise
    return noise / np.float32(math.sqrt(math.prod(shape[1:])))

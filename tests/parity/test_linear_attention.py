"""Linear attention against recorded results, values and every gradient.

The ``kind`` cases are the op itself in closed form; the ``mixer`` cases are expressions of the released models from raw
projections to the output of the attention, feature map and rotary embedding included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from subquad import ops
from subquad.backbones.layers import rotary_by_head, rotary_by_width
from subquad.backbones.nalaformer import norm_aware_features

SYSTEM = "ops"

EXACT = 2e-7
"""Of the largest value: recorded results are float64 rounded to float32."""

RUNS = pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.float64), ("torch", torch.float64), ("torch", torch.float32)],
    ids=["reference-float64", "torch-float64", "torch-float32"],
)

VANISHING = 1e-7
"""Gradients of one token's features are the difference of equal terms: 0 up to rounding, in the recorded case too."""


def _starts_with(prefix: str) -> Callable[[Any], bool]:
    return lambda case: case.system_name == SYSTEM and case.sidecar["case"].startswith(prefix)


def _check(case: Any, check: Callable[..., None], key: str, value: Tensor, recorded: Tensor) -> None:
    if recorded.abs().max() < VANISHING:
        assert value.abs().max() < 10 * VANISHING, key
    else:
        check(case, key, value, recorded, EXACT)


@RUNS
@pytest.mark.cases(where=_starts_with("kind"))
def test_kind(case: Any, backend: str, dtype: torch.dtype, assert_recorded: Callable[..., None]) -> None:
    tensors, constructor = case.tensors(), case.sidecar["constructor"]
    names = {"q_n": "q", "k_n": "k", "v": "v", "q_c": "q_content", "k_c": "k_content"}
    # recorded as (B, heads, tokens, channels)
    leaves = {name: tensors[name].to(dtype).requires_grad_() for name in names if name in tensors}
    with ops.use_backend(backend):
        o = ops.linear_attention(
            **{names[name]: leaf.transpose(1, 2) for name, leaf in leaves.items()},
            normalizer=constructor["kind"],
            scale=constructor["scale"],
            eps=constructor["eps"] or 0.0,
        ).transpose(1, 2)
        (o * tensors["cotangent"]).sum().backward()
    assert o.dtype == dtype
    assert_recorded(case, "out/o", o, tensors["out/o"], EXACT)
    for name, leaf in leaves.items():
        _check(case, assert_recorded, f"grad/{name}", leaf.grad, tensors[f"grad/{name}"])


def _mlla(q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> Tensor:
    return ops.linear_attention(q, k, v, feature_map="elu1", rotary=rotary_by_width(q, height, width))


def _rala(q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> Tensor:
    options = {"normalizer": "softmax_weighted", "feature_map": "elu1", "scale": q.shape[-1] ** -0.5}
    return ops.linear_attention(q, k, v, rotary=rotary_by_head(q, height, width), **options)


def _mala(q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> Tensor:
    options = {"normalizer": "magnitude", "feature_map": "elu1", "scale": q.shape[-1] ** -0.5}
    return ops.linear_attention(q, k, v, rotary=rotary_by_head(q, height, width), **options)


def _nala(q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> Tensor:
    cos, sin = (torch.cat([table, table], dim=-1) for table in rotary_by_head(q, height, width))
    return ops.linear_attention(*norm_aware_features(q, k), v, rotary=(cos, sin))


MIXERS = {"mlla": _mlla, "rala": _rala, "mala": _mala, "nala": _nala}


@RUNS
@pytest.mark.cases(where=_starts_with("mixer"))
def test_mixer(case: Any, backend: str, dtype: torch.dtype, assert_recorded: Callable[..., None]) -> None:
    tensors, constructor = case.tensors(), case.sidecar["constructor"]
    leaves = {name: tensors[name].to(dtype).requires_grad_() for name in "qkv"}
    q, k, v = (leaf.transpose(1, 2) for leaf in leaves.values())
    with ops.use_backend(backend):
        mixer = MIXERS[case.sidecar["case"].split("_")[1]]
        o = mixer(q, k, v, constructor["H"], constructor["W"]).transpose(1, 2)
        (o * tensors["cotangent"]).sum().backward()
    assert_recorded(case, "out/o", o, tensors["out/o"], EXACT)
    for name, leaf in leaves.items():
        assert_recorded(case, f"grad/{name}", leaf.grad, tensors[f"grad/{name}"], EXACT)


@pytest.mark.cases(where=_starts_with("rotary"))
def test_rotary_tables(case: Any) -> None:
    tensors, constructor = case.tensors(), case.sidecar["constructor"]
    head, full = constructor["ravlt"], constructor["mlla"]
    dim = head["embed_dim"] // head["num_heads"]
    cos, sin = rotary_by_head(torch.zeros(1, 1, head["num_heads"], dim), head["H"], head["W"])
    for name, table in (("cos", cos), ("sin", sin)):
        # recorded with both channels of a pair
        both = table.squeeze(1).repeat_interleave(2, dim=-1)
        torch.testing.assert_close(both, tensors[f"ravlt/{name}"], rtol=0, atol=2e-7)
    # recorded over the whole width; the heads only cut it
    for heads in (1, 2, 4):
        cos, sin = rotary_by_width(torch.zeros(1, 1, heads, full["dim"] // heads), full["H"], full["W"])
        whole = torch.stack([cos.flatten(1), sin.flatten(1)], dim=-1)
        recorded = tensors["mlla/rotations"].flatten(0, 1)
        torch.testing.assert_close(whole, recorded, rtol=0, atol=2e-7)

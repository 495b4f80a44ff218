"""The mixers of other people's hosts against recorded upstream layers, outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from subquad.backbones import weights
from subquad.backbones.hosts.cswin import checkpoint_filter_fn
from subquad.backbones.hosts.stripes import Stripes
from subquad.backbones.mixers import BARE_MIXERS, MIXERS, NAMES, fit_mixers

SYSTEM = "ops"


def _mixer(case: Any) -> nn.Module:
    constructor = case.sidecar["constructor"]
    options: dict[str, Any] = {}
    if "agent_num" in constructor:
        options["agents"] = constructor["agent_num"]
    if "downstream_agent_shape" in constructor:
        rows, columns = constructor["downstream_agent_shape"]
        options["pooled_agents"] = rows * columns
    if case.sidecar["case"].endswith("_deit"):
        options["prefix_tokens"] = 1
    resolution = tuple(constructor.get("input_resolution", _map_size(case)))
    return MIXERS[case.system_name](constructor["dim"], constructor["num_heads"], resolution, **options)


def _map_size(case: Any) -> tuple[int, int]:
    """Upstream's mixers take square maps, the root of the number of tokens, which a class token does not change."""
    if "HW" in case.sidecar:
        height, width = case.sidecar["HW"]
        return height, width
    side = int(case.sidecar["input_shape"][1] ** 0.5)
    return side, side


def _has_counterpart(case: Any) -> bool:
    """Not CSWin's layers without projections (below), nor keys of a reduced map or other feature maps."""
    name, constructor = case.sidecar["case"], case.sidecar["constructor"]
    special = constructor.get("sr_ratio", 1) > 1 or constructor.get("kernel_func", "identity") != "identity"
    return case.system_name in MIXERS and not name.endswith("_cswin") and "linearnorm" not in name and not special


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.cases(where=_has_counterpart)
def test_mixer(case: Any, dtype: torch.dtype, assert_recorded: Callable[..., None]) -> None:
    tensors = case.tensors()
    leaves = {name: value.to(dtype).requires_grad_() for name, value in case.state().items()}
    mixer = _mixer(case).to(dtype).eval()
    expected = {f"host.attn.{name}": value for name, value in mixer.state_dict().items()}
    state = weights.rename({f"host.attn.{name}": leaf for name, leaf in leaves.items()}, NAMES)
    state = fit_mixers(state, expected)
    assert not (difference := weights.compare(state, expected)), str(difference)

    tokens = tensors["input"].to(dtype).requires_grad_()
    own = {name.removeprefix("host.attn."): value for name, value in state.items()}
    output = torch.func.functional_call(mixer, own, (tokens, list(_map_size(case))))
    (output * tensors["cotangent"]).sum().backward()
    assert_recorded(case, "output", output, tensors["output"])
    assert_recorded(case, "grad/input", tokens.grad, tensors["grad/input"])
    for name, leaf in leaves.items():
        assert_recorded(case, f"grad/{name}", leaf.grad, tensors[f"grad/{name}"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.cases(where=lambda case: case.system_name in BARE_MIXERS and case.sidecar["case"].endswith("_cswin"))
def test_stripes(case: Any, dtype: torch.dtype, assert_recorded: Callable[..., None]) -> None:
    """CSWin's layers, from queries, keys and values of the whole map to the mixed stripes."""
    tensors, constructor = case.tensors(), case.sidecar["constructor"]
    dim, side, stripe = constructor["dim"], constructor["resolution"], constructor["split_size"]
    mixer = partial(BARE_MIXERS[case.system_name], num_heads=constructor["num_heads"], resolution=(side, stripe))
    stripes = Stripes(dim, partial(mixer, bare=True), stripe if constructor["idx"] == 0 else 0).to(dtype).eval()
    leaves = {name: value.to(dtype).requires_grad_() for name, value in case.state().items()}
    attention = nn.ModuleDict({"branches": nn.ModuleList([stripes])})
    model = nn.ModuleDict({"host": nn.ModuleDict({"attn": attention})})
    own = checkpoint_filter_fn({f"host.attns.0.{name}": leaf for name, leaf in leaves.items()}, model)

    stacked = tensors["input"].to(dtype).requires_grad_()  # (3, B, N, dim)
    qkv = stacked.permute(1, 2, 0, 3).flatten(2).unflatten(1, (side, side))
    state = {name.removeprefix("host.attn.branches.0."): value for name, value in own.items()}
    output = torch.func.functional_call(stripes, state, (qkv, qkv)).flatten(1, 2)
    (output * tensors["cotangent"]).sum().backward()
    assert_recorded(case, "output", output, tensors["output"])
    assert_recorded(case, "grad/input", stacked.grad, tensors["grad/input"])
    for name, leaf in leaves.items():
        if case.system_name == "slab" and name == "scale":
            assert leaf.grad is None and not tensors["grad/scale"].any()  # nothing uses it
        else:
            assert_recorded(case, f"grad/{name}", leaf.grad, tensors[f"grad/{name}"])

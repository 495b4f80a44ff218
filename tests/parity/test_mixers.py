"""The mixers of other people's hosts against recorded upstream layers, outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from subquad.backbones import weights
from subquad.backbones.mixers import MIXERS, NAMES, fit_mixers

SYSTEM = "ops"


def _mixer(case: Any) -> nn.Module:
    constructor = case.sidecar["constructor"]
    height, width = _map_size(case)
    options: dict[str, Any] = {}
    if "agent_num" in constructor:
        options["agents"] = constructor["agent_num"]
    if case.sidecar["case"].endswith("_deit"):
        options["prefix_tokens"] = 1
    return MIXERS[case.system_name](constructor["dim"], constructor["num_heads"], (height, width), **options)


def _map_size(case: Any) -> tuple[int, int]:
    """Upstream's mixers take square maps, the root of the number of tokens, which a class token does not change."""
    if "HW" in case.sidecar:
        height, width = case.sidecar["HW"]
        return height, width
    side = int(case.sidecar["input_shape"][1] ** 0.5)
    return side, side


def _has_counterpart(case: Any) -> bool:
    """Not CSWin's layers without projections, nor keys of a reduced map, other feature maps or numbers of agents."""
    name, constructor = case.sidecar["case"], case.sidecar["constructor"]
    special = constructor.get("sr_ratio", 1) > 1 or constructor.get("kernel_func", "identity") != "identity"
    special = special or "downstream_agent_shape" in constructor
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

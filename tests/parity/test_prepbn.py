"""Progressive re-parameterised batch norm against recorded upstream layers: in eval mode and in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from subquad.backbones.prepbn import ProgressiveNorm

SYSTEM = "ops"


def _norm(case: Any, dtype: torch.dtype) -> ProgressiveNorm:
    constructor = case.sidecar["constructor"]
    norm = ProgressiveNorm(
        constructor["dim"], 1e-6, constructor["step"], constructor["warm"], constructor.get("r0", 1.0)
    )
    state = {name.removeprefix("state/"): value for name, value in case.tensors().items() if name.startswith("state/")}
    missing, unexpected = norm.load_state_dict(state, strict=False)
    assert set(missing) == {"warm", "iter", "total_step"} and not unexpected
    return norm.to(dtype)


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@dtypes
@pytest.mark.cases(where=lambda case: case.sidecar["case"].endswith("linearnorm_eval"))
def test_eval(case: Any, dtype: torch.dtype, assert_recorded: Callable[..., None]) -> None:
    recorded, norm = case.tensors(), _norm(case, dtype).eval()
    x = recorded["input"].to(dtype).requires_grad_()
    output = norm(x)
    (output * recorded["cotangent"]).sum().backward()
    assert_recorded(case, "output", output, recorded["output"])
    assert_recorded(case, "grad/input", x.grad, recorded["grad/input"])
    for name, parameter in norm.norm2.named_parameters():
        assert_recorded(case, f"grad/norm2.{name}", parameter.grad, recorded[f"grad/norm2.{name}"])
    assert not recorded["grad/norm1.weight"].any() and norm.norm1.weight.grad is None


@dtypes
@pytest.mark.cases(where=lambda case: case.sidecar["case"].endswith("linearnorm_train"))
def test_steps_of_training(case: Any, dtype: torch.dtype) -> None:
    recorded, norm = case.tensors(), _norm(case, dtype).train()
    for i, step in enumerate(case.sidecar["steps"]):
        output = norm(recorded[f"input{i}"].to(dtype))
        found = {"output": output, "running_mean": norm.norm2.bn.running_mean, "running_var": norm.norm2.bn.running_var}
        for name, value in found.items():
            # No noise floor is stated: a few roundings of float32, in which the results were recorded.
            torch.testing.assert_close(value, recorded[f"{name}{i}"].to(dtype), rtol=2e-6, atol=2e-6)
        assert (int(norm.warm), int(norm.iter)) == (step["warm_after"], step["iter_after"])

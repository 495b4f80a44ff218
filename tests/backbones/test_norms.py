"""The norms of residual blocks against PyTorch's LayerNorm: eager, autocast, TorchScript, compiled, exported."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.backbones import norms
from subquad.backbones.norms import AddLayerNorm, LayerNorm
from subquad.ops.maps import is_compiling

RESULTS = ("projection", "stream", "input")


@pytest.fixture(params=["op", "pytorch"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of an eager call, whatever the size and the device."""
    if request.param == "op":
        monkeypatch.setattr(norms, "_by_op", lambda x: not is_compiling())
    return str(request.param)


def random(module: nn.Module) -> Any:
    """The module with weights that show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def maps(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 5, 12, generator=generator).to(dtype).requires_grad_() for _ in range(count)]


def expected(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, (12,), norm.weight, norm.bias, norm.eps)


@pytest.mark.parametrize("result", RESULTS)
def test_equals_pytorch(result: str) -> None:
    norm, (x,) = random(LayerNorm(12, eps=1e-3, result=result)), maps(1)
    y = norm(x)
    torch.testing.assert_close(y, expected(norm, x))
    ours = torch.autograd.grad(y.square().sum(), [x, *norm.parameters()])
    theirs = torch.autograd.grad(expected(norm, x).square().sum(), [x, *norm.parameters()])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)  # sums of up to 60 terms of size 10


def test_the_sum_of_a_block() -> None:
    norm, (x, branch) = random(AddLayerNorm(12)), maps(2)
    total, y = norm(x, branch)
    assert torch.equal(total, x + branch)
    torch.testing.assert_close(y, expected(norm, x + branch))
    inputs = [x, branch, *norm.parameters()]
    ours = torch.autograd.grad((total * 2).sin().sum() + y.square().sum(), inputs)
    total = x + branch
    theirs = torch.autograd.grad((total * 2).sin().sum() + expected(norm, total).square().sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_under_autocast(result: str, dtype: torch.dtype, way: str) -> None:
    """The norm in float32 of what comes in, rounded where the next projection would round it."""
    norm, (x,) = random(LayerNorm(12, result=result)), maps(1, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
        theirs = F.layer_norm(x, (12,), norm.weight, norm.bias, norm.eps)
    stream = torch.float32 if way == "op" else theirs.dtype
    want = {"projection": torch.bfloat16, "stream": stream, "input": x.dtype}[result]
    assert y.dtype == want
    # In 16 bits weights and result are rounded, either way to 8 bits.
    tolerance = {"rtol": 1.6e-2, "atol": 2e-2} if want == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y, expected(norm, x.float()).to(want), **tolerance)
    assert norm(x).dtype == x.dtype


def test_dtypes_of_the_op_on_a_gpu() -> None:
    """PyTorch's norm there gives float32 under autocast."""
    x: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=torch.bfloat16)
    found = {}
    for enabled in (True, False):
        torch.set_autocast_enabled("cuda", enabled)
        try:
            found[enabled] = [norms._wanted(x, result) for result in RESULTS]
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert found[True] == [torch.get_autocast_dtype("cuda"), torch.float32, None] and found[False] == [None] * 3


def test_refuses_another_result() -> None:
    with pytest.raises(ValueError, match="result must be 'projection', 'stream' or 'input', got 'projektion'"):
        LayerNorm(12, result="projektion")
    assert "result='stream'" in repr(LayerNorm(12, result="stream"))


def test_float64_and_the_sum_under_autocast() -> None:
    norm, (x, branch) = random(AddLayerNorm(12)), maps(2)
    with torch.autocast("cpu", torch.bfloat16):
        total, y = norm(x, branch.bfloat16())
        wide = norm.double()(x.double(), branch.double())
    assert (total.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(total, x + branch.bfloat16())
    assert [part.dtype for part in wide] == [torch.float64, torch.float64]


def test_16_bit_models() -> None:
    """As after ``model.to(bfloat16)``: no autocast, everything in 16 bits but the statistics."""
    norm, (x, branch) = random(AddLayerNorm(12)).bfloat16(), maps(2, torch.bfloat16)
    total, y = norm(x, branch)
    assert total.dtype == y.dtype == torch.bfloat16
    assert torch.equal(y, expected(norm.float(), (x + branch).float()).bfloat16())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = random(LayerNorm(12))
        self.fc = random(nn.Linear(12, 12))
        self.norm2 = random(AddLayerNorm(12))

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.norm2(x, self.fc(self.norm1(x)))
        return x + y


@pytest.mark.parametrize("autocast", [False, True])
def test_traced_forms_compute_the_same(autocast: bool) -> None:
    block, (x,) = Block(), maps(1)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = block(x)
        # Rounding to bfloat16 may fall on the other side of a tie.
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(compiled(x), y, **tolerance)
        if not autocast:  # TorchScript knows no autocast state
            torch.testing.assert_close(torch.jit.script(block)(x), y)
            torch.testing.assert_close(torch.jit.trace(block, x)(x), y)


def test_exports_have_pytorchs_norm() -> None:
    (x,) = maps(1)
    program = torch.export.export(Block(), (x,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("layer_norm" in target for target in targets) == 2 and not any("subquad" in t for t in targets)


def test_what_runs_on_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large maps on a GPU: below, and on a CPU, the op takes more of the host's time than it saves."""
    monkeypatch.undo()
    large, small = (torch.empty(size, device="meta") for size in (3 * 2**20, 3 * 2**20 - 1))
    assert norms._by_op(large) and not norms._by_op(small) and not norms._by_op(torch.empty(2**22))


def test_keys_are_those_of_pytorchs_norm() -> None:
    for norm in (LayerNorm(12), AddLayerNorm(12)):
        assert isinstance(norm, nn.LayerNorm) and norm.state_dict().keys() == nn.LayerNorm(12).state_dict().keys()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["test_vmamba", "test_msvmamba", "test_nat", "test_vig_h"])
def test_both_ways_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream of sums has the dtypes that it has with PyTorch's norm under autocast, and the values."""
    monkeypatch.undo()
    torch.manual_seed(0)
    model, x = timm.create_model(name).cuda().eval(), torch.randn(2, 3, 96, 96, device="cuda")
    ways = []
    for least in (0, 2**40):
        monkeypatch.setattr(norms, "_WORTH_A_KERNEL", least)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            ways.append(model.forward_intermediates(x, intermediates_only=True))
    assert ways[0][0].dtype == torch.float32  # later stages of MSVMamba start with a projection, as Swin's do
    for ours, theirs in zip(*ways, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() < 2e-2 * theirs.norm()  # rounding of bfloat16 between the norms

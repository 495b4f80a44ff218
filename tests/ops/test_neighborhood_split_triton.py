"""The Triton kernels of the split forms of neighborhood attention against the float64 reference.

The same cases run in Triton's interpreter on the CPU (``interpret``: fp32 and fp16, small shapes) and on a GPU
(``gpu``: bf16 too, and maps of many programs).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from subquad import ops
from subquad.ops import na1d_av, na1d_qk, na2d_av, na2d_qk

# Relative L2 error per dtype: sums are in fp32, so 16 bit is one rounding of each result, and of nothing before.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}

OPS = {("qk", 1): na1d_qk, ("qk", 2): na2d_qk, ("av", 1): na1d_av, ("av", 2): na2d_av}
forms = pytest.mark.parametrize("form", ["qk", "av"])


class Case(NamedTuple):
    size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    dilation: Any = 1
    stride: Any = 1
    is_causal: Any = False
    batch: int = 1
    heads: int = 2
    shared: int | None = None
    dim: int = 8
    bias: bool = True


SMALL = {
    "several blocks": Case((9, 11), (7, 5), batch=2),
    "no bias": Case((9, 8), (3, 3), bias=False),
    "even kernel": Case((11, 9), (4, 6)),
    "dilated": Case((7, 14), (3, 3), dilation=(2, 4)),
    "window of the map": Case((5, 4), (5, 4), heads=1),
    "wide windows": Case((3, 21), (1, 19), heads=1),
    "stride": Case((9, 11), (6, 4), stride=(4, 3), heads=1),
    "causal": Case((8, 11), (4, 5), is_causal=(True, False), stride=(3, 1)),
    "causal, dilated": Case((5, 9), (2, 3), is_causal=True, dilation=(1, 2), heads=1),
    "shared heads": Case((6, 7), (3, 3), heads=4, shared=2, dim=3),
    "one channel": Case((5, 5), (3, 3), dim=1, heads=1),
    "wide heads": Case((4, 5), (3, 3), dim=40, heads=1),
    "one pixel": Case((1, 1), (1, 1), heads=1),
    "sequence": Case((70,), (8,), dilation=2),
    "causal sequence": Case((40,), (5,), is_causal=True, stride=2, bias=False),
    "empty batch": Case((5, 4), (3, 3), batch=0),
}
LARGE = {
    "56": Case((56, 56), (7, 7), batch=3, dim=32),
    "dilated": Case((56, 57), (7, 7), dilation=(8, 7), batch=3, dim=32),
    "14": Case((14, 14), (7, 7), batch=5, heads=8, dim=32),
    "13": Case((50, 67), (13, 13), dim=64, bias=False),
    "shared heads": Case((30, 40), (5, 5), heads=6, shared=2, dim=48),
    "128 channels": Case((24, 30), (7, 7), dim=128),
    "sequence": Case((1000,), (49,), dim=32),
}


def inputs(form: str, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random arguments, exactly representable in ``dtype`` where they are activations."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    lead = (case.batch, *case.size)
    slots = torch.Size(case.kernel_size).numel()
    result = {
        "q" if form == "qk" else "attn": normal(*lead, case.heads, case.dim if form == "qk" else slots),
        "k" if form == "qk" else "v": normal(*lead, case.shared or case.heads, case.dim),
    }
    result = {name: value.to(dtype).double() for name, value in result.items()}
    if form == "qk" and case.bias:
        result["rpb"] = normal(case.heads, *(2 * kernel - 1 for kernel in case.kernel_size)).float().double()
    return result


def options(case: Case) -> dict[str, Any]:
    return {name: getattr(case, name) for name in ("kernel_size", "dilation", "stride", "is_causal")}


def run(
    form: str, case: Case, arguments: dict[str, Tensor], dtype: torch.dtype, backend: str, device: str
) -> dict[str, Tensor]:
    """The result and all gradients, in float64 on the CPU."""
    leaves = {}
    for name, value in arguments.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        leaves[name] = value.to(device, wide if name == "rpb" else dtype, copy=True).requires_grad_()
    with ops.use_backend(backend):
        out = OPS[form, len(case.size)](**leaves, **options(case))
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        grads = torch.autograd.grad(out, tuple(leaves.values()), cotangent.to(device, out.dtype))
    found = {"out": out, **{f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}}
    return {name: value.detach().double().cpu() for name, value in found.items()}


def check(form: str, case: Case, dtype: torch.dtype, device: str) -> None:
    arguments = inputs(form, case, dtype)
    expected = run(form, case, arguments, torch.float64, "torch" if device == "cuda" else "reference", "cpu")
    found = run(form, case, arguments, dtype, "triton", device)
    errors = {}
    for name, value in expected.items():
        empty = value.isinf()
        assert torch.equal(found[name].isinf(), empty), name  # slots that causality leaves empty
        value, mine = value.masked_fill(empty, 0.0), found[name].masked_fill(empty, 0.0)
        errors[name] = ((mine - value).norm() / value.norm().clamp_min(1e-6)).item()
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE[dtype]}
    assert not wrong, f"relative errors above {TOLERANCE[dtype]}: {wrong}"


@pytest.mark.interpret
@forms
@pytest.mark.parametrize("name", SMALL)
def test_interpreted_fp32(form: str, name: str, poisoned_memory: None) -> None:
    check(form, SMALL[name], torch.float32, "cpu")


@pytest.mark.interpret
@forms
def test_interpreted_fp16(form: str, poisoned_memory: None) -> None:
    check(form, SMALL["causal"], torch.float16, "cpu")


@pytest.mark.interpret
@forms
def test_strides_do_not_matter(form: str, poisoned_memory: None) -> None:
    """Heads before the map, as NATTEN has them, and channels far apart."""
    case = SMALL["shared heads"]
    arguments = {name: value.float() for name, value in inputs(form, case, torch.float32).items()}
    first, second, *_ = arguments
    strided = dict(arguments)
    strided[first] = arguments[first].permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)
    strided[second] = arguments[second].permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    with ops.use_backend("triton"):
        mine, expected = (OPS[form, 2](**x, **options(case)) for x in (strided, arguments))
    assert torch.equal(mine, expected)


@forms
def test_what_the_kernels_do_not_serve_is_named(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subquad.ops._triton.why_not", lambda x: None)
    case = SMALL["no bias"]
    arguments = {name: value.float() for name, value in inputs(form, case, torch.float32).items()}
    wide = {name: x.repeat(1, 1, 1, 1, 33) if form == "qk" or name == "v" else x for name, x in arguments.items()}
    volume = inputs(form, Case((3, 3, 3), (3, 3, 3), bias=False), torch.float32)
    more = "additional_keys" if form == "qk" else "additional_values"
    extra = {more: torch.zeros(1, 2, 2, 8)}
    if form == "av":
        extra["attn"] = torch.zeros(1, 9, 8, 2, 11)
    for changed, reason in (
        (wide, "at most 256 channels, got 264"),
        ({name: value.double() for name, value in arguments.items()}, "float64"),
        (arguments | extra, "additional keys"),
    ):
        explanation = ops.explain(OPS[form, 2], **changed, kernel_size=3)
        assert explanation.chosen == "torch" and reason in explanation.passed_over["triton"]
    volume = {name: value.float() for name, value in volume.items()}
    reason = ops.explain(f"na3d_{form}", **volume, kernel_size=3).passed_over["triton"]
    assert "one and two axes, got three" in reason
    assert ops.explain(OPS[form, 2], **arguments, kernel_size=3).chosen == "triton"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@forms
@pytest.mark.parametrize("name", SMALL)
def test_small_on_gpu(form: str, name: str, dtype: torch.dtype, poisoned_memory: None) -> None:
    check(form, SMALL[name], dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@forms
@pytest.mark.parametrize("name", LARGE)
def test_large_on_gpu(form: str, name: str, dtype: torch.dtype, poisoned_memory: None) -> None:
    check(form, LARGE[name], dtype, "cuda")


@pytest.mark.gpu
@forms
def test_results_are_the_same_to_the_bit(form: str) -> None:
    case = LARGE["dilated"]
    arguments = inputs(form, case, torch.bfloat16)
    first, second = (run(form, case, arguments, torch.bfloat16, "triton", "cuda") for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())

"""The layer norm on PyTorch's path, its operators and what it refuses; PyTorch's own norm is the other side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad import ops
from subquad.ops import add_layer_norm, layer_norm
from subquad.ops.layer_norm import export_form, prepare, prepare_sum

SHAPES = [(2, 5, 7, 96), (3, 1), (1, 13), (4, 200), (6,), (0, 8)]


def tensors(shape: tuple[int, ...], bias: bool = True, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, branch, weight and maybe bias."""
    generator = torch.Generator().manual_seed(0)
    sizes = [shape, shape, shape[-1:], shape[-1:]][: 4 if bias else 3]
    return [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]


def grads(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """Results, then the gradients of a function of them that is not symmetric."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    found = function(*leaves)
    results = [found] if isinstance(found, Tensor) else list(found)
    loss = sum(((i + 1.5) * result).sin().sum() for i, result in enumerate(results))
    return [result.detach() for result in results] + list(torch.autograd.grad(loss, leaves))


def plain(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    total = x + branch
    return total, F.layer_norm(total, weight.shape, weight, bias, 1e-5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_pytorch_in_float64(shape: tuple[int, ...], bias: bool, backend: str) -> None:
    inputs = tensors(shape, bias)
    alone = [inputs[0], *inputs[2:]]
    with ops.use_backend(backend):
        found = grads(add_layer_norm, inputs) + grads(layer_norm, alone)
    norm = lambda x, weight, bias=None: F.layer_norm(x, weight.shape, weight, bias, 1e-5)
    for ours, theirs in zip(found, grads(plain, inputs) + grads(norm, alone), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_eps(eps: float) -> None:
    x, _, weight, bias = tensors((4, 9))
    torch.testing.assert_close(layer_norm(x, weight, bias, eps=eps), F.layer_norm(x, (9,), weight, bias, eps))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_rounded_once(dtype: torch.dtype) -> None:
    """A 16-bit result of float32 tensors is the float32 norm rounded, and gradients have the dtypes of the inputs."""
    x, branch, weight, bias = tensors((3, 5, 24), dtype=torch.float32)
    total, y = add_layer_norm(x, branch.to(dtype), weight, bias, dtype=dtype)
    assert torch.equal(total, x + branch.to(dtype)) and total.dtype == torch.float32
    assert torch.equal(y, F.layer_norm(total, (24,), weight, bias).to(dtype))
    leaves = [tensor.requires_grad_() for tensor in (x, branch.to(dtype), weight, bias.to(dtype))]
    total, y = add_layer_norm(*leaves, dtype=dtype)
    assert [grad.dtype for grad in torch.autograd.grad(total.sum() + y.float().square().sum(), leaves)] == [
        leaf.dtype for leaf in leaves
    ]


def test_16_bits_throughout() -> None:
    """Statistics are float32 even if nothing else is: the mean of large numbers would be lost otherwise."""
    x, branch, weight, bias = (tensor.bfloat16() for tensor in tensors((4, 512), dtype=torch.float32))
    x = x + 100
    total, y = add_layer_norm(x, branch, weight, bias)
    assert total.dtype == y.dtype == torch.bfloat16 and torch.equal(total, x + branch)
    expected = F.layer_norm(total.double(), (512,), weight.double(), bias.double())
    assert (y.double() - expected).norm() < 4e-3 * expected.norm()  # one rounding to 8 bits


@pytest.mark.parametrize("index", [0, 1])
def test_the_sum_alone_and_the_norm_alone_have_gradients(index: int) -> None:
    found = []
    for function in (add_layer_norm, plain):
        leaves = [tensor.requires_grad_() for tensor in tensors((3, 7))]
        loss = function(*leaves)[index].sin().sum()
        found.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_strides_do_not_matter() -> None:
    x, branch, weight, bias = tensors((4, 6, 10))
    expected = add_layer_norm(x, branch, weight, bias)
    turned = x.transpose(0, 2).contiguous().transpose(0, 2)
    wide = torch.cat([branch, branch], -1)[..., 10:]
    for ours, theirs in zip(add_layer_norm(turned, wide, weight, bias), expected, strict=True):
        assert torch.equal(ours, theirs) and ours.is_contiguous()


def test_autocast_changes_nothing() -> None:
    x, branch, weight, bias = tensors((4, 10), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total, y = add_layer_norm(x, branch, weight, bias)
    assert total.dtype == y.dtype == torch.float32
    assert torch.equal(y, F.layer_norm(x + branch, (10,), weight, bias))


def test_opcheck() -> None:
    x, branch, weight, bias = (tensor.requires_grad_() for tensor in tensors((2, 3, 5)))
    norm, add = torch.ops.subquad.layer_norm.default, torch.ops.subquad.add_layer_norm.default
    for last in (bias, None):
        torch.library.opcheck(norm, (x, weight, last, 1e-5, torch.float64))
        torch.library.opcheck(add, (x, branch, weight, last, 1e-5, torch.float64))


def test_export_forms_are_the_operators() -> None:
    x, branch, weight, bias = tensors((2, 5))
    assert torch.equal(export_form.export_form(x, weight, bias, 1e-5, torch.float64), layer_norm(x, weight, bias))
    pairs = zip(
        export_form.sum_form(x, branch, weight, bias, 1e-5, torch.float64), plain(x, branch, weight, bias), strict=True
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


X, W = torch.randn(2, 5), torch.randn(5)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "x must be a tensor, got list", ([1.0], W), {}),
        (TypeError, "weight must be a tensor, got int", (X, 1), {}),
        (TypeError, "x must be of dtype", (X.long(), W), {}),
        (ValueError, "at least one channel, got shape", (torch.zeros(()), W), {}),
        (ValueError, r"weight must have shape \(C,\) = \(5,\), got \(4,\)", (X, W[:4]), {}),
        (ValueError, r"bias must have shape \(C,\) = \(5,\), got \(1, 5\)", (X, W, W[None]), {}),
        (ValueError, "weight is on meta", (X, W.to("meta")), {}),
        (ValueError, "eps must be positive, got 0", (X, W), {"eps": 0.0}),
        (ValueError, "eps must be finite", (X, W), {"eps": float("nan")}),
        (TypeError, "eps must be a number, got 'a'", (X, W), {"eps": "a"}),
        (TypeError, "dtype must be one of", (X, W), {"dtype": torch.int32}),
    ],
)
def test_refuses(error: type[Exception], message: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        layer_norm(*arguments, **options)


def test_refuses_a_branch_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"branch must have shape that of x = \(2, 5\), got \(1, 5\)"):
        add_layer_norm(X, X[:1], W)
    with pytest.raises(TypeError, match="branch must be a tensor, got NoneType"):
        add_layer_norm(X, None, W)  # type: ignore[arg-type]


def test_explains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subquad.ops._triton.why_not", lambda x: None)
    wide = torch.randn(2, 5000)
    for call, reason in (
        ((X.double(), W), "float64"),
        ((X[:0], W), "empty batch"),
        ((wide, wide[0]), "5000 channels"),
    ):
        explanation = ops.explain(layer_norm, *call)
        assert explanation.chosen == "torch" and reason in explanation.passed_over["triton"]
    assert ops.explain(layer_norm, X, W).chosen == "triton"
    assert ops.explain(add_layer_norm, X, X.half(), W).chosen == "triton"
    assert prepare_sum(X, X.double(), W).dtype == torch.float64 and prepare(X.half(), W).dtype == torch.float16

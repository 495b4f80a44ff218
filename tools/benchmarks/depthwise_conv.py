"""The depthwise convolution as a benchmark entry, with a bias: on maps, and on sequences, which are maps of one row.

Variants: ``3x3-silu`` (VMamba), ``3x3-residual`` (position encodings), ``5x5`` (local branches) and ``causal4-silu``
(Vim). The peers convolve the same memory as a channels-last (B, C, H, W), with cuDNN's choice of algorithm and with its
search.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import causal_conv1d, depthwise_conv2d, explain, use_backend
from subquad.tools.benchmarks.registry import Case, Cost, Inputs, OpEntry, System, Tensors

_KERNELS = {"3x3-silu": (3, 3), "3x3-residual": (3, 3), "5x5": (5, 5), "causal4-silu": (1, 4)}


def _cases() -> tuple[Case, ...]:
    """The stages of vmamba_tiny at 224 px, the first at 1024 px, a local branch, and the sequences of vim_tiny."""
    stages = [(128, 56 >> stage, 56 >> stage, 96 << stage) for stage in range(4)]
    cases = [Case(shape, "3x3-silu") for shape in (*stages, (8, 256, 256, 96))]
    cases += [Case(shape, "3x3-residual") for shape in stages[:3]]
    return (*cases, Case((128, 56, 56, 64), "5x5"), Case((128, 1, 197, 384), "causal4-silu"))


def _inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    dim, kernel = case.shape[-1], _KERNELS[case.variant]
    x = torch.randn(case.shape, dtype=dtype, device=device)
    return Inputs(
        {"x": x}, {"weight": torch.randn(dim, *kernel, device=device), "bias": torch.randn(dim, device=device)}
    )


def _options(case: Case) -> tuple[str, bool]:
    return "silu" if case.variant.endswith("silu") else "none", case.variant.endswith("residual")


def _ours(case: Case, tensors: Tensors) -> Tensor:
    x, weight, bias = tensors["x"], tensors["weight"], tensors["bias"]
    activation, residual = _options(case)
    if case.variant.startswith("causal"):
        return causal_conv1d(x.squeeze(1), weight.squeeze(1), bias, activation=activation).unsqueeze(1)
    return depthwise_conv2d(x, weight, bias, activation=activation, residual=residual)


def _backend(case: Case, tensors: Tensors) -> str:
    x, weight, bias = tensors["x"], tensors["weight"], tensors["bias"]
    with torch.no_grad():
        if case.variant.startswith("causal"):
            return explain(causal_conv1d, x.squeeze(1), weight.squeeze(1), bias).chosen or "none"
        return explain(depthwise_conv2d, x, weight, bias).chosen or "none"


def _reference(case: Case, tensors: Tensors) -> Tensor:
    """The PyTorch path in float64; the tests of the op compare it with the reference."""
    with use_backend("torch"):
        return _ours(case, tensors)


def _plain(case: Case, tensors: Tensors) -> Tensor:
    """Convolution, sum and activation as modules do them."""
    x, dtype = tensors["x"], tensors["x"].dtype
    weight, bias = tensors["weight"].to(dtype).unsqueeze(1), tensors["bias"].to(dtype)
    activation, residual = _options(case)
    kh, kw = _KERNELS[case.variant]
    causal = case.variant.startswith("causal")
    padding = (0, kw - 1) if causal else (kh // 2, kw // 2)
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=x.shape[-1]).permute(0, 2, 3, 1)
    y = y[:, :, : x.shape[2]] if causal else y
    y = x + y if residual else y
    return F.silu(y) if activation == "silu" else y


def _cudnn(search: bool) -> AbstractContextManager[None]:
    return torch.backends.cudnn.flags(enabled=True, benchmark=search, allow_tf32=False)


def _why_no_search(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "cuDNN's search needs a CUDA GPU"


def _cost(case: Case, itemsize: int) -> Cost:
    """Bytes: x in, y out; the backward pass reads x and dy and writes dx. Exponentials: of an activation, in both."""
    batch, height, width, dim = case.shape
    numbers = batch * height * width * dim
    exps = numbers * (_options(case)[0] != "none")
    return Cost(2 * numbers * itemsize, 5 * numbers * itemsize, exps, 2 * exps)


ENTRY = OpEntry(
    name="depthwise_conv",
    axes="BxHxWxC",
    variants=tuple(_KERNELS),
    cases=_cases(),
    inputs=_inputs,
    ours=System("ours", _ours),
    peers=(
        System("conv2d", _plain, context=partial(_cudnn, False)),
        System("conv2d_search", _plain, _why_no_search, context=partial(_cudnn, True)),
    ),
    reference=_reference,
    cost=_cost,
    backend=_backend,
)

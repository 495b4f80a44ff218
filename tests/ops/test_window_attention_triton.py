"""The Triton kernels of window attention against the float64 reference: values and every gradient.

The same cases run in Triton's interpreter on the CPU (``interpret``: fp32 and fp16, small shapes) and on a GPU
(``gpu``: bf16 too, and shapes with many programs).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from subquad import ops
from subquad.ops import window_attention, window_attention_packed
from subquad.ops.window_attention import prepare

# Relative L2 error per dtype: rounding of operands of the products (fp32: none) and of results.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


class Case(NamedTuple):
    """(B, H, W, heads, D), and what differs from a window of 7 x 7 with a table and padding of its own."""

    shape: tuple[int, int, int, int, int]
    window: tuple[int, int] = (7, 7)
    values: int | None = None
    table: bool = True
    pad: bool = True
    packed: bool = False
    options: dict[str, Any] = {}  # noqa: RUF012


SMALL = {
    "7x7": Case((1, 14, 7, 2, 8)),
    "shifted": Case((2, 8, 8, 3, 16), (4, 4), options={"shift": (2, 1)}),
    "ragged": Case((1, 9, 11, 2, 16), (4, 4), options={"shift": 2}),
    "ragged, padded first": Case((1, 9, 11, 2, 16), (4, 4), options={"shift": 2, "order": "pad_roll"}),
    "hidden padding": Case((1, 5, 10, 2, 8), (3, 4), pad=False, options={"shift": (2, 3), "hide_padding": True}),
    "hidden padding, padded first": Case(
        (1, 5, 10, 2, 8), (3, 4), pad=False, options={"shift": 1, "hide_padding": True, "order": "pad_roll"}
    ),
    "zero padding": Case((1, 5, 6, 1, 8), (3, 5), pad=False),
    "map below the window": Case((1, 2, 3, 2, 8), (5, 6), options={"shift": (3, 4)}),
    "minus infinity": Case((1, 8, 6, 2, 8), (4, 3), options={"shift": (2, 1), "mask_value": -torch.inf}),
    "grid": Case((1, 6, 8, 2, 8), (3, 4), options={"grid": True, "index": "k-q"}),
    "no table": Case((1, 6, 6, 2, 8), (5, 3), table=False, options={"shift": (1, 1)}),
    "odd channels": Case((1, 6, 6, 2, 5), (3, 3), values=12),
    "packed": Case((2, 8, 9, 2, 8), (4, 5), packed=True, options={"shift": 2}),
    "one pixel": Case((1, 1, 1, 1, 1), (1, 1)),
    "several tiles": Case((1, 9, 17, 2, 8), (9, 8), options={"shift": (4, 3)}),
    "several tiles, padded first": Case((1, 13, 11, 1, 8), (12, 11), options={"shift": (3, 0), "order": "pad_roll"}),
    "several tiles, hidden padding": Case(
        (1, 5, 10, 1, 8), (9, 8), pad=False, options={"shift": 1, "hide_padding": True, "order": "pad_roll"}
    ),
}
LARGE = {
    "swin stage 1": Case((4, 56, 56, 3, 32), packed=True),
    "swin stage 1, shifted": Case((4, 56, 56, 3, 32), packed=True, options={"shift": 3}),
    "swin stage 4": Case((19, 7, 7, 24, 32), packed=True),
    "odd map, shifted": Case((2, 61, 45, 4, 32), options={"shift": 3}),
    "odd map, padded first": Case((2, 61, 45, 4, 32), options={"shift": 3, "order": "pad_roll"}),
    "8x8 of 64 channels": Case((2, 40, 48, 2, 64), (8, 8), options={"shift": 4}),
    "grid": Case((2, 28, 42, 4, 32), options={"grid": True}),
    "swin of 384 px, shifted": Case((2, 48, 48, 4, 32), (12, 12), packed=True, options={"shift": 6}),
    "16x16, odd map": Case((2, 45, 33, 4, 32), (16, 16), options={"shift": 8, "order": "pad_roll"}),
    "128 channels": Case((2, 14, 21, 2, 128), options={"shift": (0, 3)}),
}


def inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random arguments, exactly representable in ``dtype`` where they are activations."""
    generator = torch.Generator().manual_seed(0)
    (*_, heads, dim), values = case.shape, case.values or case.shape[-1]
    shapes: dict[str, tuple[int, ...]] = {"q": case.shape, "k": case.shape, "v": (*case.shape[:-1], values)}
    if case.pad:
        shapes |= {"pad_k": (heads, dim), "pad_v": (heads, values)}
    result = {name: torch.randn(shape, generator=generator).to(dtype).double() for name, shape in shapes.items()}
    if case.table:
        entries = (2 * case.window[0] - 1) * (2 * case.window[1] - 1)
        result["table"] = torch.randn((entries, heads), generator=generator).double()
    return result


def run(case: Case, arguments: dict[str, Tensor], dtype: torch.dtype, backend: str, device: str) -> dict[str, Tensor]:
    """Output and all gradients, in float64 on the CPU."""
    leaves = {}
    for name, value in arguments.items():
        narrow = dtype if name != "table" or dtype == torch.float64 else torch.float32
        leaves[name] = value.to(device, narrow, copy=True).requires_grad_()
    with ops.use_backend(backend):
        if case.packed:
            rest = {name: leaf for name, leaf in leaves.items() if name not in ("q", "k", "v")}
            qkv = torch.stack([leaves[name] for name in ("q", "k", "v")], dim=3)
            o = window_attention_packed(qkv, case.window, **rest, **case.options)
        else:
            o = window_attention(**leaves, window=case.window, **case.options)
        cotangent = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).half()
        o.backward(cotangent.to(device, o.dtype))
    found = {"o": o} | {f"grad {name}": leaf.grad for name, leaf in leaves.items()}
    return {name: value.detach().double().cpu() for name, value in found.items()}


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    arguments = inputs(case, dtype)
    expected = run(case, arguments, torch.float64, "torch" if device == "cuda" else "reference", "cpu")
    found = run(case, arguments, dtype, "triton", device)
    errors = {
        # A gradient that is zero but for rounding (q and k of a single key) is compared with a unit scale.
        name: ((found[name] - value).norm() / value.norm().clamp_min(1e-3 * value.numel() ** 0.5)).item()
        for name, value in expected.items()
    }
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE[dtype]}
    assert not wrong, f"relative errors above {TOLERANCE[dtype]}: {wrong}"


@pytest.mark.interpret
@pytest.mark.parametrize("name", SMALL)
def test_interpreted_fp32(name: str, poisoned_memory: None) -> None:
    check(SMALL[name], torch.float32, "cpu")


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["shifted", "ragged", "packed"])
def test_interpreted_fp16(name: str, poisoned_memory: None) -> None:
    check(SMALL[name], torch.float16, "cpu")


@pytest.mark.interpret
def test_strides_do_not_matter(poisoned_memory: None) -> None:
    """Views of one projection run as they are, any other layout as a copy."""
    case = SMALL["shifted"]
    arguments = {name: value.float() for name, value in inputs(case, torch.float32).items()}
    strided = dict(arguments)
    strided["q"], strided["k"] = torch.stack([arguments["q"], arguments["k"]], dim=3).unbind(3)
    strided["v"] = arguments["v"].permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    strided["table"] = arguments["table"].mT.contiguous().mT
    with ops.use_backend("triton"):
        mine, expected = (window_attention(**x, window=case.window, **case.options) for x in (strided, arguments))
    assert torch.equal(mine, expected)


def test_what_the_kernels_do_not_serve_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subquad.ops._triton.why_not", lambda x: None)
    arguments = {name: value.float() for name, value in inputs(SMALL["7x7"], torch.float32).items()}
    wide = {name: value.repeat(1, 1, 1, 1, 17) for name, value in arguments.items() if name in ("q", "k", "v")}
    plain = {name: arguments[name] for name in ("q", "k", "v")}
    for changed, reason in (
        (plain | {"window": (19, 14)}, "windows of 266 tokens"),
        (wide | {"window": 7}, "heads of 136 channels"),
        ({name: value.double() for name, value in plain.items()} | {"window": 7}, "float64"),
        ({name: value[:0] for name, value in plain.items()} | {"window": 7}, "empty batch"),
    ):
        explanation = ops.explain(window_attention, **changed)
        assert explanation.chosen == "torch" and reason in explanation.passed_over["triton"]
    assert ops.explain(window_attention, **plain, window=7).chosen == "triton"
    assert prepare(**plain, window=7).tokens == 49


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_small_on_gpu(name: str, dtype: torch.dtype, poisoned_memory: None) -> None:
    check(SMALL[name], dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_large_on_gpu(name: str, dtype: torch.dtype, poisoned_memory: None) -> None:
    if dtype == torch.float32 and LARGE[name].shape[-1] > 64:
        dtype = torch.float16  # float32 of wide heads runs in PyTorch
    check(LARGE[name], dtype, "cuda")


@pytest.mark.gpu
def test_results_are_the_same_to_the_bit() -> None:
    case = LARGE["odd map, shifted"]
    arguments = inputs(case, torch.bfloat16)
    first, second = (run(case, arguments, torch.bfloat16, "triton", "cuda") for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.gpu
def test_patched_model_trains_like_timms() -> None:
    import timm

    from subquad.ops.window_attention import patch

    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", drop_path_rate=0.0).cuda()
    image = torch.randn(2, 3, 224, 224, device="cuda")
    results = []
    for change in (lambda model: model, patch):
        change(model).zero_grad()
        y = model(image)
        y.square().sum().backward()
        results.append([y.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for theirs, mine in zip(*results, strict=True):
        # float32 with tf32 off on both sides, over 12 blocks
        assert (mine - theirs).norm() <= 1e-3 * theirs.norm().clamp_min(1e-4)

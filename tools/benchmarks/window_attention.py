"""Window attention of a packed projection as a benchmark entry, with windows of 7 x 7 and a relative bias.

``shifted`` windows are shifted by 3. The peers roll, partition and put back what they attend, as timm does.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import explain, use_backend, window_attention, window_attention_packed
from subquad.tools.benchmarks.registry import Case, Cost, Inputs, OpEntry, System, Tensors

_WINDOW = 7
_SHIFTS = {"plain": 0, "shifted": _WINDOW // 2}


def _cases() -> tuple[Case, ...]:
    """The stages of swin_tiny, at 224 px and at 1024 px (ragged maps), where a stage has more than one window."""
    shapes = [(128, 56 >> stage, 56 >> stage, 3 << stage, 32) for stage in range(4)]
    shapes += [(8, 256 >> stage, 256 >> stage, 3 << stage, 32) for stage in (0, 2)]
    cases = [Case(shape, variant) for shape in shapes for variant in _SHIFTS]
    return tuple(case for case in cases if case.variant == "plain" or case.shape[1] > _WINDOW)


def _inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    batch, height, width, heads, dim = case.shape
    qkv = torch.randn((batch, height, width, 3, heads, dim), dtype=dtype, device=device)
    return Inputs({"qkv": qkv}, {"table": torch.randn(((2 * _WINDOW - 1) ** 2, heads), device=device)})


def _ours(case: Case, tensors: Tensors) -> Tensor:
    return window_attention_packed(tensors["qkv"], _WINDOW, _SHIFTS[case.variant], table=tensors["table"])


def _backend(case: Case, tensors: Tensors) -> str:
    q, k, v = tensors["qkv"].unbind(3)
    with torch.no_grad():
        chosen = explain(window_attention, q, k, v, _WINDOW, _SHIFTS[case.variant], table=tensors["table"]).chosen
    return chosen or "none"


def _reference(case: Case, tensors: Tensors) -> Tensor:
    """The PyTorch path in float64; the tests of the op compare it with the reference."""
    with use_backend("torch"):
        return _ours(case, tensors)


def _copied(case: Case, tensors: Tensors, *, fused: bool) -> Tensor:
    """Roll, pad, partition; attention in every window, fused or as timm's default; and back."""
    _, height, width, heads, dim = case.shape
    shift, qkv = _SHIFTS[case.variant], tensors["qkv"].flatten(3)
    rows, columns = -(-height // _WINDOW), -(-width // _WINDOW)
    qkv = F.pad(qkv.roll((-shift, -shift), (1, 2)), (0, 0, 0, columns * _WINDOW - width, 0, rows * _WINDOW - height))
    qkv = qkv.unflatten(2, (columns, _WINDOW)).unflatten(1, (rows, _WINDOW)).transpose(2, 3)
    q, k, v = qkv.reshape(-1, _WINDOW**2, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)  # (B windows, heads, n, D)
    bias = tensors["table"][_pairs(qkv.device)].permute(2, 0, 1).to(qkv.dtype)
    if shift:
        mask = _mask(rows, columns, shift, qkv).unsqueeze(1) + bias  # (windows, heads, n, n)
        bias = mask.repeat(len(q) // len(mask), 1, 1, 1) if fused else mask
    if fused:
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        logits = (q * dim**-0.5) @ k.mT
        o = (logits.unflatten(0, (-1, len(bias))) + bias if shift else logits + bias).view_as(logits).softmax(-1) @ v
    o = o.transpose(1, 2).reshape(-1, rows, columns, _WINDOW, _WINDOW, heads, dim).transpose(2, 3)
    o = o.flatten(3, 4).flatten(1, 2)[:, :height, :width]
    return o.roll((shift, shift), (1, 2))


def _pairs(device: torch.device) -> Tensor:
    """Row of the table for each query and key of a window."""
    p = torch.arange(_WINDOW, device=device)
    apart = p[:, None] - p + _WINDOW - 1
    return (apart[:, None, :, None] * (2 * _WINDOW - 1) + apart[None, :, None, :]).flatten(2).flatten(0, 1)


def _mask(rows: int, columns: int, shift: int, like: Tensor) -> Tensor:
    """-100 between tokens that a shift has brought together, (windows, n, n)."""
    regions = []
    for count in (rows, columns):
        p = torch.arange(count * _WINDOW, device=like.device)
        regions.append((p >= len(p) - _WINDOW).long() + (p >= len(p) - shift))
    region = 3 * regions[0][:, None] + regions[1]
    region = region.view(rows, _WINDOW, columns, _WINDOW).transpose(1, 2).reshape(-1, _WINDOW**2)
    return (region[:, :, None] != region[:, None, :]).to(like.dtype) * -100.0


def _cost(case: Case, itemsize: int) -> Cost:
    """Bytes: q, k, v in, o and 4 bytes a token and head out; backward reads these and do, writes three gradients.

    Exponentials: one for each pair of tokens in a window, again in the backward pass.
    """
    batch, height, width, heads, dim = case.shape
    rows = batch * height * width * heads
    forward = rows * (4 * dim * itemsize + 4)
    pairs = rows * _WINDOW**2
    return Cost(forward, forward + rows * (8 * dim * itemsize + 4), pairs, 2 * pairs)


def _why_not_torch_path(device: torch.device) -> str | None:
    probe = Case((1, 7, 7, 1, 16), "plain")
    backend = _backend(probe, _inputs(probe, torch.float32, device).all())
    return "it is what ours runs on this device" if backend == "torch" else None


ENTRY = OpEntry(
    name="window_attention",
    axes="BxHxWxhxD",
    variants=tuple(_SHIFTS),
    cases=_cases(),
    inputs=_inputs,
    ours=System("ours", _ours),
    peers=(
        System("timm_eager", partial(_copied, fused=False)),
        System("sdpa", partial(_copied, fused=True)),
        System("torch_path", _ours, _why_not_torch_path, context=partial(use_backend, "torch")),
    ),
    reference=_reference,
    cost=_cost,
    backend=_backend,
)

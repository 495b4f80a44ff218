"""Neighborhood attention of maps as a benchmark entry, ``plain`` or with a relative positional ``bias``.

FlexAttention gets the exact windows as a block mask that is made outside the timing, with tokens row by row and in
tiles of 8 x 8 (permuted outside the timing); PyTorch's dense attention as an additive mask, which includes the bias.

Two more variants run beside the PyTorch path alone: ``extra``, maps with 16 additional keys, and ``volume``, with as
many planes as rows.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import explain, na2d, na3d, use_backend
from subquad.ops.neighborhood_attention.reference import windows
from subquad.tools.benchmarks import recorded
from subquad.tools.benchmarks.registry import Case, Cost, Inputs, OpEntry, Recorded, System, Tensors

_MODELS = ((128, 2, 56, 56, 32, 7), (128, 4, 28, 28, 32, 7), (128, 8, 14, 14, 32, 7), (128, 16, 7, 7, 32, 7))
_LARGE = ((8, 2, 256, 256, 32, 7), (8, 4, 128, 128, 32, 7), (8, 8, 64, 64, 32, 7))
_DILATED = (
    *((128, 2, 56, 56, 32, 7, 8), (128, 4, 28, 28, 32, 7, 4), (128, 8, 14, 14, 32, 7, 2)),
    (8, 4, 128, 128, 32, 7, 16),
)
_WIDE = ((8, 4, 128, 128, 32, 13), (8, 4, 128, 128, 64, 13), (8, 4, 128, 128, 32, 31))
_VOLUMES = ((2, 4, 32, 32, 32, 3, 1), (2, 4, 32, 32, 32, 7, 1))
_EXTRA_KEYS = 16
_MOST_DENSE_TOKENS = 4096


def _cases() -> tuple[Case, ...]:
    plain = (*((*shape, 1) for shape in (*_MODELS, *_LARGE, *_WIDE)), *_DILATED)
    bias = (*((*shape, 1) for shape in (*_MODELS, *_LARGE)), *_DILATED)
    return (
        *(Case(shape, "plain") for shape in plain),
        *(Case(shape, "bias") for shape in bias),
        *(Case(shape, "volume") for shape in _VOLUMES),
        Case((*_MODELS[0], 1), "extra"),
    )


def _size(case: Case) -> tuple[int, ...]:
    height, width = case.shape[2:4]
    return (height, height, width) if case.variant == "volume" else (height, width)


def _inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    batch, heads, _, _, dim, kernel, _ = case.shape
    shapes = dict.fromkeys(("q", "k", "v"), (batch, *_size(case), heads, dim))
    if case.variant == "extra":
        shapes |= dict.fromkeys(("additional_keys", "additional_values"), (batch, _EXTRA_KEYS, heads, dim))
    batched = {name: torch.randn(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    if case.variant != "bias":
        return Inputs(batched, {})
    return Inputs(batched, {"rpb": torch.randn(heads, 2 * kernel - 1, 2 * kernel - 1, device=device)})


def _arguments(case: Case, tensors: Tensors) -> dict[str, Any]:
    return {**tensors, "kernel_size": case.shape[-2], "dilation": case.shape[-1]}


def _ours(case: Case, tensors: Tensors) -> Tensor:
    o = (na3d if case.variant == "volume" else na2d)(**_arguments(case, tensors))
    assert isinstance(o, Tensor)
    return o


def _backend(case: Case, tensors: Tensors) -> str:
    with torch.no_grad():
        return explain(f"na{len(_size(case))}d", **_arguments(case, tensors)).chosen or "none"


def _reference(case: Case, tensors: Tensors) -> Tensor:
    """The PyTorch path in float64; the tests of the op compare it with the formula."""
    with use_backend("torch"):
        return _ours(case, tensors)


def _cost(case: Case, itemsize: int) -> Cost:
    """Bytes: q, k, v in and o out; the backward pass reads them again and do, writes three gradients.

    Exponentials: one for each pair, once more in the backward pass.
    """
    batch, heads, _, _, dim, kernel, _ = case.shape
    size, extra = _size(case), _EXTRA_KEYS if case.variant == "extra" else 0
    rows = batch * heads * math.prod(size)
    forward = (4 * rows + 2 * batch * heads * extra) * dim * itemsize
    pairs = rows * (kernel ** len(size) + extra)
    return Cost(forward, 3 * forward, pairs, 2 * pairs)


def _recorded(case: Case) -> Recorded | None:
    found = recorded.NEIGHBORHOOD.get(case.shape) if case.variant in _OF_PEERS else None
    return None if found is None else Recorded(recorded.GPU, recorded.NEIGHBORHOOD_SYSTEM, *found, None)


# Peers that attend sequences (B, heads, N, D) --------------------------------------------------------------------

_OF_PEERS = ("plain", "bias")


class _Tokens(NamedTuple):
    """Tokens in the order of a sequence, each (N,).

    Attributes:
        order: place in the map, row by row.
        y, x: row and column.
        first_y, first_x: row and column of the first key that a token sees.
    """

    order: Tensor
    y: Tensor
    x: Tensor
    first_y: Tensor
    first_x: Tensor


@lru_cache(maxsize=4)
def _tokens(case: Case, tile: int, device: torch.device) -> _Tokens:
    """Tiles of ``tile`` x ``tile`` tokens behind each other; 1 for tokens row by row."""
    _, _, height, width, _, kernel, dilation = case.shape
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    order = ((y // tile * (width // tile + 1) + x // tile) * tile + y % tile) * tile + x % tile
    order = order.argsort()
    first_y, first_x = (windows(length, kernel, dilation, 1, False).key[:, 0] for length in (height, width))
    y, x = y[order], x[order]
    return _Tokens(*(table.to(device) for table in (order, y, x, first_y[y], first_x[x])))


def _to_sequence(tile: int, case: Case, name: str, value: Tensor) -> Tensor:
    if case.variant not in _OF_PEERS:
        raise ValueError(f"this peer is set up for the variants {', '.join(_OF_PEERS)}, not for {case.variant}")
    if name == "rpb":
        return value
    return value.flatten(1, 2)[:, _tokens(case, tile, value.device).order].transpose(1, 2).contiguous()


def _from_sequence(tile: int, case: Case, name: str, value: Tensor) -> Tensor:
    if name == "rpb":
        return value
    inverse = _tokens(case, tile, value.device).order.argsort()
    return value.transpose(1, 2)[:, inverse].unflatten(1, case.shape[2:4])


@lru_cache(maxsize=4)
def _flex(case: Case, tile: int, device: torch.device) -> tuple[Any, Any, _Tokens]:
    """Compiled FlexAttention and the windows as its block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # after some shapes PyTorch would go on uncompiled, without a word
    kernel, dilation = case.shape[-2:]
    tokens = _tokens(case, tile, device)
    _, y, x, first_y, first_x = tokens
    length, reach = y.numel(), kernel * dilation

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        down, right = y[key] - first_y[query], x[key] - first_x[query]
        inside = (down >= 0) & (down < reach) & (right >= 0) & (right < reach)
        return inside & (down % dilation == 0) & (right % dilation == 0)

    mask = torch.compile(create_block_mask)(sees, None, None, length, length, device=device)
    return torch.compile(flex_attention, dynamic=False), mask, tokens


def _attend_flex(tile: int, case: Case, tensors: Tensors) -> Tensor:
    kernel, dilation = case.shape[-2:]
    attend, mask, (_, y, x, _, _) = _flex(case, tile, tensors["q"].device)
    if case.variant == "plain":
        return attend(tensors["q"], tensors["k"], tensors["v"], block_mask=mask)
    rpb = tensors["rpb"]

    def add_bias(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        down, right = ((axis[key] - axis[query]) // dilation + kernel - 1 for axis in (y, x))
        return score + rpb[h, down.clamp(0, 2 * kernel - 2), right.clamp(0, 2 * kernel - 2)]

    return attend(tensors["q"], tensors["k"], tensors["v"], score_mod=add_bias, block_mask=mask)


@lru_cache(maxsize=1)
def _dense_tables(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which tokens see each other, (N, N), and the entry of the bias table for each pair."""
    kernel, dilation = case.shape[-2:]
    _, y, x, first_y, first_x = _tokens(case, 1, device)
    sees = torch.ones((), dtype=torch.bool, device=device)
    entry = torch.zeros((), dtype=torch.int64, device=device)
    for axis, first in ((y, first_y), (x, first_x)):
        place = axis - first[:, None]
        sees = sees & (place >= 0) & (place < kernel * dilation) & (place % dilation == 0)
        relative = (axis - axis[:, None]) // dilation + kernel - 1
        entry = entry * (2 * kernel - 1) + relative.clamp(0, 2 * kernel - 2)
    return sees, entry


def _attend_dense(case: Case, tensors: Tensors) -> Tensor:
    q = tensors["q"]
    if q.shape[2] > _MOST_DENSE_TOKENS:
        raise ValueError(f"a mask of {q.shape[2]} x {q.shape[2]} tokens, more than {_MOST_DENSE_TOKENS} are not tried")
    sees, entry = _dense_tables(case, q.device)
    if case.variant == "plain":
        mask = None if case.shape[2:4] == (case.shape[-2],) * 2 else sees  # a window that covers the map hides nothing
    else:
        mask = tensors["rpb"].to(q.dtype).flatten(1)[:, entry].masked_fill(~sees, -torch.inf)
    return F.scaled_dot_product_attention(q, tensors["k"], tensors["v"], attn_mask=mask)


def _why_not_flex(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "compiled FlexAttention has gradients on a GPU only"


def _why_not_torch_path(device: torch.device) -> str | None:
    probe = Case((1, 1, 4, 4, 16, 3, 1), "plain")
    backend = _backend(probe, _inputs(probe, torch.float32, device).all())
    return "it is what ours runs on this device" if backend == "torch" else None


def _sequences(name: str, call: Any, tile: int, **more: Any) -> System:
    return System(name, call, to_native=partial(_to_sequence, tile), from_native=partial(_from_sequence, tile), **more)


ENTRY = OpEntry(
    name="neighborhood_attention",
    axes="BxHEADSxHxWxDxKxDILATION",
    variants=("plain", "bias", "extra", "volume"),
    cases=_cases(),
    inputs=_inputs,
    ours=System("ours", _ours),
    peers=(
        _sequences("flex_rows", partial(_attend_flex, 1), 1, why_not=_why_not_flex),
        _sequences("flex_tiles", partial(_attend_flex, 8), 8, why_not=_why_not_flex),
        _sequences("dense_sdpa", _attend_dense, 1),
        System("torch_path", _ours, _why_not_torch_path, context=partial(use_backend, "torch")),
    ),
    reference=_reference,
    cost=_cost,
    backend=_backend,
    recorded=_recorded,
)

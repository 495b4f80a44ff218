"""Region attention as a benchmark entry: n x n regions of a map, each of which looks at topk of them.

The choice is drawn once for each case and is the same for all images; routing is not part of the op. The peer gathers
the keys and values of all chosen regions before it attends, as released code of BiFormer does.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import explain, region_attention, use_backend
from subquad.ops.region_attention.call import cut, join
from subquad.tools.benchmarks.registry import Case, Cost, Inputs, OpEntry, System, Tensors

_MOST_GATHERED = 2**34
"""Bytes of keys and values that the peer may gather."""


def _cases() -> tuple[Case, ...]:
    """The routed stages of biformer_tiny at 224 px, and with 16 x 16 regions of an image of 800 x 1216."""
    shapes = [(128, 56 >> stage, 56 >> stage, 2 << stage, 32, 7, 4**stage) for stage in range(3)]
    shapes += [(2, 208, 304, 2, 32, 16, 1), (2, 112, 160, 4, 32, 16, 4), (2, 64, 80, 8, 32, 16, 16)]
    return tuple(Case(shape, "plain") for shape in shapes)


def _inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    shape = case.shape[:5]
    return Inputs({name: torch.randn(shape, dtype=dtype, device=device) for name in ("q", "k", "v")}, {})


def _size(case: Case) -> list[int]:
    _, height, width, _, _, count, _ = case.shape
    return [-(-height // count), -(-width // count)]


@lru_cache(maxsize=4)
def _choice(case: Case, images: int, device: torch.device) -> Tensor:
    """Distinct regions for each region, (images, 1, R, topk)."""
    rows, columns = (-(-length // step) for length, step in zip(case.shape[1:3], _size(case), strict=True))
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(rows * columns, rows * columns, generator=generator).argsort(dim=-1)
    return order[:, : case.shape[-1]].to(device).expand(images, 1, -1, -1).contiguous()


def _arguments(case: Case, tensors: Tensors) -> dict[str, Any]:
    regions = _choice(case, tensors["q"].shape[0], tensors["q"].device)
    return {**tensors, "regions": regions, "region_size": _size(case)}


def _ours(case: Case, tensors: Tensors) -> Tensor:
    return region_attention(**_arguments(case, tensors))


def _backend(case: Case, tensors: Tensors) -> str:
    with torch.no_grad():
        return explain(region_attention, **_arguments(case, tensors)).chosen or "none"


def _reference(case: Case, tensors: Tensors) -> Tensor:
    """The PyTorch path in float64; the tests of the op compare it with the reference."""
    with use_backend("torch"):
        return _ours(case, tensors)


def _gathered(case: Case, tensors: Tensors) -> Tensor:
    """Cut the maps, gather keys and values, dense attention of each region, and back."""
    batch, height, width, heads, dim, _, topk = case.shape
    size = _size(case)
    needed = 2 * topk * tensors["k"].numel() * tensors["k"].element_size()
    if needed > _MOST_GATHERED:
        raise ValueError(f"{needed} bytes of gathered keys and values, more than {_MOST_GATHERED} are not tried")
    q, k, v = (cut(tensors[name], size) for name in ("q", "k", "v"))  # (B, heads, R, tokens, D)
    regions = _choice(case, batch, q.device).expand(-1, heads, -1, -1).flatten(2)[..., None, None]
    k, v = (
        x.gather(2, regions.expand(-1, -1, -1, *x.shape[3:])).unflatten(2, (-1, topk)).flatten(3, 4) for x in (k, v)
    )
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, scale=dim**-0.5)
    return join(o.unflatten(0, (batch, heads)), size, height, width)


def _cost(case: Case, itemsize: int) -> Cost:
    """Bytes: q, k, v in, o and 4 bytes a token and head out; backward reads these and do, writes three gradients.

    Exponentials: one for each pair of a query and a key that it looks at, again in the backward pass.
    """
    batch, height, width, heads, dim, _, topk = case.shape
    rows = batch * height * width * heads
    forward = rows * (4 * dim * itemsize + 4)
    size = _size(case)
    pairs = rows * topk * size[0] * size[1]
    return Cost(forward, forward + rows * (8 * dim * itemsize + 4), pairs, 2 * pairs)


def _why_not_torch_path(device: torch.device) -> str | None:
    probe = Case((1, 4, 4, 1, 16, 2, 2), "plain")
    backend = _backend(probe, _inputs(probe, torch.float32, device).all())
    return "it is what ours runs on this device" if backend == "torch" else None


ENTRY = OpEntry(
    name="region_attention",
    axes="BxHxWxhxDxREGIONSxTOPK",
    variants=("plain",),
    cases=_cases(),
    inputs=_inputs,
    ours=System("ours", _ours),
    peers=(
        System("gathered_sdpa", _gathered),
        System("torch_path", _ours, _why_not_torch_path, context=partial(use_backend, "torch")),
    ),
    reference=_reference,
    cost=_cost,
    backend=_backend,
)

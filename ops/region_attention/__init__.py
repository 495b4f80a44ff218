"""Attention of regions of a map to the regions that were chosen for them: the contract.

Queries and keys lie on maps that are cut into regions, row by row: those of the queries of r_h x r_w tokens, those of
the keys of their own size; the last ones may reach beyond the map. ``regions`` names for each region R of queries the
topk regions of keys that its queries attend to, all in one softmax:

    logit_ij = scale w_s <q_i, k_j>        j in the region regions[R(i), s], slot s with its weight w_s (1 by default)
    o_i = sum_j softmax_j(logit_i)_j w_s v_j

A place of a region of keys beyond the map is padding: it has the key ``pad_k`` and the value ``pad_v``, zeros by
default, and is attended like any other; with ``hide_padding`` it is not. Padding has no queries.

``route_regions`` chooses: the regions of keys whose mean key has the largest product with the mean query, in float32.

Source: arXiv 2303.08810 (BiFormer), equations 3 to 7. Instead of gathering the keys and values of all regions before it
attends (which takes topk times their memory), the op looks them up as it goes.

Layout is (B, H, W, heads, channels), with any strides. q, k, v and the padding share one dtype: float32, bfloat16,
float16 or float64; autocast casts them all. Logits, softmax and sums are float32 (float64 with float64 inputs) and
results are rounded once at the end. All tensors are differentiable but ``regions``. Beside inputs and output the op
keeps one number a token and head for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.ops import _checks, _dispatch, _library
from subquad.ops.region_attention import reference
from subquad.ops.region_attention.call import RegionCall, count_regions

__all__ = ["RegionCall", "region_attention", "route_regions"]

_OP = "region_attention"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MOST_COUNTED = 2**20
"""Where the kernels' divisions, which are products of float32 numbers, stay exact."""


def region_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: Tensor,
    region_size: int | Sequence[int],
    kv_region_size: int | Sequence[int] | None = None,
    *,
    weights: Tensor | None = None,
    scale: float | None = None,
    pad_k: Tensor | None = None,
    pad_v: Tensor | None = None,
    hide_padding: bool = False,
) -> Tensor:
    """Attend to chosen regions of a map; see the module's docstring for the formula.

    Args:
        q: (B, H, W, heads, D).
        k: (B, H_k, W_k, heads, D).
        v: (B, H_k, W_k, heads, E).
        regions: (B, heads, R, topk), or (B, 1, R, topk) for all heads alike, int64 or int32; entries outside the map
            are an error on a CPU and undefined elsewhere.
        region_size: height and width of a region of queries, or one number for both.
        kv_region_size: likewise of keys; the same by default.
        weights: factor of the keys and values of each slot, of ``regions``' shape.
        scale: factor of the products, D^-0.5 by default.
        pad_k, pad_v: key (heads, D) and value (heads, E) of padding, zeros by default.
        hide_padding: whether queries do not see padding.

    Returns:
        (B, H, W, heads, E) in the inputs' dtype (under autocast in the dtype that they are cast to), contiguous.

    Raises:
        TypeError: for a non-tensor or a dtype that is not supported or not shared.
        ValueError: for shapes, devices or options that do not fit, naming the argument.
    """
    call = prepare(
        q,
        k,
        v,
        regions,
        region_size,
        kv_region_size,
        weights=weights,
        scale=scale,
        pad_k=pad_k,
        pad_v=pad_v,
        hide_padding=hide_padding,
    )
    if _dispatch.requested() == "reference":
        # Outside the operator, so that autograd differentiates the formula itself.
        _check_entries(call)
        return reference.attend(call)[0]
    return _operator(*call)[0]


def route_regions(
    q: Tensor,
    k: Tensor,
    topk: int,
    region_size: int | Sequence[int],
    kv_region_size: int | Sequence[int] | None = None,
) -> Tensor:
    """For each region of queries the ``topk`` regions of keys with the largest product of means over their tokens.

    Means, products and their comparison are in float32 (float64 with float64 inputs), also under autocast: a choice is
    a jump of the model. Nothing is differentiated.

    Args:
        q, k: as in ``region_attention``; padding does not count for the means.
        topk: from 1 to the number of key regions.
        region_size, kv_region_size: as in ``region_attention``.

    Returns:
        Regions (B, 1, R, topk) for ``region_attention``, int64, in any order.

    Raises:
        TypeError, ValueError: as ``region_attention``.
    """
    op = "route_regions"
    for name, value in (("q", q), ("k", k)):
        _checks.check_tensor(op, name, value)
    size, kv_size = _sizes(op, region_size, kv_region_size)
    _check_maps(op, q, k, k)
    _checks.check_dtype(op, "q", q, _DTYPES)
    _checks.check_dtype(op, "k", k, (q.dtype,))
    _checks.check_device(op, "k", k, q.device)
    rows, columns = count_regions(k, kv_size)
    if not _checks.is_integer(topk) or (isinstance(topk, int) and not 1 <= topk <= rows * columns):
        raise ValueError(f"{op}: topk must be 1 to the {rows * columns} regions of the keys, got {topk!r}")
    return torch.ops.subquad.region_routing(q.detach(), k.detach(), size, kv_size, topk).unsqueeze(1)


# Arguments -------------------------------------------------------------------------------------------------------


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: Tensor,
    region_size: int | Sequence[int],
    kv_region_size: int | Sequence[int] | None = None,
    *,
    weights: Tensor | None = None,
    scale: float | None = None,
    pad_k: Tensor | None = None,
    pad_v: Tensor | None = None,
    hide_padding: bool = False,
) -> RegionCall:
    """Check the public arguments and bring them to canonical form; see ``region_attention``."""
    size, kv_size = _sizes(_OP, region_size, kv_region_size)
    _checks.check_tensor(_OP, "q", q)
    autocast = _library.autocast_dtype(q.device) if q.dtype != torch.float64 else None
    options = (*size, *kv_size, bool(hide_padding), autocast is None)
    given = {"q": q, "k": k, "v": v, "regions": regions, "weights": weights, "pad_k": pad_k, "pad_v": pad_v}
    key = _checks.shape_class(*given.values(), options=options)
    if not _passed.has(key):
        _check_tensors(given, size, kv_size, hide_padding, autocast is not None)
        _passed.add(key)
    if autocast is not None:
        q, k, v, pad_k, pad_v = (None if x is None else x.to(autocast) for x in (q, k, v, pad_k, pad_v))  # type: ignore[assignment]
    factor = q.shape[-1] ** -0.5 if scale is None else _checks.check_factor(_OP, "scale", scale)
    return RegionCall(q, k, v, regions, weights, pad_k, pad_v, size, kv_size, factor, hide_padding)


_passed = _checks.Passed()


def _check_tensors(given: dict[str, Any], size: list[int], kv_size: list[int], hide_padding: bool, casts: bool) -> None:
    """Raises TypeError or ValueError, as ``region_attention`` says; ``casts`` is whether autocast unites dtypes."""
    q, k, v, regions, weights, pad_k, pad_v = given.values()
    for name, value in given.items():
        if value is not None or name in ("q", "k", "v", "regions"):
            _checks.check_tensor(_OP, name, value)
    _check_maps(_OP, q, k, v)
    if hide_padding and (pad_k is not None or pad_v is not None):
        raise ValueError(f"{_OP}: hide_padding and pad_k or pad_v exclude each other: hidden padding needs none")
    for name, pad, like in (("pad_k", pad_k, k), ("pad_v", pad_v, v)):
        if pad is not None:
            _checks.check_shape(_OP, name, pad, "(heads, channels)", like.shape[-2:])
    rows, columns = count_regions(q, size)
    for name, value in (("regions", regions), ("weights", weights)):
        if value is not None:
            shared = value.shape[1] if value.dim() == 4 and value.shape[1] == 1 else q.shape[3]
            slots = regions.shape[3] if regions.dim() == 4 else 1
            expected = (q.shape[0], shared, rows * columns, slots)
            _checks.check_shape(_OP, name, value, "(B, heads or 1, regions of queries, topk)", expected)
            _checks.check_device(_OP, name, value, q.device)
    if regions.shape[3] < 1:
        raise ValueError(f"{_OP}: regions must name at least one region for each, got shape {tuple(regions.shape)}")
    _checks.check_dtype(_OP, "regions", regions, (torch.int64, torch.int32))

    for name, value in given.items():
        if value is not None and name not in ("regions", "weights"):
            _checks.check_dtype(_OP, name, value, _DTYPES if casts or name == "q" else (q.dtype,))
            _checks.check_device(_OP, name, value, q.device)
    if weights is not None:
        _checks.check_dtype(_OP, "weights", weights, _DTYPES)


def _check_maps(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, value in (("q", q), ("k", k), ("v", v)):
        if value.dim() != 5:
            raise ValueError(f"{op}: {name} must be (B, H, W, heads, channels), got shape {tuple(value.shape)}")
        if 0 in value.shape[1:]:
            raise ValueError(f"{op}: {name} must not be empty but for its batch, got shape {tuple(value.shape)}")
    shape = (q.shape[0], k.shape[1], k.shape[2], q.shape[3])
    _checks.check_shape(op, "k", k, "(B, H_k, W_k, heads, D)", (*shape, q.shape[4]))
    _checks.check_shape(op, "v", v, "(B, H_k, W_k, heads, E)", (*shape, v.shape[4]))


def _sizes(op: str, region_size: Any, kv_region_size: Any) -> tuple[list[int], list[int]]:
    size = _per_axis(op, "region_size", region_size)
    return size, size if kv_region_size is None else _per_axis(op, "kv_region_size", kv_region_size)


def _per_axis(op: str, name: str, value: Any) -> list[int]:
    values = list(value) if isinstance(value, Sequence) else [value] * 2
    if len(values) != 2 or not all(_checks.is_integer(entry) and entry >= 1 for entry in values):
        raise ValueError(f"{op}: {name} must be a positive integer or two of them, got {value!r}")
    return values


def _check_entries(call: RegionCall) -> None:
    """Refuse regions that do not exist; inside the operator, where values exist in every mode."""
    if call.regions.device.type != "cpu" or not call.regions.numel():
        return
    rows, columns = call.kv_counts
    smallest, largest = call.regions.min().item(), call.regions.max().item()
    if smallest < 0 or largest >= rows * columns:
        raise ValueError(
            f"{_OP}: regions must be 0 to {rows * columns - 1}, the regions of the keys, got {smallest} to {largest}"
        )


# The operators ---------------------------------------------------------------------------------------------------

_CALL_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor regions, Tensor? weights, Tensor? pad_k, Tensor? pad_v, "
    "SymInt[] region_size, SymInt[] kv_region_size, float scale, bool hide_padding"
)
"""The fields of RegionCall, in order."""


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    call = RegionCall(*args)
    _check_entries(call)
    return _dispatch.choose_inside(_OP, call).forward(call)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    call = RegionCall(*args)
    o = call.v.new_empty((*call.q.shape[:-1], call.v.shape[-1]))
    return o, call.q.new_empty(call.q.shape[:-1], dtype=call.working)


def _backward(grad_o: Tensor, o: Tensor, lse: Tensor, *args: Any) -> Sequence[Tensor | None]:
    call = RegionCall(*args)
    return _dispatch.choose_inside(_OP, call).backward(call, grad_o, o, lse)


def _products(*args: Any) -> tuple[int, int, int]:
    """Pairs of queries and keys over all images and heads (padding's keys count), D, and E."""
    call: Any = RegionCall(*args)  # of shapes
    batch, height, width, heads, dim = call.q
    keys = call.regions[3] * call.kv_region_size[0] * call.kv_region_size[1]
    return batch * height * width * heads * keys, dim, call.v[4]


_flops, _backward_flops = _library.attention_flops(_products)


def _routing(q: Tensor, k: Tensor, region_size: list[int], kv_region_size: list[int], topk: int) -> Tensor:
    return reference.route(q, k, region_size, kv_region_size, topk).contiguous()


def _routing_fake(q: Tensor, k: Tensor, region_size: list[int], kv_region_size: list[int], topk: int) -> Tensor:
    rows, columns = count_regions(q, region_size)
    return q.new_empty((q.shape[0], rows * columns, topk), dtype=torch.int64)


def _routing_flops(q: Any, k: Any, region_size: Any, kv_region_size: Any, topk: int, out_shape: Any = None) -> int:
    """A product of each pair of means."""
    keys = -(-k[1] // kv_region_size[0]) * -(-k[2] // kv_region_size[1])
    return 2 * q[0] * -(-q[1] // region_size[0]) * -(-q[2] // region_size[1]) * keys * q[3] * q[4]


_operator = _library.define_differentiable(
    _OP,
    schema=_CALL_SCHEMA,
    tensors=7,
    results=["o", "lse"],
    forward=_forward,
    fake=_forward_fake,
    flops=_flops,
    backward=_backward,
    backward_flops=_backward_flops,
    kept=["o", "lse"],
    fixed=[RegionCall._fields.index("regions")],
)
_library.define(
    "region_routing",
    _routing,
    schema="(Tensor q, Tensor k, SymInt[] region_size, SymInt[] kv_region_size, SymInt topk) -> Tensor",
    fake=_routing_fake,
    flops=_routing_flops,
)


# Implementations -------------------------------------------------------------------------------------------------


def _why_not_triton(call: RegionCall) -> str | None:
    from subquad.ops import _triton

    if (reason := _triton.why_not(call.q)) is not None:
        return reason
    if call.q.dtype == torch.float64:
        return "float64 runs in PyTorch"
    if call.q.shape[0] == 0:
        return "empty batch"
    most = 64 if call.q.dtype == torch.float32 else 128
    if (widest := max(call.q.shape[-1], call.v.shape[-1])) > most:
        return f"heads of {widest} channels, the kernels take up to {most} in {call.q.dtype}"
    spans = (max(x.stride(1), x.shape[2] * x.shape[3] * widest) * x.shape[1] for x in call[:3])
    if (largest := max(spans)) >= 2**31:
        return f"an image that spans {largest} elements, the kernels address up to {2**31}"
    if (entries := math.prod(call.regions.shape[2:])) >= _MOST_COUNTED:
        return f"{entries} chosen regions, the kernels count to {_MOST_COUNTED}"
    if (regions := math.prod(call.kv_counts)) >= _MOST_COUNTED:
        return f"{regions} regions of keys, the kernels count to {_MOST_COUNTED}"
    if (tokens := max(math.prod(size) for size in (call.region_size, call.kv_region_size))) >= _MOST_COUNTED:
        return f"regions of {tokens} tokens, the kernels count to {_MOST_COUNTED}"
    if entries * tokens >= 2**31:
        return f"lists of up to {entries * tokens} tokens, the kernels count to {2**31}"
    return None


_dispatch.register(_OP, prepare, *_dispatch.usual(__name__, _why_not_triton))

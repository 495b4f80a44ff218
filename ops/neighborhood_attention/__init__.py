"""Neighborhood attention: the contract.

Every query of a map with one to three axes attends to a window of keys around it. An axis of length L falls into d
dilation groups: position i is token p = i // d of group g = i mod d, which has n = ceil((L - g) / d) tokens. A query
sees K tokens of its own group, a, .., a + K - 1, with a stride s that makes s neighbours share one window:

    not causal    leader c = min(s (p // s) + s // 2, n - 1),    a = clamp(c - K // 2, 0, n - K)
    causal        leader c = min(s (p // s) + s - 1, n - 1),     a = max(c - K + 1, 0),  and no token behind p

So a window at a border is shifted inwards, never cut nor padded; an even K looks one further to the left. The window of
a map is the product of those of its axes, and for query i and its keys j, at relative positions r

    logit_ij = scale <q_i, k_j> + rpb[head, r]        r = p_j - p_i + K - 1 on each axis (key minus query)
    o_i = sum_j softmax_j(logit_i)_j v_j              lse_i = log sum_j exp(logit_ij)

``additional_keys`` and ``additional_values`` are further tokens in the softmax of every query, without a bias.
Exact special cases: K = L is full attention, K d = L attention over a grid, s = K with L mod K = 0 window attention.
On a CPU they run as PyTorch's own attention (the implementation ``sdpa``).

Sources: arXiv 2204.07143 (neighborhood attention), 2209.15001 (dilation), 2504.16922 (stride); the semantics, those of
NATTEN, extended by a bias for even K, strides and causality.

Layout is (B, *S, heads, channels), with any strides; k and v may have fewer heads (G, a divisor of H): query head h
uses head h // (H / G). q, k, v and the additional tokens share one dtype: float32, bfloat16, float16 or float64;
autocast casts them all. The bias has a dtype of its own. Logits, softmax, lse and sums are float32 (float64 with
float64 inputs) and results are rounded once at the end. All tensors are differentiable, and both results. Beside its
inputs and results the op keeps nothing for the backward pass.

Beside it: the same in two steps (``split``), as layers (``modules``), and under NATTEN's names (``natten_compat``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from subquad.ops import _checks, _dispatch, _library
from subquad.ops.neighborhood_attention import reference
from subquad.ops.neighborhood_attention.arguments import prepare
from subquad.ops.neighborhood_attention.call import NeighborhoodCall

__all__ = ["NeighborhoodCall", "Options", "na1d", "na2d", "na3d", "prepare"]

_OP = "neighborhood_attention"


class Options(TypedDict, total=False):
    """Further arguments of ``na1d``, ``na2d`` and ``na3d``, by name."""

    rpb: Tensor | None
    scale: float | None
    additional_keys: Tensor | None
    additional_values: Tensor | None
    return_lse: bool


_OPTIONS = tuple(Options.__annotations__)


def na1d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention of sequences; see ``na2d``, with one axis L in place of H, W."""
    return _attend(1, q, k, v, kernel_size, dilation, stride, is_causal, **options)


def na2d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention of maps; see the module's docstring for the formula.

    Args:
        q: (B, H, W, heads, D).
        k: (B, H, W, G, D) with G dividing the heads.
        v: (B, H, W, G, E).
        kernel_size: K, odd or even, one number or one an axis; K times the dilation is at most the axis.
        dilation: d, likewise.
        stride: s, likewise, at most K.
        is_causal: whether keys behind the query are hidden, likewise.
        options: by name,
            rpb: relative positional bias (heads, 2 K_0 - 1, 2 K_1 - 1).
            scale: factor of the products, D^-0.5 by default.
            additional_keys, additional_values: (B, M, G, D) and (B, M, G, E), both or none.
            return_lse: also return the log of the softmax's sum.

    Returns:
        (B, H, W, heads, E) in the inputs' dtype (under autocast in the dtype that they are cast to), contiguous; with
        ``return_lse`` also (B, H, W, heads) in float32 (float64).

    Raises:
        TypeError: for an unknown option, a non-tensor or a dtype that is not supported or not shared.
        ValueError: for shapes, devices or options that do not fit, naming the argument and the axis.
    """
    return _attend(2, q, k, v, kernel_size, dilation, stride, is_causal, **options)


def na3d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention of volumes; see ``na2d``, with three axes T, H, W."""
    return _attend(3, q, k, v, kernel_size, dilation, stride, is_causal, **options)


def _attend(axes: int, *arguments: Any, return_lse: bool = False, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    _checks.check_options(f"na{axes}d", options, _OPTIONS)
    call = prepare(axes, *arguments, **options)
    if _dispatch.requested() == "reference":
        # Outside the operator, so that autograd differentiates the formula itself.
        o, lse = reference.attend(call)
    else:
        o, lse = _operator(*call)
    return (o, lse) if return_lse else o


# The operator ----------------------------------------------------------------------------------------------------

_CALL_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? rpb, Tensor? additional_keys, Tensor? additional_values, "
    "int[] kernel_size, int[] dilation, int[] stride, bool[] is_causal, float scale"
)
"""The fields of NeighborhoodCall, in order."""


def _implementation(call: NeighborhoodCall) -> Any:
    return _dispatch.choose_inside(f"na{len(call.size)}d", call)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    call = NeighborhoodCall(*args)
    return _implementation(call).forward(call)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    call = NeighborhoodCall(*args)
    o = call.q.new_empty((*call.q.shape[:-1], call.v.shape[-1]))
    return o, call.q.new_empty(call.q.shape[:-1], dtype=call.working)


def _backward(grad_o: Tensor, grad_lse: Tensor, o: Tensor, lse: Tensor, *args: Any) -> Sequence[Tensor | None]:
    call = NeighborhoodCall(*args)
    return _implementation(call).backward(call, grad_o, grad_lse, o, lse)


def _products(*args: Any) -> tuple[int, int, int]:
    """Pairs of queries and keys over all images and heads, D, and E."""
    call: Any = NeighborhoodCall(*args)  # of shapes
    extra = 0 if call.additional_keys is None else call.additional_keys[1]
    return math.prod(call.q[:-1]) * (math.prod(call.kernel_size) + extra), call.q[-1], call.v[-1]


_flops, _backward_flops = _library.attention_flops(_products)
_operator = _library.define_differentiable(
    _OP,
    schema=_CALL_SCHEMA,
    tensors=6,
    results=["o", "lse"],
    forward=_forward,
    fake=_forward_fake,
    flops=_flops,
    backward=_backward,
    backward_flops=_backward_flops,
    kept=["o", "lse"],
    followed=["o", "lse"],
)


# Implementations -------------------------------------------------------------------------------------------------


def _why_not_triton(call: NeighborhoodCall) -> str | None:
    from subquad.ops import _triton

    if (reason := _triton.why_not(call.q)) is not None:
        return reason
    if call.working == torch.float64:
        return "float64 is computed in PyTorch"
    channels, most = max(call.q.shape[-1], call.v.shape[-1]), 256 // call.q.element_size()
    return f"the kernels serve heads of at most {most} channels, got {channels}" if channels > most else None


def _why_not_sdpa(call: NeighborhoodCall) -> str | None:
    from subquad.ops.neighborhood_attention import sdpa_impl

    return sdpa_impl.why_not(call)


for _axes in (1, 2, 3):
    _dispatch.register(
        f"na{_axes}d",
        partial(prepare, _axes),
        _dispatch.Implementation("triton", f"{__name__}.triton_impl", _why_not_triton),
        _dispatch.Implementation("sdpa", f"{__name__}.sdpa_impl", _why_not_sdpa),
        _dispatch.Implementation("torch", f"{__name__}.torch_impl"),
        _dispatch.Implementation("reference", f"{__name__}.reference"),
    )

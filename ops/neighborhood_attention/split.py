"""Neighborhood attention in two steps: logits of queries and keys, and sums of values with weights.

For what lies between them: other normalisers than softmax, dropout of weights, weights to look at. Both hold K weights
for every query, which ``na2d`` never does: where nothing lies between but softmax, it is faster and smaller.

    logits_is = scale <q_i, k_j> + rpb[head, r]     j, r: the key in slot s of query i's window, and its position
    o_i       = sum_s attn_is v_j

Windows, layout and dtypes are those of ``na2d``. A window has slots for its keys, row by row from its first, and behind
them for the M additional ones. A slot that causality leaves empty has the logit minus infinity; its weight does not
count. So ``na2d_av(na2d_qk(q, k, ...).softmax(-1), v, ...)`` is ``na2d(q, k, v, ...)`` with the same options. Sums are
float32 (float64), results are rounded once. All tensors are differentiable; for the backward pass only they are kept.
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
from subquad.ops.neighborhood_attention.arguments import prepare_av, prepare_qk
from subquad.ops.neighborhood_attention.call import NeighborhoodCall

__all__ = ["na1d_av", "na1d_qk", "na2d_av", "na2d_qk", "na3d_av", "na3d_qk"]

_QK, _AV = "neighborhood_qk", "neighborhood_av"


class LogitOptions(TypedDict, total=False):
    """Further arguments of ``na1d_qk``, ``na2d_qk`` and ``na3d_qk``, by name."""

    rpb: Tensor | None
    scale: float | None
    additional_keys: Tensor | None


_OPTIONS = tuple(LogitOptions.__annotations__)


def na1d_qk(
    q: Tensor,
    k: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    **options: Unpack[LogitOptions],
) -> Tensor:
    """Logits of sequences; see ``na2d_qk``, with one axis L in place of H, W."""
    return _logits(1, q, k, kernel_size, dilation, stride, is_causal, **options)


def na2d_qk(
    q: Tensor,
    k: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    **options: Unpack[LogitOptions],
) -> Tensor:
    """Logits of maps; see the module's docstring for the formula.

    Args:
        q: (B, H, W, heads, D).
        k: (B, H, W, G, D) with G dividing the heads.
        kernel_size, dilation, stride, is_causal: as in ``na2d``.
        options: by name, ``rpb``, ``scale`` and ``additional_keys``, as in ``na2d``.

    Returns:
        (B, H, W, heads, K_0 K_1 + M) in the inputs' dtype (under autocast in the dtype that they are cast to).

    Raises:
        TypeError, ValueError: as ``na2d``.
    """
    return _logits(2, q, k, kernel_size, dilation, stride, is_causal, **options)


def na3d_qk(
    q: Tensor,
    k: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    **options: Unpack[LogitOptions],
) -> Tensor:
    """Logits of volumes; see ``na2d_qk``, with three axes T, H, W."""
    return _logits(3, q, k, kernel_size, dilation, stride, is_causal, **options)


def na1d_av(
    attn: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    additional_values: Tensor | None = None,
) -> Tensor:
    """Sums in sequences; see ``na2d_av``, with one axis L in place of H, W."""
    window = (kernel_size, dilation, stride, is_causal)
    return _sums(prepare_av(1, attn, v, *window, additional_values=additional_values))


def na2d_av(
    attn: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    additional_values: Tensor | None = None,
) -> Tensor:
    """Sums in maps; see the module's docstring for the formula.

    Args:
        attn: weights (B, H, W, heads, K_0 K_1 + M), in the order of the logits of ``na2d_qk``.
        v: (B, H, W, G, E) with G dividing the heads.
        kernel_size, dilation, stride, is_causal: as in ``na2d``.
        additional_values: (B, M, G, E).

    Returns:
        (B, H, W, heads, E) in the inputs' dtype (under autocast in the dtype that they are cast to).

    Raises:
        TypeError, ValueError: as ``na2d``.
    """
    window = (kernel_size, dilation, stride, is_causal)
    return _sums(prepare_av(2, attn, v, *window, additional_values=additional_values))


def na3d_av(
    attn: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    additional_values: Tensor | None = None,
) -> Tensor:
    """Sums in volumes; see ``na2d_av``, with three axes T, H, W."""
    window = (kernel_size, dilation, stride, is_causal)
    return _sums(prepare_av(3, attn, v, *window, additional_values=additional_values))


def _logits(axes: int, *arguments: Any, **options: Any) -> Tensor:
    _checks.check_options(f"na{axes}d_qk", options, _OPTIONS)
    call = prepare_qk(axes, *arguments, **options)
    if _dispatch.requested() == "reference":
        return reference.qk(call)
    return torch.ops.subquad.neighborhood_qk(call.q, call.k, call.rpb, call.additional_keys, *call[6:])


def _sums(call: NeighborhoodCall) -> Tensor:
    if _dispatch.requested() == "reference":
        return reference.av(call)
    return torch.ops.subquad.neighborhood_av(call.q, call.v, call.additional_values, *call[6:10])


# The operators ---------------------------------------------------------------------------------------------------

_WINDOW_SCHEMA = "int[] kernel_size, int[] dilation, int[] stride, bool[] is_causal"
_QK_SCHEMA = f"Tensor q, Tensor k, Tensor? rpb, Tensor? additional_keys, {_WINDOW_SCHEMA}, float scale"
_AV_SCHEMA = f"Tensor attn, Tensor v, Tensor? additional_values, {_WINDOW_SCHEMA}"
"""The arguments of ``NeighborhoodCall.of_qk`` and ``of_av``, in order."""


def _choose(form: str, call: NeighborhoodCall) -> Any:
    return _dispatch.choose_inside(f"na{len(call.size)}d_{form}", call)


def _qk(*args: Any) -> Tensor:
    call = NeighborhoodCall.of_qk(*args)
    return _choose("qk", call).qk(call)


def _qk_fake(*args: Any) -> Tensor:
    call = NeighborhoodCall.of_qk(*args)
    return call.q.new_empty((*call.q.shape[:-1], call.keys))


def _qk_backward(grad: Tensor, *args: Any) -> Sequence[Tensor | None]:
    call = NeighborhoodCall.of_qk(*args)
    d_q, d_k, _, d_rpb, d_additional, _ = _choose("qk", call).qk_backward(call, grad)
    return d_q, d_k, d_rpb, d_additional


def _av(*args: Any) -> Tensor:
    call = NeighborhoodCall.of_av(*args)
    return _choose("av", call).av(call)


def _av_fake(*args: Any) -> Tensor:
    call = NeighborhoodCall.of_av(*args)
    return call.q.new_empty((*call.q.shape[:-1], call.v.shape[-1]))


def _av_backward(grad: Tensor, *args: Any) -> Sequence[Tensor | None]:
    call = NeighborhoodCall.of_av(*args)
    d_attn, _, d_v, _, _, d_additional = _choose("av", call).av_backward(call, grad)
    return d_attn, d_v, d_additional


def _flops(tensors: int, *args: Any, out_shape: Any = None) -> int:
    """Two operations for each channel of each slot; arguments as of an operator with as many ``tensors``."""
    q_or_attn, tokens, additional, kernel_size = (args[i] for i in (0, 1, tensors - 1, tensors))
    slots = math.prod(kernel_size) + (0 if additional is None else additional[1])
    return 2 * math.prod(q_or_attn[:-1]) * slots * tokens[-1]


for _name, _schema, _tensors, _forward, _fake, _backward in (
    (_QK, _QK_SCHEMA, 4, _qk, _qk_fake, _qk_backward),
    (_AV, _AV_SCHEMA, 3, _av, _av_fake, _av_backward),
):
    _library.define_differentiable(
        _name,
        schema=_schema,
        tensors=_tensors,
        results=["out"],
        forward=_forward,
        fake=_fake,
        flops=partial(_flops, _tensors),
        backward=_backward,
        backward_flops=lambda *args, tensors=_tensors: 2 * _flops(tensors, *args),
    )


# Implementations -------------------------------------------------------------------------------------------------


_PACKAGE = "subquad.ops.neighborhood_attention"


def _why_not_triton(call: NeighborhoodCall) -> str | None:
    from subquad.ops import _triton

    if (reason := _triton.why_not(call.q)) is not None:
        return reason
    if call.working == torch.float64:
        return "float64 is computed in PyTorch"
    if len(call.size) == 3:
        return "the kernels serve one and two axes, got three"
    if call.extra:
        return "additional keys are looked up in PyTorch"
    if (channels := max(call.k.shape[-1], call.v.shape[-1])) > 256:
        return f"the kernels serve heads of at most 256 channels, got {channels}"
    if (numbers := call.q[:1].numel() // call.q.shape[-1] * max(call.keys, channels)) >= 2**31:
        return f"the kernels address images of up to {2**31} numbers, got {numbers}"
    return None


for _axes in (1, 2, 3):
    for _form, _prepare in (("qk", prepare_qk), ("av", prepare_av)):
        _dispatch.register(
            f"na{_axes}d_{_form}",
            partial(_prepare, _axes),
            _dispatch.Implementation("triton", f"{_PACKAGE}.triton_split", _why_not_triton),
            _dispatch.Implementation("torch", f"{_PACKAGE}.torch_impl"),
            _dispatch.Implementation("reference", f"{_PACKAGE}.reference"),
        )

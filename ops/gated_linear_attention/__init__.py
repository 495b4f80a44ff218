"""Gated linear attention in both directions at once: the contract.

For batch b and head h, with tokens t = 0 .. N - 1 in their order and per direction a log decay g_t <= 0 for each of the
d_k rows of a matrix state:

    S_t = diag(exp g_t[0]) S_{t-1} + k_t v_t^T,    S_{-1} = 0        forwards
    P_t = diag(exp g_t[1]) P_{t+1} + k_t v_t^T,    P_N   = 0         backwards
    o_t = scale * (S_t^T q_t + P_t^T q_t) / 2

The decay of token t acts on the state that arrives at t, before t's own outer product is added; t's own term counts in
both directions. The directions share q, k and v and differ in their decays alone. This is gated linear attention (GLA,
arXiv 2312.06635) with the bidirectional gating of ViG (arXiv 2405.18425).

Decays come as ``gates``: log decays, or with ``gate_normalizer`` logits of log decays logsigmoid(gate) /
gate_normalizer. They must be finite; that log decays are not positive is not checked.

Layout is (B, N, heads, d), any strides; nothing is flipped, copied or concatenated per direction. q, k and v share one
dtype: float32, bfloat16, float16 or float64; gates have it too, or float32. Decays, states and sums are float32
(float64), decays stay logarithms until a factor that is at most 1 is needed. q, k, v and gates are differentiable; only
they are kept for the backward pass. Time and memory are linear in N; no decay overflows or gives NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.ops import _checks, _dispatch, _library
from subquad.ops.gated_linear_attention import reference
from subquad.ops.gated_linear_attention.call import GatedCall

__all__ = ["GatedCall", "gated_linear_attention"]

_OP = "gated_linear_attention"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    gate_normalizer: float | None = None,
    scale: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Mean of forward and backward gated linear attention; see the module's docstring for the formula.

    Args:
        q, k: (B, N, H, d_k).
        v: (B, N, H, d_v).
        gates: (B, N, 2, H, d_k), of the forward and the backward direction, both in the order of the tokens.
        gate_normalizer: positive; then ``gates`` are logits. None for log decays.
        scale: factor of the output, d_k ** -0.5 by default.
        out_dtype: dtype of the output, q's by default. float32 keeps a 16-bit sum over many tokens from overflowing.

    Returns:
        (B, N, H, d_v).

    Raises:
        TypeError: for a non-tensor or a dtype that is not supported or not shared.
        ValueError: for shapes, devices or factors that do not fit, naming the argument.
    """
    call = prepare(q, k, v, gates, gate_normalizer=gate_normalizer, scale=scale, out_dtype=out_dtype)
    if _dispatch.requested() == "reference":
        # Outside the operator, so that autograd differentiates the formula itself.
        return reference.attend(call)
    return _operator(*call)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    gate_normalizer: float | None = None,
    scale: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> GatedCall:
    """Check the arguments of ``gated_linear_attention`` and bring them to canonical form."""
    if gate_normalizer is not None:
        gate_normalizer = _checks.check_factor(_OP, "gate_normalizer", gate_normalizer)
        if gate_normalizer <= 0:
            raise ValueError(f"{_OP}: gate_normalizer must be positive, got {gate_normalizer}")
    _checks.check_tensor(_OP, "q", q)
    autocast = _library.autocast_dtype(q.device) if q.dtype != torch.float64 else None
    key = _checks.shape_class(q, k, v, gates, options=(autocast is None, out_dtype))
    if not _passed.has(key):
        _check_tensors(q, k, v, gates, out_dtype)
        _passed.add(key)
    if autocast is not None:
        q, k, v = q.to(autocast), k.to(autocast), v.to(autocast)
    return GatedCall(
        q=q,
        k=k,
        v=v,
        gates=gates,
        gate_normalizer=gate_normalizer,
        scale=q.shape[-1] ** -0.5 if scale is None else _checks.check_factor(_OP, "scale", scale),
        out_dtype=out_dtype or q.dtype,
    )


_passed = _checks.Passed()


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, out_dtype: torch.dtype | None) -> None:
    for name, value in (("q", q), ("k", k), ("v", v), ("gates", gates)):
        _checks.check_tensor(_OP, name, value)
    if q.dim() != 4 or 0 in q.shape[1:]:
        raise ValueError(f"{_OP}: q must be (B, N, H, d_k) with no axis but B empty, got shape {tuple(q.shape)}")
    batch, length, heads, d_k = q.shape
    _checks.check_shape(_OP, "k", k, "(B, N, H, d_k)", q.shape)
    d_v = max(1, v.shape[-1]) if v.dim() else 1
    _checks.check_shape(_OP, "v", v, "(B, N, H, d_v)", (batch, length, heads, d_v))
    _checks.check_shape(_OP, "gates", gates, "(B, N, 2, H, d_k)", (batch, length, 2, heads, d_k))
    _check_dtypes_and_devices(q, k, v, gates, out_dtype)


def _check_dtypes_and_devices(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, out_dtype: torch.dtype | None) -> None:
    """q, k and v share a dtype, unless autocast is about to give them one; gates may be wider than 16 bits."""
    _checks.check_dtype(_OP, "q", q, _DTYPES)
    free = _library.autocast_dtype(q.device) is not None and q.dtype != torch.float64
    shared = tuple(dtype for dtype in _DTYPES if dtype != torch.float64) if free else (q.dtype,)
    wide = shared if q.dtype == torch.float64 else tuple({*shared, torch.float32})
    for name, value, allowed in (("k", k, shared), ("v", v, shared), ("gates", gates, wide)):
        _checks.check_dtype(_OP, name, value, allowed)
        _checks.check_device(_OP, name, value, q.device)
    if out_dtype is not None and out_dtype not in _DTYPES:
        raise TypeError(f"{_OP}: out_dtype must be a floating dtype among {_DTYPES}, got {out_dtype}")


# The operator ----------------------------------------------------------------------------------------------------

_CALL_SCHEMA = "Tensor q, Tensor k, Tensor v, Tensor gates, float? gate_normalizer, float scale, ScalarType out_dtype"
"""The fields of GatedCall, in order."""


def _forward(*args: Any) -> Tensor:
    call = GatedCall(*args)
    return _dispatch.choose_inside(_OP, call).forward(call)


def _forward_fake(*args: Any) -> Tensor:
    call = GatedCall(*args)
    return call.v.new_empty(call.v.shape, dtype=call.out_dtype)


def _backward(grad: Tensor, *args: Any) -> Sequence[Tensor | None]:
    call = GatedCall(*args)
    return _dispatch.choose_inside(_OP, call).backward(call, grad)


def _flops(*args: Any, out_shape: Any = None) -> int:
    """Of the recurrence, for each entry of a state and direction: 1 for the decay, 2 for k v^T, 2 for reading it."""
    shapes = GatedCall(*args)
    batch, length, heads, d_k = shapes.q
    return 2 * 5 * batch * length * heads * d_k * shapes.v[-1]


_operator = _library.define_differentiable(
    _OP,
    schema=_CALL_SCHEMA,
    tensors=4,
    results=["out"],
    forward=_forward,
    fake=_forward_fake,
    flops=_flops,
    backward=_backward,
    backward_flops=lambda *args: 3 * _flops(*args),  # the recomputed forward pass and twice as much for the gradients
)


# Implementations -------------------------------------------------------------------------------------------------

KERNEL_KEY_SIZES, KERNEL_VALUE_SIZES = (16, 32, 64, 128), (32, 64, 128)
"""Head sizes d_k and d_v that kernels are made for."""


def _why_not_triton(call: GatedCall) -> str | None:
    from subquad.ops import _triton

    if (reason := _triton.why_not(call.q)) is not None:
        return reason
    if call.q.dtype == torch.float64:
        return "float64 runs in PyTorch"
    if call.q.shape[0] == 0:
        return "empty batch"
    sizes = (call.q.shape[-1], call.v.shape[-1])
    if sizes[0] not in KERNEL_KEY_SIZES or sizes[1] not in KERNEL_VALUE_SIZES:
        return f"head sizes {sizes}, the kernels have d_k in {KERNEL_KEY_SIZES} and d_v in {KERNEL_VALUE_SIZES}"
    return None


_dispatch.register(_OP, prepare, *_dispatch.usual(__name__, _why_not_triton))

"""Attention in windows of a map, shifted or not: the contract.

A map of H x W tokens is cut into windows of h x w, and a token attends to those of its window. What the shift
(s_y, s_x), the order and the padding to whole windows, H' x W', mean is said by the place of a token on the padded map,
on each axis (here the rows):

    order "roll_pad"    place p < H holds token (p + s) mod H, places from H on are padding     timm
    order "pad_roll"    place p holds token (p + s) mod H', if that is below H, else padding    Swin's detection code,
                                                                                                torchvision, MMDetection
    window i of an axis has the places i h, .., i h + h - 1; with ``grid`` i, i + H / h, i + 2 H / h, ..

so nothing is rolled, padded or partitioned: these are addresses. For query i and key j of one window, with relative
position r = i - j on each axis (index "q-k"; j - i for "k-q"),

    logit_ij = scale <q_i, k_j> + table[(r_y + h - 1) (2 w - 1) + r_x + w - 1, head] + m_ij
    o_i = sum_j softmax_j(logit_i)_j v_j

With ``drop_shift`` an axis that one window covers, H <= h, has no shift ("axis", as torchvision), or no axis has one if
there is such an axis ("map", as Swin's code); the map at hand decides, in an exported program too.

m_ij is ``mask_value`` where i and j are in different regions of a shifted axis, else 0: places in [0, H' - h),
[H' - h, H' - s) and [H' - s, H'). Under "roll_pad" the regions of a ragged map miss its seam; timm's weights run so.
Padding is attended: it has the key ``pad_k`` and the value ``pad_v`` (where a projection with a bias runs over zeros,
that bias), zeros by default; with ``hide_padding`` it is not. Padding has no queries.

Sources: arXiv 2103.14030 (Swin), 2204.01697 (MaxViT, for the grid); the semantics of timm and torchvision.

Layout is (B, H, W, heads, channels), with any strides. q, k, v and the padding share one dtype: float32, bfloat16,
float16 or float64; autocast casts them all. The table has a dtype of its own. Logits, softmax and sums are float32
(float64 with float64 inputs) and results are rounded once at the end. All tensors are differentiable. Beside inputs and
output the op keeps one number a token and head for the backward pass.

``patch`` turns the attention of models of timm and torchvision to this op.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.ops import _checks, _dispatch, _library
from subquad.ops.window_attention import reference
from subquad.ops.window_attention.call import WindowCall

__all__ = ["WindowCall", "patch", "unpatch", "window_attention", "window_attention_packed"]

_OP = "window_attention"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ORDERS = ("roll_pad", "pad_roll")
_INDICES = ("q-k", "k-q")
_DROPS = ("never", "axis", "map")


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    *,
    table: Tensor | None = None,
    scale: float | None = None,
    order: str = "roll_pad",
    pad_k: Tensor | None = None,
    pad_v: Tensor | None = None,
    hide_padding: bool = False,
    mask_value: float = -100.0,
    index: str = "q-k",
    grid: bool = False,
    drop_shift: str = "never",
) -> Tensor:
    """Attend inside windows of a map; see the module's docstring for the formula.

    Args:
        q: (B, H, W, heads, D).
        k: (B, H, W, heads, D).
        v: (B, H, W, heads, E).
        window: (h, w), or one number for both.
        shift: (s_y, s_x), or one number for both, below the window's size; 0 for an axis without a shift.
        table: relative positional bias, ((2 h - 1) (2 w - 1), heads).
        scale: factor of the products, D^-0.5 by default.
        order: "roll_pad" or "pad_roll".
        pad_k, pad_v: key (heads, D) and value (heads, E) of padding, zeros by default.
        hide_padding: whether queries do not see padding.
        mask_value: what tokens of different regions get added.
        index: "q-k" or "k-q", direction of the table's relative positions.
        grid: cut the map into grids of h x w tokens, equally spaced over all of it, instead of windows.
        drop_shift: what a map no larger than a window along an axis loses: "never" a shift, the one of this "axis", or
            those of the whole "map".

    Returns:
        (B, H, W, heads, E) in the inputs' dtype (under autocast in the dtype that they are cast to), contiguous.

    Raises:
        TypeError: for a non-tensor or a dtype that is not supported or not shared.
        ValueError: for shapes, devices or options that do not fit, naming the argument and the axis.
    """
    call = prepare(
        q,
        k,
        v,
        window,
        shift,
        table=table,
        scale=scale,
        order=order,
        pad_k=pad_k,
        pad_v=pad_v,
        hide_padding=hide_padding,
        mask_value=mask_value,
        index=index,
        grid=grid,
        drop_shift=drop_shift,
    )
    return _attend(call)


def window_attention_packed(
    qkv: Tensor, window: int | Sequence[int], shift: int | Sequence[int] = 0, **options: Any
) -> Tensor:
    """``window_attention`` of a projection (B, H, W, 3, heads, D) to queries, keys and values, in this order.

    Its gradient is one tensor, so the gradients of the three parts need not be put together. Other arguments, result
    and errors are those of ``window_attention``.
    """
    if _checks.check_tensor(_OP, "qkv", qkv).dim() != 6 or qkv.shape[3] != 3:
        raise ValueError(f"{_OP}: qkv must be (B, H, W, 3, heads, D), got shape {tuple(qkv.shape)}")
    return _attend(prepare(qkv, None, None, window, shift, packed=True, **options))


def _attend(call: WindowCall) -> Tensor:
    if _dispatch.requested() == "reference":
        # Outside the operator, so that autograd differentiates the formula itself.
        return reference.attend(call)[0]
    return _operator(*call)[0]


# Arguments -------------------------------------------------------------------------------------------------------


def prepare(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    window: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    *,
    table: Tensor | None = None,
    scale: float | None = None,
    order: str = "roll_pad",
    pad_k: Tensor | None = None,
    pad_v: Tensor | None = None,
    hide_padding: bool = False,
    mask_value: float = -100.0,
    index: str = "q-k",
    grid: bool = False,
    drop_shift: str = "never",
    packed: bool = False,
) -> WindowCall:
    """Check the public arguments and bring them to canonical form; see ``window_attention``.

    If ``packed``, q is all three, (B, H, W, 3, heads, D), and k and v are None.
    """
    windows, shifts = _per_axis("window", window, 1), _per_axis("shift", shift, 0)
    _check_options(order, index, mask_value, drop_shift)
    _checks.check_tensor(_OP, "q", q)
    autocast = _library.autocast_dtype(q.device) if q.dtype != torch.float64 else None
    options = (*windows, *shifts, bool(grid), bool(hide_padding), autocast is None, packed)
    key = _checks.shape_class(q, k, v, table, pad_k, pad_v, options=options)
    if not _passed.has(key):
        one, two, three = q.unbind(3) if packed else (q, k, v)
        _check_tensors(one, two, three, table, pad_k, pad_v, windows, shifts, grid, hide_padding, autocast is not None)
        _passed.add(key)
    if autocast is not None:
        q, k, v, pad_k, pad_v = (None if x is None else x.to(autocast) for x in (q, k, v, pad_k, pad_v))  # type: ignore[assignment]
    return WindowCall(
        q,
        k,
        v,
        table,
        pad_k,
        pad_v,
        windows,
        shifts,
        q.shape[-1] ** -0.5 if scale is None else _checks.check_factor(_OP, "scale", scale),
        order == "pad_roll",
        hide_padding,
        float(mask_value),
        index == "k-q",
        grid,
        drop_shift,
    )


_passed = _checks.Passed()


def _check_tensors(
    q: Any,
    k: Any,
    v: Any,
    table: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    windows: list[int],
    shifts: list[int],
    grid: bool,
    hide_padding: bool,
    casts: bool,
) -> None:
    """Raises TypeError or ValueError, as ``window_attention`` says; ``casts`` is whether autocast unites dtypes."""
    activations = {"q": q, "k": k, "v": v, "pad_k": pad_k, "pad_v": pad_v}
    for name, value in {**activations, "table": table}.items():
        if value is not None or len(name) == 1:
            _checks.check_tensor(_OP, name, value)
    _check_shapes(q, k, v, pad_k, pad_v)
    _check_windows(q.shape[1:3], windows, shifts, grid)
    if hide_padding and (pad_k is not None or pad_v is not None):
        raise ValueError(f"{_OP}: hide_padding and pad_k or pad_v exclude each other: hidden padding needs none")
    if table is not None:
        entries = (2 * windows[0] - 1) * (2 * windows[1] - 1)
        _checks.check_shape(_OP, "table", table, "((2 h - 1) (2 w - 1), heads)", (entries, q.shape[-2]))
        _checks.check_dtype(_OP, "table", table, _DTYPES)
        _checks.check_device(_OP, "table", table, q.device)
    for name, value in activations.items():
        if value is not None:
            _checks.check_dtype(_OP, name, value, _DTYPES if casts or name == "q" else (q.dtype,))
            _checks.check_device(_OP, name, value, q.device)


def _check_options(order: str, index: str, mask_value: float, drop_shift: str) -> None:
    if order not in _ORDERS:
        raise ValueError(f"{_OP}: unknown order {order!r}, expected one of {list(_ORDERS)}")
    if index not in _INDICES:
        raise ValueError(f"{_OP}: unknown index {index!r}, expected one of {list(_INDICES)}")
    if drop_shift not in _DROPS:
        raise ValueError(f"{_OP}: unknown drop_shift {drop_shift!r}, expected one of {list(_DROPS)}")
    if not mask_value <= 0:
        raise ValueError(f"{_OP}: mask_value must not be positive, got {mask_value}")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, pad_k: Tensor | None, pad_v: Tensor | None) -> None:
    for name, value in (("q", q), ("k", k), ("v", v)):
        if value.dim() != 5:
            raise ValueError(f"{_OP}: {name} must be (B, H, W, heads, channels), got shape {tuple(value.shape)}")
        if 0 in value.shape[1:]:
            raise ValueError(f"{_OP}: {name} must not be empty but for its batch, got shape {tuple(value.shape)}")
    _checks.check_shape(_OP, "k", k, "(B, H, W, heads, D)", q.shape)
    _checks.check_shape(_OP, "v", v, "(B, H, W, heads, E)", (*q.shape[:-1], v.shape[-1]))
    if pad_k is not None:
        _checks.check_shape(_OP, "pad_k", pad_k, "(heads, D)", k.shape[-2:])
    if pad_v is not None:
        _checks.check_shape(_OP, "pad_v", pad_v, "(heads, E)", v.shape[-2:])


def _per_axis(name: str, value: int | Sequence[int], least: int) -> list[int]:
    if type(value) is int and value >= least:
        return [value, value]
    values = list(value) if isinstance(value, Sequence) else [value] * 2
    if len(values) != 2 or not all(_checks.is_integer(entry) and entry >= least for entry in values):
        expected = "a positive integer" if least else "an integer from 0 on"
        raise ValueError(f"{_OP}: {name} must be {expected} or two of them, got {value!r}")
    return values


def _check_windows(size: Sequence[int], window: Sequence[int], shift: Sequence[int], grid: bool) -> None:
    for axis, (length, extent, step) in enumerate(zip(size, window, shift, strict=True)):
        if step >= extent:
            raise ValueError(f"{_OP}: on axis {axis} shift must be below the window's {extent}, got {step}")
        if grid and step:
            raise ValueError(f"{_OP}: on axis {axis} a grid must have shift 0, got {step}")
        if grid and length % extent:
            raise ValueError(f"{_OP}: on axis {axis} a grid of {extent} must divide the map's {length}")


# The operator ----------------------------------------------------------------------------------------------------

_CALL_SCHEMA = (
    "Tensor q, Tensor? k, Tensor? v, Tensor? table, Tensor? pad_k, Tensor? pad_v, int[] window, int[] shift, "
    "float scale, bool pad_first, bool hide_padding, float mask_value, bool key_minus_query, bool grid, str drop_shift"
)
"""The fields of WindowCall, in order."""


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    call = WindowCall(*args).settled()
    return _dispatch.choose_inside(_OP, call).forward(call)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    call = WindowCall(*args)
    q, _, v = call.parts
    return v.new_empty(v.shape), q.new_empty(q.shape[:-1], dtype=call.working)


def _backward(grad_o: Tensor, o: Tensor, lse: Tensor, *args: Any) -> Sequence[Tensor | None]:
    call = WindowCall(*args).settled()
    return _dispatch.choose_inside(_OP, call).backward(call, grad_o, o, lse)


def _products(*args: Any) -> tuple[int, int, int]:
    """Pairs of queries and keys over all images and heads (padding's keys count), D, and E."""
    call: Any = WindowCall(*args)  # of shapes
    batch, height, width = call.q[:3]
    values = call.q[-1] if call.v is None else call.v[-1]
    return batch * height * width * call.q[-2] * math.prod(call.window), call.q[-1], values


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
)


# Implementations -------------------------------------------------------------------------------------------------


def _why_not_triton(call: WindowCall) -> str | None:
    from subquad.ops import _triton

    if (reason := _triton.why_not(call.q)) is not None:
        return reason
    if call.q.dtype == torch.float64:
        return "float64 runs in PyTorch"
    if call.q.shape[0] == 0:
        return "empty batch"
    if call.tokens > 256:
        return f"windows of {call.tokens} tokens, the kernels take up to 256"
    most = 64 if call.q.dtype == torch.float32 else 128
    if (widest := max(call.channels)) > most:
        return f"heads of {widest} channels, the kernels take up to {most} in {call.q.dtype}"
    if (largest := max(x.stride(1) * x.shape[1] for x in call[:3] if x is not None)) >= 2**31:
        return f"an image that spans {largest} elements, the kernels address up to {2**31}"
    return None


_dispatch.register(_OP, prepare, *_dispatch.usual(__name__, _why_not_triton))


# Behind the functions that it calls. As attributes of the op too, which is what ``subquad.ops.window_attention`` names.
from subquad.ops.window_attention.models import patch, unpatch  # noqa: E402

window_attention.patch = patch  # type: ignore[attr-defined]
window_attention.unpatch = unpatch  # type: ignore[attr-defined]

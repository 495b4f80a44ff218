"""Checks of the public arguments of neighborhood attention, and the canonical calls that they make."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.ops import _checks, _library
from subquad.ops.neighborhood_attention.call import NeighborhoodCall

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_Given = dict[str, Tensor | None]
_Window = tuple[list[int], list[int], list[int], list[bool]]
_passed = _checks.Passed()


def prepare(
    axes: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
) -> NeighborhoodCall:
    """Check the public arguments of ``na<axes>d`` and make them canonical; ``return_lse`` has no part in it."""
    op = f"na{axes}d"
    window = _per_axes(op, axes, kernel_size, dilation, stride, is_causal)
    autocast = _autocast_dtype(_checks.check_tensor(op, "q", q))
    options = (autocast is None, *(tuple(entries) for entries in window))
    key = _checks.shape_class(q, k, v, rpb, additional_keys, additional_values, options=options)
    if not _passed.has(key):
        maps: _Given = {"q": q, "k": k, "v": v}
        additional = {"additional_keys": additional_keys, "additional_values": additional_values}
        _check(op, axes, maps, additional, rpb, *window)
        _check_dtypes(op, maps | additional, autocast is not None)
        _passed.add(key)
    if autocast is not None:
        q, k, v, additional_keys, additional_values = _cast((q, k, v, additional_keys, additional_values), autocast)
    return NeighborhoodCall(q, k, v, rpb, additional_keys, additional_values, *window, _factor(op, scale, q))


def prepare_qk(
    axes: int,
    q: Tensor,
    k: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
) -> NeighborhoodCall:
    """Check the public arguments of ``na<axes>d_qk`` and make them canonical."""
    op = f"na{axes}d_qk"
    maps: _Given = {"q": q, "k": k}
    additional = {"additional_keys": additional_keys}
    window, _ = _check(op, axes, maps, additional, rpb, kernel_size, dilation, stride, is_causal)
    q, k, additional_keys = _check_and_cast(op, maps | additional)
    return NeighborhoodCall.of_qk(q, k, rpb, additional_keys, *window, _factor(op, scale, q))


def prepare_av(
    axes: int,
    attn: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    additional_values: Tensor | None = None,
) -> NeighborhoodCall:
    """Check the public arguments of ``na<axes>d_av`` and make them canonical."""
    op = f"na{axes}d_av"
    maps: _Given = {"attn": attn, "v": v}
    additional = {"additional_values": additional_values}
    window, tokens = _check(op, axes, maps, additional, None, kernel_size, dilation, stride, is_causal)
    expected = (*attn.shape[:-1], math.prod(window[0]) + tokens)
    _checks.check_shape(op, "attn", attn, f"(B, {_names(axes)}, heads, K an axis + M)", expected)
    attn, v, additional_values = _check_and_cast(op, maps | additional)
    return NeighborhoodCall.of_av(attn, v, additional_values, *window)


def _check(
    op: str, axes: int, maps: dict[str, Any], additional: _Given, rpb: Tensor | None, *window: Any
) -> tuple[_Window, int]:
    """What the calls have in common, the first map being that of the queries: the window, canonical, and M."""
    _check_maps(op, axes, maps, maps | additional | {"rpb": rpb})
    (_, q), *tokens = maps.items()
    heads = tokens[0][1].shape[-2]
    for name, value in tokens:
        _check_tokens(op, axes, name, value, q, heads, (q if name == "k" else value).shape[-1])
    given = [value is not None for value in additional.values()]
    if any(given) and not all(given):
        raise ValueError(f"{op}: additional_keys and additional_values go together, got only one of them")
    more: int | None = None
    if any(given):
        for (name, extra), (_, like) in zip(additional.items(), tokens, strict=True):
            more = _check_additional(op, name, extra, like, more)
    checked = _check_window(op, q.shape[1:-2], *window)
    _check_bias(op, rpb, q, checked[0])
    return checked, more or 0


def _names(axes: int) -> str:
    return ", ".join(("L",) if axes == 1 else ("T", "H", "W")[3 - axes :])


def _check_maps(op: str, axes: int, maps: dict[str, Any], given: _Given) -> None:
    """Tensors where there must be, and maps with all axes, none of them empty."""
    for name, value in given.items():
        if value is not None or name in maps:
            _checks.check_tensor(op, name, value)
    for name, value in maps.items():
        if value.dim() != axes + 3:
            shape = tuple(value.shape)
            raise ValueError(f"{op}: {name} must be (B, {_names(axes)}, heads, channels), got shape {shape}")
        if 0 in value.shape[1:]:
            raise ValueError(f"{op}: {name} must not be empty but for its batch, got shape {tuple(value.shape)}")


def _check_tokens(op: str, axes: int, name: str, value: Tensor, q: Tensor, heads: int, channels: int) -> None:
    letter = "D" if name == "k" else "E"
    expected = (*q.shape[:-2], heads, channels)
    _checks.check_shape(op, name, value, f"(B, {_names(axes)}, G, {letter})", expected)
    if q.shape[-2] % heads:
        raise ValueError(f"{op}: the heads of k and v must divide those of q, got {heads} and {q.shape[-2]}")


def _check_additional(op: str, name: str, value: Any, like: Tensor, tokens: int | None = None) -> int:
    """The number of tokens, which is ``tokens`` if that is given."""
    if tokens is None:
        tokens = value.shape[1] if value.dim() == 4 else 1
    letter = "D" if name == "additional_keys" else "E"
    expected = (like.shape[0], tokens, *like.shape[-2:])
    _checks.check_shape(op, name, value, f"(B, M, G, {letter})", expected)
    return tokens


def _check_window(
    op: str,
    size: Sequence[int],
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int],
    stride: int | Sequence[int],
    is_causal: bool | Sequence[bool],
) -> _Window:
    """One kernel size, dilation, stride and causality an axis."""
    window = kernels, dilations, strides, _ = _per_axes(op, len(size), kernel_size, dilation, stride, is_causal)
    for axis, (length, kernel, spread, step) in enumerate(zip(size, kernels, dilations, strides, strict=True)):
        if kernel * spread > length:
            raise ValueError(
                f"{op}: on axis {axis} kernel_size * dilation must be at most the map's {length}, "
                f"got {kernel} * {spread} = {kernel * spread}"
            )
        check_stride(op, axis, step, kernel)
    return window


def _per_axes(op: str, axes: int, kernel_size: Any, dilation: Any, stride: Any, is_causal: Any) -> _Window:
    return (
        per_axis(op, "kernel_size", kernel_size, axes),
        per_axis(op, "dilation", dilation, axes),
        per_axis(op, "stride", stride, axes),
        per_axis(op, "is_causal", is_causal, axes, bool),
    )


def check_stride(op: str, axis: int, stride: int, kernel_size: int) -> None:
    """Raises ValueError if a stride skips whole windows."""
    if stride > kernel_size:
        raise ValueError(f"{op}: on axis {axis} stride must be at most kernel_size {kernel_size}, got {stride}")


def per_axis(op: str, name: str, value: Any, axes: int, kind: type = int) -> list[Any]:
    """One positive integer, or bool, an axis.

    Raises:
        ValueError: naming the argument, what was given and what was expected.
    """
    if type(value) is bool if kind is bool else type(value) is int and value >= 1:
        return [value] * axes
    values = list(value) if isinstance(value, Sequence) else [value] * axes
    if kind is bool:
        fit = all(isinstance(entry, bool) for entry in values)
    else:
        fit = all(_checks.is_integer(entry) and entry >= 1 for entry in values)
    if len(values) != axes or not fit:
        what = "bool" if kind is bool else "positive integer"
        raise ValueError(f"{op}: {name} must be a {what} or {axes} of them, got {value!r}")
    return values


def _check_bias(op: str, rpb: Tensor | None, q: Tensor, kernels: Sequence[int]) -> None:
    if rpb is not None:
        expected = (q.shape[-2], *(2 * size - 1 for size in kernels))
        _checks.check_shape(op, "rpb", rpb, "(heads, 2 K - 1 an axis)", expected)
        _checks.check_dtype(op, "rpb", rpb, _DTYPES)
        _checks.check_device(op, "rpb", rpb, q.device)


def _check_and_cast(op: str, given: _Given) -> list[Any]:
    """Activations of one dtype and device, the first's; under autocast in its dtype, float64 excepted."""
    first = next(iter(given.values()))
    assert first is not None
    autocast = _autocast_dtype(first)
    _check_dtypes(op, given, autocast is not None)
    return list(given.values()) if autocast is None else _cast(given.values(), autocast)


def _check_dtypes(op: str, given: _Given, casts: bool) -> None:
    """Raises unless activations have the first's device and dtype; of dtypes any serves if autocast unites them."""
    first = next(iter(given.values()))
    assert first is not None
    for name, value in given.items():
        if value is not None:
            _checks.check_dtype(op, name, value, _DTYPES if casts or value is first else (first.dtype,))
            _checks.check_device(op, name, value, first.device)


def _autocast_dtype(first: Tensor) -> torch.dtype | None:
    return _library.autocast_dtype(first.device) if first.dtype != torch.float64 else None


def _cast(values: Iterable[Tensor | None], dtype: torch.dtype) -> list[Any]:
    return [None if value is None else value.to(dtype) for value in values]


def _factor(op: str, scale: float | None, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None else _checks.check_factor(op, "scale", scale)

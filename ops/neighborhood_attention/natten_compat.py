"""For programs written for NATTEN: ``install()`` makes ``import natten`` resolve to the functions of this package.

    from subquad.ops.neighborhood_attention import natten_compat

    natten_compat.install()  # before what imports natten
    from transformers import DinatModel

Since 0.20 NATTEN has neither a relative positional bias nor CPUs nor the split forms. ``natten`` and
``natten.functional`` then have the names of its releases up to 0.17, in their layouts:

    natten<n>dqkrpb(query, key, rpb, kernel_size, dilation), natten<n>dqk(query, key, kernel_size, dilation),
    natten<n>dav(attn, value, kernel_size, dilation)
        until 0.17.4; until 0.14.4 without kernel_size, which the tables' shapes say
    na<n>d_qk(query, key, kernel_size, dilation, additional_keys, is_causal, rpb),
    na<n>d_av(attn, value, kernel_size, dilation, additional_values, is_causal)
        since 0.15; causality and rpb since 0.17
    na<n>d_qk_with_bias(query, key, bias, kernel_size, dilation, additional_keys)
        0.15 and 0.16
    na<n>d(query, key, value, kernel_size, dilation, is_causal, rpb, scale, additional_keys, additional_values)
        since 0.17
    NeighborhoodAttention<n>D

for n = 1, 2, 3. Queries, keys, values and weights are (B, heads, *S, channels), in ``na<n>d`` (B, *S, heads, channels).
The split forms do not scale the products. Results are contiguous. Of the ``natten3d`` functions, and of the split 3-D
forms before 0.17, sizes are four numbers, ``kernel_size_d, kernel_size, dilation_d, dilation``: those of the first axis
are apart. Programs whose layers were written for releases before 0.17 call ``install(older_layers=True)``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from inspect import signature
from types import ModuleType
from typing import Any

from torch import Tensor

from subquad.ops.neighborhood_attention import modules, na1d, na2d, na3d
from subquad.ops.neighborhood_attention.split import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk

__all__ = ["VERSION", "install", "uninstall"]

VERSION = "0.17.4+subquad"
"""What ``natten.__version__`` and the metadata say: the last release with all the names."""

_FUSED = {1: na1d, 2: na2d, 3: na3d}
_QK = {1: na1d_qk, 2: na2d_qk, 3: na3d_qk}
_AV = {1: na1d_av, 2: na2d_av, 3: na3d_av}
_PerAxis = int | Sequence[int]


def install(older_layers: bool = False) -> bool:
    """Let ``natten`` resolve to this package from now on, unless a NATTEN with all of its names is installed.

    What has imported NATTEN before keeps what it has, and what has looked for it in vain may not look again: call this
    first. Another call with the same argument changes nothing.

    Args:
        older_layers: let layers have a relative positional bias and pad small maps unless told otherwise, as before
            0.17. Programs that name neither, such as OneFormer with its DiNAT, need it for their weights.

    Returns:
        Whether ``natten`` is this package.
    """
    if _finder in sys.meta_path:
        if _finder.older_layers != older_layers:
            _finder.older_layers = older_layers
            _forget()
        return True
    if _is_complete():
        return False
    _forget()
    _finder.older_layers = older_layers
    sys.meta_path.insert(0, _finder)
    return True


def uninstall() -> None:
    """Undo ``install``: ``natten`` is again what is installed, if anything."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
        _forget()


def _is_complete() -> bool:
    try:
        functional = importlib.import_module("natten.functional")
        natten = importlib.import_module("natten")
    except (ImportError, OSError, RuntimeError):  # not there, or built for another torch
        return False
    names = [name for name in _functions() if not name.endswith("_with_bias")]  # no release has these beside na<n>d
    return all(hasattr(functional, name) for name in names) and all(hasattr(natten, name) for name in _LAYERS)


def _forget() -> None:
    for name in [name for name in sys.modules if name == "natten" or name.startswith("natten.")]:
        del sys.modules[name]
    importlib.invalidate_caches()


# Functions: the first argument is the number of axes, which their names say -------------------------------------------


def _heads_last(x: Tensor) -> Tensor:
    return x.movedim(1, -2)


def _heads_first(x: Tensor) -> Tensor:
    return x.movedim(-2, 1).contiguous()


def _qk(
    axes: int,
    query: Tensor,
    key: Tensor,
    kernel_size: _PerAxis,
    dilation: _PerAxis = 1,
    additional_keys: Tensor | None = None,
    is_causal: bool | Sequence[bool] = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """Logits (B, heads, *S, K an axis + M) of query and key (B, heads, *S, D); additional keys are (B, heads, M, D)."""
    if additional_keys is not None:
        additional_keys = _heads_last(additional_keys)
    options: dict[str, Any] = {"rpb": rpb, "scale": 1.0, "additional_keys": additional_keys}
    query, key = _heads_last(query), _heads_last(key)
    return _heads_first(_QK[axes](query, key, kernel_size, dilation, is_causal=is_causal, **options))


def _qk_with_bias(
    axes: int,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size: _PerAxis,
    dilation: _PerAxis = 1,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """As ``na<n>d_qk``, with the bias before the options."""
    return _qk(axes, query, key, kernel_size, dilation, additional_keys, rpb=bias)


def _av(
    axes: int,
    attn: Tensor,
    value: Tensor,
    kernel_size: _PerAxis,
    dilation: _PerAxis = 1,
    additional_values: Tensor | None = None,
    is_causal: bool | Sequence[bool] = False,
) -> Tensor:
    """Sums (B, heads, *S, D) of value (B, heads, *S, D) with weights in the layout of ``na<n>d_qk``."""
    if additional_values is not None:
        additional_values = _heads_last(additional_values)
    attn, value = _heads_last(attn), _heads_last(value)
    o = _AV[axes](attn, value, kernel_size, dilation, is_causal=is_causal, additional_values=additional_values)
    return _heads_first(o)


def _oldest_qk(
    axes: int,
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    kernel_size: _PerAxis | None = None,
    dilation: _PerAxis | None = None,
) -> Tensor:
    """As ``na<n>d_qk_with_bias``; of one number behind the bias it is the dilation."""
    if kernel_size is None or dilation is None:
        if rpb is None:
            raise ValueError(
                f"natten{axes}dqkrpb: needs kernel_size and dilation where there is no bias, got one of them"
            )
        kernel_size, dilation = [(size + 1) // 2 for size in rpb.shape[1:]], _only(kernel_size, dilation)
    if rpb is not None:
        query, key = (_mended(x, len(rpb)) for x in (query, key))
    return _qk(axes, query, key, kernel_size, dilation, rpb=rpb)


def _oldest_av(
    axes: int,
    attn: Tensor,
    value: Tensor,
    kernel_size: _PerAxis | None = None,
    dilation: _PerAxis | None = None,
) -> Tensor:
    """As ``na<n>d_av``; of one number behind the value it is the dilation."""
    if kernel_size is None or dilation is None:
        kernel_size, dilation = round(attn.shape[-1] ** (1 / axes)), _only(kernel_size, dilation)
    return _av(axes, attn, _mended(value, attn.shape[1]), kernel_size, dilation)


def _mended(x: Tensor, heads: int) -> Tensor:
    """x (B, heads, H, W, D), which transformers 5 gives as (B, W, H, heads, D).

    Its DiNAT swaps two axes of the map where it means to bring the heads to the front. Where there are as many heads as
    columns, shape and strides (it swaps them in memory with the heads last) may be those of a right call: there it must
    be transformers that calls. torch.compile cannot see who calls, and breaks its graph there.
    """
    if x.dim() != 5 or x.shape[3] != heads:
        return x
    if x.shape[1] == heads and not (x.stride(3) < x.stride(1) < x.stride(2) and _called_by("transformers")):
        return x
    return x.permute(0, 3, 2, 1, 4)


def _called_by(package: str) -> bool:
    """Whether the nearest caller from outside of this file is a module of ``package``."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")).partition(".")[0] == package


def _only(kernel_size: _PerAxis | None, dilation: _PerAxis | None) -> _PerAxis:
    if kernel_size is not None:
        return kernel_size
    return 1 if dilation is None else dilation


def _na(
    axes: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: _PerAxis,
    dilation: _PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
) -> Any:
    """``subquad.ops.na<n>d`` with NATTEN's order of arguments."""
    options: dict[str, Any] = {"rpb": rpb, "scale": scale}
    options |= {"additional_keys": additional_keys, "additional_values": additional_values}
    return _FUSED[axes](query, key, value, kernel_size, dilation, is_causal=is_causal, **options)


_PATTERNS: dict[str, Callable[..., Any]] = {
    "na{}d": _na,
    "na{}d_qk": _qk,
    "na{}d_qk_with_bias": _qk_with_bias,
    "na{}d_av": _av,
    "natten{}dqk": _qk,
    "natten{}dqkrpb": _oldest_qk,
    "natten{}dav": _oldest_av,
}


def _functions() -> dict[str, Callable[..., Any]]:
    return {
        pattern.format(axes): _for_axes(axes, pattern.format(axes), function)
        for axes in (1, 2, 3)
        for pattern, function in _PATTERNS.items()
    }


def _for_axes(axes: int, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def named(*args: Any, **kwargs: Any) -> Any:
        if axes == 3:
            args, kwargs = _sizes_together(args, kwargs)
        return function(axes, *args, **kwargs)

    # What help() and inspect show; mypy knows of no such attribute.
    named.__signature__ = signature(partial(function, axes))  # type: ignore[attr-defined]
    named.__name__ = named.__qualname__ = name
    named.__doc__ = function.__doc__
    return named


def _sizes_together(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with a kernel size and a dilation for each axis, where numbers of the first axis came apart."""
    numbers = [i for i, value in enumerate(args) if type(value) is int]
    if len(numbers) == 4:
        start = numbers[0]
        first, others, first_dilation, other_dilation = args[start : start + 4]
        sizes = (first, others, others), (first_dilation, other_dilation, other_dilation)
        return (*args[:start], *sizes, *args[start + 4 :]), kwargs
    kwargs = dict(kwargs)
    for name in ("kernel_size", "dilation"):
        if f"{name}_d" in kwargs and name in kwargs:
            kwargs[name] = (kwargs.pop(f"{name}_d"), kwargs[name], kwargs[name])
    return args, kwargs


# Layers ----------------------------------------------------------------------------------------------------------


class _OlderArguments:
    """Before 0.17 ``rel_pos_bias`` was ``bias``, and small maps were padded. Without a dilation it is 1."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: _PerAxis,
        dilation: _PerAxis | None = 1,
        *args: Any,
        bias: bool | None = None,
        **options: Any,
    ) -> None:
        if bias is not None:
            if "rel_pos_bias" in options:
                raise TypeError(f"{type(self).__name__}: bias was the name of rel_pos_bias before 0.17, got both")
            options |= {"rel_pos_bias": bias, "pad_small_maps": True}
        super().__init__(dim, num_heads, kernel_size, 1 if dilation is None else dilation, *args, **options)  # type: ignore[call-arg]


class NeighborhoodAttention1D(_OlderArguments, modules.NeighborhoodAttention1D):
    """``subquad.ops.NeighborhoodAttention1D``, also with the arguments of releases before 0.17, by name."""


class NeighborhoodAttention2D(_OlderArguments, modules.NeighborhoodAttention2D):
    """``subquad.ops.NeighborhoodAttention2D``, also with the arguments of releases before 0.17, by name."""


class NeighborhoodAttention3D(_OlderArguments, modules.NeighborhoodAttention3D):
    """``subquad.ops.NeighborhoodAttention3D``, also with the arguments of releases before 0.17, by name."""


class _OlderDefaults:
    """Before 0.17 there was a bias by default; options behind the dilation are by name, as their order has changed."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: _PerAxis,
        dilation: _PerAxis | None = 1,
        *,
        bias: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, kernel_size, dilation, bias=bias, **options)  # type: ignore[call-arg]


class OlderNeighborhoodAttention1D(_OlderDefaults, NeighborhoodAttention1D):
    """With the defaults of releases before 0.17: a bias, and padding of small maps."""


class OlderNeighborhoodAttention2D(_OlderDefaults, NeighborhoodAttention2D):
    """With the defaults of releases before 0.17: a bias, and padding of small maps."""


class OlderNeighborhoodAttention3D(_OlderDefaults, NeighborhoodAttention3D):
    """With the defaults of releases before 0.17: a bias, and padding of small maps."""


_LAYERS = {
    layer.__name__: layer for layer in (NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D)
}
_OLDER_LAYERS = dict(
    zip(
        _LAYERS,
        (OlderNeighborhoodAttention1D, OlderNeighborhoodAttention2D, OlderNeighborhoodAttention3D),
        strict=True,
    )
)


# Imports and metadata --------------------------------------------------------------------------------------------


class _Distribution(Distribution):
    """What ``importlib.metadata`` reads of an installed distribution."""

    def read_text(self, filename: str) -> str | None:
        texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: natten\nVersion: {VERSION}\nSummary: a part of subquad\n",
            "top_level.txt": "natten\n",
        }
        return texts.get(filename)

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"natten is a part of subquad and has no file {path}")


class _Loader(Loader):
    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(_functions())
        if module.__name__ == "natten":
            vars(module).update(_OLDER_LAYERS if _finder.older_layers else _LAYERS, __version__=VERSION)
            importlib.import_module("natten.functional")


class _Finder(DistributionFinder):
    older_layers = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in ("natten", "natten.functional"):
            return None
        return ModuleSpec(fullname, _Loader(), origin="subquad", is_package=fullname == "natten")

    def find_distributions(self, context: Any = DistributionFinder.Context()) -> Iterator[Distribution]:  # noqa: B008
        if context.name is None or context.name.lower() == "natten":
            yield _Distribution()


_finder = _Finder()

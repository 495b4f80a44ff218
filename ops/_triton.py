"""Facts about Triton and the device, looked up on first use: importing subquad never imports triton."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from subquad.ops import _compile
from subquad.ops._compile import is_compiling_ahead
from subquad.ops._compile_worker import settle_hash

_Config = TypeVar("_Config", bound="tuple[int, ...]")
_Call = TypeVar("_Call", bound="tuple[Any, ...]")
_Plan = TypeVar("_Plan")


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``, read by triton when it is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(x: torch.Tensor) -> str | None:
    """Why Triton kernels cannot run on x's device, or None."""
    if not _installed():
        return "triton is not installed"
    if x.device.type == "cpu" and interpreting():
        return None
    if x.device.type not in ("cuda", "xpu"):
        return f"a tensor on {x.device.type}, triton needs a GPU"
    return None


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def multiprocessor_count(device: torch.device) -> int:
    """Number of multiprocessors of a CUDA GPU; elsewhere 8, so that a large scan is cut into segments there too."""
    return _multiprocessor_count(_compile.device_ahead() or device)


@cache
def _multiprocessor_count(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 8


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes on chip that a program may use on a CUDA GPU; elsewhere more than any kernel asks for."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 2**16))
    return 2**31


def _params(kernel: Any) -> Iterable[Any]:
    """What Triton knows of a kernel's parameters; the interpreter's kernels have no such list."""
    return getattr(kernel, "params", None) or itertools.repeat(None)


def _kind(value: object, param: Any) -> object:
    """What Triton tells variants of a kernel apart by, in an argument that is not a compile-time constant."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return float
    assert isinstance(value, int)
    if param is not None and param.do_not_specialize:
        return None
    return value == 1, value % 16 == 0


class Launcher:
    """Launches the kernels of one shape class: through Triton the first time, and then as compiled.

    Triton looks at every argument of every launch to find out which variant of a kernel it needs. Calls that agree in
    all of that (dtypes, 16-byte alignment of pointers, sizes) share a launcher and skip it: for a kernel of 40
    arguments it takes longer than many a kernel runs.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {}
        self._device = _compile.device_ahead()

    def __call__(
        self, name: str, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], meta: Mapping[str, Any]
    ) -> None:
        """Launch ``kernel[grid](*arguments, **meta)``; a ``name`` stands for one kernel, grid and ``meta``.

        ``meta`` has the kernel's compile-time arguments, of which it takes those that it knows, and options of Triton.
        """
        known = self._known.get(name)
        if known is not None:
            run, constants = known
            run(*arguments, *constants)
            return
        constants = tuple(meta[constant] for constant in kernel.arg_names[len(arguments) :])
        options = {option: meta[option] for option in ("num_warps", "num_stages", "maxnreg") if option in meta}
        device = self._device or next(value.device for value in arguments if isinstance(value, torch.Tensor))
        job = (kernel.__name__, device, constants, *options.values(), *map(_kind, arguments, _params(kernel)))
        if self._device is not None:
            if not interpreting():
                _compile.start(job, kernel, (*arguments, *constants), options, device)
            return
        _compile.finish(job)
        if not interpreting():
            settle_hash(kernel)  # for good: a kernel keeps the hash that its first launch gives it
        compiled = kernel[grid](*arguments, *constants, **options)
        if compiled is not None:  # the interpreter compiles nothing
            self._known[name] = compiled[grid], constants


def facts(tensor: torch.Tensor | None) -> object:
    """Everything about a tensor that decides how a kernel addresses it, to be compared."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16


def on_meta(call: _Call) -> _Call:
    """An op's call, a NamedTuple, with tensors of the same facts that have no memory, for ``compiling_ahead``."""
    return type(call)._make(  # type: ignore[attr-defined]
        torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        if isinstance(value, torch.Tensor)
        else value
        for value in call
    )


class Plans(Generic[_Plan]):
    """An op's plans, one for each shape class: what its calls share, worked out on the first of them.

    Args:
        most: plans that are kept, a bound for programs that see images of any size.
    """

    def __init__(self, most: int = 256) -> None:
        self._most = most
        self._plans: dict[object, _Plan] = {}

    def get(
        self, key: object, x: torch.Tensor, make: Callable[[], _Plan], on_new: Callable[[], None] | None = None
    ) -> _Plan:
        """The plan of a shape class.

        Calls of training have their own, so that the first of them compiles gradients ahead.

        Args:
            key: all that tells shape classes apart beside ``x``'s device.
            x: a tensor of the call, the one that tells calls of training from others.
            make: makes the plan.
            on_new: called before the first launches of a shape class on a GPU, unless a graph is being captured.
        """
        if is_compiling_ahead():
            return make()
        key = key, x.device, x.requires_grad
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= self._most:
                self._plans.clear()
            plan = self._plans[key] = make()
            if on_new is not None and x.is_cuda and not torch.cuda.is_current_stream_capturing():
                on_new()
        return plan


def tuned(
    call: object, x: torch.Tensor, candidates: Sequence[_Config], default: _Config, run: Callable[[_Config], object]
) -> _Config:
    """The launch choices for a call, a NamedTuple of integers.

    That is ``default``, or with ``SUBQUAD_AUTOTUNE=1`` the fastest of ``candidates``.

    The search runs once for a GPU and a ``call``, anything whose text tells calls apart. What it finds is kept in
    ``autotune.json`` in the folder that ``SUBQUAD_CACHE`` names (``~/.cache/subquad`` by default).
    """
    asked = os.environ.get("SUBQUAD_AUTOTUNE", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"SUBQUAD_AUTOTUNE: expected 0 or 1, got {asked!r}")
    if asked != "1" or x.device.type != "cuda":
        return default
    import triton

    key = f"{torch.cuda.get_device_name(x.device)} triton {triton.__version__} {call}"
    if not _tuning:
        _tuning.update(_read_tuning_file())
    if len(_tuning.get(key, ())) != len(default):  # absent, or of a release with other choices
        with torch.cuda.device(x.device):
            best = min(candidates, key=lambda config: _time(lambda: run(config)))
        _tuning.update(_read_tuning_file() | {key: list(best)})  # another process may have added to the file
        _write_tuning_file()
    return type(default)._make(_tuning[key])  # type: ignore[attr-defined]


def _time(run: Callable[[], object]) -> float:
    """Milliseconds of a run; infinite where the kernels do not fit the GPU."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return float(do_bench(run, return_mode="median"))
    except OutOfResources:
        return math.inf


def _tuning_file() -> Path:
    return Path(os.environ.get("SUBQUAD_CACHE", "~/.cache/subquad")).expanduser() / "autotune.json"


_tuning: dict[str, list[int]] = {}


def _read_tuning_file() -> dict[str, list[int]]:
    """What earlier searches found; a file that cannot be read is as good as none: it is made anew."""
    try:
        return dict(json.loads(_tuning_file().read_text()))
    except (OSError, ValueError):
        return {}


def _write_tuning_file() -> None:
    file = _tuning_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(_tuning, indent=1, sort_keys=True))
    os.replace(part, file)

"""Facts about Triton and the device, looked up on first use: importing subquad never imports triton."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

_Config = TypeVar("_Config", bound="tuple[int, ...]")


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


@cache
def multiprocessor_count(device: torch.device) -> int:
    """Number of multiprocessors of a GPU (a small made-up number when interpreting)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 8


def tuned(
    key: str, x: torch.Tensor, candidates: Sequence[_Config], default: _Config, run: Callable[[_Config], object]
) -> _Config:
    """The launch choices for a call, a NamedTuple of integers.

    That is ``default``, or with ``SUBQUAD_AUTOTUNE=1`` the fastest of ``candidates``.

    The search runs once for a key and GPU and is kept in ``autotune.json`` in the folder that ``SUBQUAD_CACHE`` names
    (``~/.cache/subquad`` by default).
    """
    if os.environ.get("SUBQUAD_AUTOTUNE") != "1" or x.device.type != "cuda":
        return default
    key = f"{torch.cuda.get_device_name(x.device)} {key}"
    found = _tuning_cache()
    if key not in found:
        from triton.testing import do_bench

        with torch.cuda.device(x.device):
            times = [do_bench(lambda config=config: run(config), return_mode="median") for config in candidates]
        found[key] = list(candidates[times.index(min(times))])
        _write_tuning_cache(found)
    return type(default)._make(found[key])  # type: ignore[attr-defined]


def _tuning_file() -> Path:
    return Path(os.environ.get("SUBQUAD_CACHE", "~/.cache/subquad")).expanduser() / "autotune.json"


@cache
def _tuning_cache() -> dict[str, list[int]]:
    file = _tuning_file()
    return json.loads(file.read_text()) if file.is_file() else {}


def _write_tuning_cache(found: dict[str, list[int]]) -> None:
    file = _tuning_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(found, indent=1, sort_keys=True))
    os.replace(part, file)

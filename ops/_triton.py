"""Facts about Triton and the device, looked up on first use: importing subquad never imports triton."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch


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

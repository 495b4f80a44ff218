"""Clocks and ceilings: medians of repeated calls, peak memory, and what this very machine can do."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch.utils.benchmark import Timer

MIB = 2**20


class Budget(NamedTuple):
    """Time to spend on one figure, and the fewest calls that it must be the median of."""

    milliseconds: float
    repeats: int


class Deadline:
    """A limit on the wall time of a whole benchmark: past it, nothing new starts."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def passed(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end


class Ceilings(NamedTuple):
    """What the device reaches, measured in this run.

    Attributes:
        copy: bytes read plus bytes written a second by a large device copy.
        matmul: operations a second of a large matrix product (bfloat16 on a GPU, float32 on a CPU).
        exp2: exponentials a second on data that is in registers or cache; None on a GPU without triton.
    """

    copy: float
    matmul: float
    exp2: float | None


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, with the device's work."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def has_l2_flush(device: torch.device) -> bool:
    """Whether ``median_ms`` times with device events and an L2 cache flushed between calls."""
    return device.type == "cuda" and find_spec("triton") is not None


def median_ms(function: Callable[[], object], device: torch.device, budget: Budget) -> float:
    """Median milliseconds of a call.

    On a GPU with triton: device events, L2 flushed between calls. Otherwise torch.utils.benchmark.
    """
    function()  # compilation and algorithm searches would spoil the estimate
    estimate = 1e3 * seconds(function, device)
    milliseconds = max(budget.milliseconds, budget.repeats * estimate)
    if has_l2_flush(device):
        from triton.testing import do_bench

        return float(do_bench(function, warmup=milliseconds / 10, rep=milliseconds, return_mode="median"))
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=milliseconds / 1e3).median


def graphed(function: Callable[[], object]) -> Callable[[], None]:
    """Capture a call as a CUDA graph; the returned function replays it.

    The call runs three times before, on a stream of its own.

    Raises:
        Exception: what the call raises during the capture, for instance because it waits for the device; the process
            can go on.
    """
    stream = torch.cuda.current_stream()
    side = torch.cuda.Stream()
    side.wait_stream(stream)
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    stream.wait_stream(side)
    gc.collect()  # backward passes kept alive by reference cycles would tie gradients to the streams they ran on
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    device = torch.cuda.current_device()
    random = torch.cuda.default_generators[device].clone_state()
    raised: Exception | None = None
    try:
        with torch.cuda.graph(graph, pool=pool):
            try:
                function()
            except Exception as error:
                raised = error
                raise
    except Exception as error:
        # What PyTorch (2.11) leaves behind when it cannot end a capture: the capture's stream as the current one, a
        # random generator that refuses to draw outside of a capture, and the pool with all of the call's memory.
        torch.cuda.set_stream(stream)
        torch.cuda.default_generators[device].graphsafe_set_state(random)
        with suppress(RuntimeError):  # the capture ended after all, and the graph frees its pool
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        raise (raised or error) from None  # the error of the capture's end says less than the one that broke it
    return graph.replay


def peak_mib(function: Callable[[], object], device: torch.device) -> float | None:
    """Peak GPU memory of one call beyond what was allocated before it; None on a CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def ceilings(device: torch.device) -> Ceilings:
    """Measure the device's own limits; under a second on a CPU, a few on a GPU."""
    gpu = device.type == "cuda"
    budget = Budget(100 if gpu else 20, 5)
    matmul = max(_matmul_rate(n, device, budget) for n in ((4096, 8192) if gpu else (512,)))
    return Ceilings(_copy_rate(device, budget), matmul, _exp2_rate(device, budget))


def _copy_rate(device: torch.device, budget: Budget) -> float:
    source = torch.randn((256 if device.type == "cuda" else 8) * MIB, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source), device, budget) * 1e3


def _matmul_rate(n: int, device: torch.device, budget: Budget) -> float:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / median_ms(lambda: a @ b, device, budget) * 1e3


def _exp2_rate(device: torch.device, budget: Budget) -> float | None:
    depth = 128

    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(depth):
            x = torch.exp2(-x)  # stays in (0.5, 1)
        return x

    if device.type == "cuda":
        if not has_l2_flush(device):
            return None
        x = torch.rand(16 * MIB, device=device)
        fused = torch.compile(
            chain, dynamic=False
        )  # one kernel that reads and writes memory once in `depth` exponentials
        return depth * x.numel() / median_ms(lambda: fused(x), device, budget) * 1e3
    x = torch.rand(2**14)
    return depth * x.numel() / median_ms(lambda: [torch.exp2(x) for _ in range(depth)], device, budget) * 1e3


def environment(device: torch.device) -> dict[str, Any]:
    """Device, driver and versions, for the head of a report."""
    facts: dict[str, Any] = {"device": platform.processor() or platform.machine(), "multiprocessors": os.cpu_count()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts = {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    facts |= {name: _version(name) for name in ("torch", "triton", "timm")}
    facts |= {"python": platform.python_version(), "threads": torch.get_num_threads()}
    facts["clock"] = "device events, L2 flushed" if has_l2_flush(device) else "torch.utils.benchmark"
    return facts


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _version(distribution: str) -> str:
    try:
        return torch.__version__ if distribution == "torch" else version(distribution)
    except PackageNotFoundError:
        return "not installed"

"""A process that compiles kernels for another one: it puts them into Triton's cache, where the other finds them.

It runs this file, with Triton, the modules of the kernels and nothing else: importing PyTorch takes longer than
compiling a kernel. Jobs come pickled through its standard input; each is answered by one byte to a pipe, done or not,
after a first byte that says that it is ready. It ends when the input does.
"""

from __future__ import annotations

import importlib
import os
import pickle
import queue
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple


class Job(NamedTuple):
    """What it takes to compile a kernel; it travels as a plain tuple.

    Attributes:
        target: Triton's description of the GPU.
        module: of the kernel.
        packages: paths of the packages around the module, which are not imported themselves.
        name: of the kernel.
        arguments: of a launch, compile-time arguments included; of a tensor the name of its dtype.
        tensors: places of arguments that are tensors.
        options: Triton's, like ``num_warps``.
        environment: variables of the other process as they are now; torch.compile sets Triton's in its own process.
        backend: what the other process's Triton has hashed its backend to, once, with the ptxas of that time.
    """

    target: Any
    module: str
    packages: Mapping[str, Sequence[str]]
    name: str
    arguments: Sequence[Any]
    tensors: Sequence[int]
    options: Mapping[str, Any]
    environment: Mapping[str, str]
    backend: str


class _Driver:
    """Stands for the driver of a GPU, which may not be touched here: all that compiling needs is its description."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> Any:
        return self  # a kernel keeps what it compiled by device, and is to put it into the cache that a job names

    def get_current_stream(self, device: Any) -> int:
        return 0


def settle_hash(kernel: Any) -> None:
    """Have Triton hash a kernel after the functions that it calls.

    Triton keys its cache by that hash, into which go global constants of called functions if those were hashed before:
    two processes agree on it when both keep to this order.
    """
    from triton.runtime.jit import JITCallable

    for name in kernel.fn.__code__.co_names:
        called = kernel.fn.__globals__.get(name)
        if isinstance(called, JITCallable):
            settle_hash(called)
    _ = kernel.cache_key


def compile_kernel(job: Job) -> None:
    """Compile a kernel for a GPU that need not be there."""
    from triton.compiler.compiler import make_backend
    from triton.runtime import driver
    from triton.runtime.jit import MockTensor

    os.environ.clear()
    os.environ.update(job.environment)
    type(make_backend(job.target)).hash = lambda _: job.backend
    for package, path in job.packages.items():
        if package not in sys.modules:
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = list(path)
    kernel = getattr(importlib.import_module(job.module), job.name)
    arguments = [MockTensor(value) if i in job.tensors else value for i, value in enumerate(job.arguments)]
    driver.set_active(_Driver(job.target))
    settle_hash(kernel)
    kernel.warmup(*arguments, grid=(1,), **job.options)


def _receive(stream: BinaryIO, jobs: queue.SimpleQueue[Job]) -> None:
    try:
        while True:
            jobs.put(Job(*pickle.load(stream)))
    finally:
        os._exit(0)  # the other process is gone, and nobody waits for what is being compiled


def main() -> None:
    """Compile what the process that started this one asks for, for as long as it runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other process
    answers = int(sys.argv[1])
    os.set_inheritable(answers, False)
    parent, sys.path[:], triton_file, triton_key = pickle.load(sys.stdin.buffer)
    triton = importlib.import_module("triton")
    if triton.__file__ != triton_file:
        return
    triton.runtime.cache.triton_key = lambda: triton_key  # takes longer to find out than a kernel to compile
    os.write(answers, b".")

    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(sys.stdin.buffer, jobs), daemon=True).start()
    while os.getppid() == parent:  # the input stays open where a fork of that process has it too
        with suppress(queue.Empty):
            job = jobs.get(timeout=1)
            with suppress(Exception):  # the other process compiles what failed here, and says why it fails
                compile_kernel(job)
            os.write(answers, b".")


if __name__ == "__main__":
    try:
        main()
    finally:
        os._exit(0)

"""Compiles kernels before they are launched, in processes beside this one or on its threads.

Triton compiles a kernel in seconds, most of them in Python: threads wait for each other, processes do not. The
processes (_compile_worker.py) put kernels into Triton's cache, and the launch finds them there. Nothing depends on
them: what is not in the cache, for whatever reason, is compiled by the launch.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import os
import pickle
import select
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import torch

from subquad.ops._compile_worker import Job, settle_hash


class Turn(IntEnum):
    """The order in which processes compile kernels; threads only tell those of a call from others."""

    NOW = 0
    """The call is about to run."""
    NEXT = 1
    """Calls like it will probably follow: those of a model's next stages."""
    GRADIENTS = 2
    """The backward pass comes when all of the forward pass is done."""


class _Ahead(threading.local):
    def __init__(self) -> None:
        self.device: torch.device | None = None
        self.turn = Turn.NOW
        self.started: list[object] = []


_ahead = _Ahead()
_jobs: dict[tuple[object, str | None], Future[None]] = {}


@contextmanager
def compiling_ahead(device: torch.device, turn: Turn = Turn.NOW) -> Iterator[list[object]]:
    """Inside, launchers made on this thread launch nothing: they start to compile, for ``device``, in the background.

    A pass that runs inside on meta tensors so has all of its kernels compiled at once, and while an earlier pass runs.

    Yields:
        what was started inside; kernels that are in Triton's cache, or were started before, are not in it.
    """
    _ahead.device, _ahead.turn, _ahead.started = device, turn, []
    try:
        yield _ahead.started
    finally:
        _ahead.device = None


def is_compiling_ahead() -> bool:
    """Whether this thread is inside ``compiling_ahead``."""
    return _ahead.device is not None


def device_ahead() -> torch.device | None:
    """The device that this thread compiles for, inside ``compiling_ahead``."""
    return _ahead.device


def start(job: object, kernel: Any, arguments: Sequence[Any], options: Mapping[str, Any], device: torch.device) -> None:
    """Start to compile a kernel for a launch, unless that was done before; then it takes the turn of the nearer launch.

    Args:
        job: tells kernels apart that are compiled for themselves.
        arguments: of the launch, compile-time arguments included.
        options: Triton's, like ``num_warps``.
    """
    turn, workers, key = _ahead.turn, _workers(), _key(job)
    if key in _jobs:
        if workers is not None:
            workers.hurry(_jobs[key], turn)
        return
    if workers is not None and not workers.useless:
        with suppress(Exception):  # a release of Triton without what this builds on, a cache that cannot be written
            if not _in_cache(kernel, arguments, options, device):
                _jobs[key] = workers.submit(_job(kernel, arguments, options, device), turn)
                _ahead.started.append(job)
            return
    with suppress(RuntimeError):  # the interpreter is on its way out
        _jobs[key] = _threads(turn is Turn.NOW).submit(_warm_up, kernel, arguments, options, device)
        _ahead.started.append(job)


def finish(job: object) -> None:
    """Wait until a kernel is compiled, or found impossible to compile, if that was started."""
    started = _jobs.get(_key(job))
    if started is not None:
        workers = _workers()
        if workers is not None:
            workers.hurry(started, Turn.NOW)
        wait([started])


def _key(job: object) -> tuple[object, str | None]:
    """A kernel in the cache of now: torch.compile moves it in the running process."""
    return job, os.environ.get("TRITON_CACHE_DIR")


def _warm_up(kernel: Any, arguments: Sequence[Any], options: Mapping[str, Any], device: torch.device) -> None:
    kinds = [value.dtype if isinstance(value, torch.Tensor) else value for value in arguments]
    with _short_turns, torch.cuda.device(device):
        kernel.warmup(*kinds, grid=(1,), **options)


# On threads ------------------------------------------------------------------------------------------------------


@cache
def _threads(now: bool) -> ThreadPoolExecutor:
    """For kernels that a call waits for, or fewer for others."""
    threads = min(8 if now else 4, os.cpu_count() or 1)
    return ThreadPoolExecutor(threads, thread_name_prefix="subquad-compile")


class _ShortTurns:
    """While any thread is inside, threads take turns each millisecond.

    Triton leaves the interpreter for each operation that it adds to a kernel, and would come back in only after 5 ms
    (``sys.getswitchinterval``) when another thread compiles too: seconds for a kernel.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._usual = 0.0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._usual = sys.getswitchinterval()
                sys.setswitchinterval(min(self._usual, 0.001))
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                sys.setswitchinterval(self._usual)


_short_turns = _ShortTurns()


# In processes ----------------------------------------------------------------------------------------------------


class _NotInCacheError(Exception):
    pass


def _in_cache(kernel: Any, arguments: Sequence[Any], options: Mapping[str, Any], device: torch.device) -> bool:
    """Whether Triton's cache has a kernel. If so, the kernel is loaded."""
    import triton
    from triton.runtime.cache import get_cache_manager

    class LookUp(triton.AsyncCompileMode):
        def submit(self, key: str, compile_fn: Any, finalize_fn: Any, *_: object) -> Any:
            entry = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
            if entry.get_group(f"{kernel.__name__[:150]}.json") is None:
                raise _NotInCacheError
            compiled = compile_fn()
            finalize_fn(compiled)
            return compiled

    settle_hash(kernel)
    try:
        with LookUp(None):
            _warm_up(kernel, arguments, options, device)
    except _NotInCacheError:
        return False
    return True


def _job(kernel: Any, arguments: Sequence[Any], options: Mapping[str, Any], device: torch.device) -> Job:
    import triton
    from triton.compiler.compiler import make_backend

    parents = itertools.accumulate(kernel.__module__.split(".")[:-1], lambda *names: ".".join(names))
    with torch.cuda.device(device):
        target = triton.runtime.driver.active.get_current_target()
    return Job(
        target,
        kernel.__module__,
        {package: list(sys.modules[package].__path__) for package in parents},
        kernel.__name__,
        [str(value.dtype) if isinstance(value, torch.Tensor) else value for value in arguments],
        [i for i, value in enumerate(arguments) if isinstance(value, torch.Tensor)],
        dict(options),
        dict(os.environ),
        make_backend(target).hash(),
    )


class _WorkerDiedError(Exception):
    pass


class _Worker:
    """A process that compiles one kernel at a time.

    Raises:
        OSError, _WorkerDiedError: if it does not start, or does not find this process's Triton.
    """

    def __init__(self) -> None:
        import triton
        from triton.runtime.cache import triton_key

        self._answers, theirs = os.pipe()
        try:
            # -P: the file's folder, whose modules are no top-level ones, stays out of the path.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("_compile_worker.py")), str(theirs)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs],
            )
        except BaseException:
            os.close(self._answers)
            raise
        finally:
            os.close(theirs)
        try:
            self._ask((os.getpid(), sys.path, triton.__file__, triton_key()), seconds=60)
        except BaseException:
            self.end()
            raise

    def compile(self, job: Job) -> None:
        """Returns when it is done, whether the kernel compiles or not.

        Raises:
            OSError, _WorkerDiedError: if the process is gone, or takes longer than any kernel.
        """
        self._ask(tuple(job), seconds=600)

    def _ask(self, question: object, seconds: int) -> None:
        assert self._process.stdin is not None
        pickle.dump(question, self._process.stdin)
        self._process.stdin.flush()
        answer = select.poll()
        answer.register(self._answers, select.POLLIN)
        if not answer.poll(seconds * 1000) or not os.read(self._answers, 1):
            raise _WorkerDiedError

    def end(self) -> None:
        """Has no other effect than to end the process: files in Triton's cache appear whole or not at all."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        os.close(self._answers)


class _Workers:
    """Processes that compile kernels, each started when a job finds none that is idle, and ended after some idle time.

    A thread of this process talks to each. They are daemons: this process does not wait for them when it ends, and
    then the other processes' input ends too. A quarter of the processes take only jobs that a call waits for, which
    others would keep waiting for seconds.

    Args:
        most: processes at a time.
        patience: seconds until an idle one is ended.

    Attributes:
        useless: whether processes cannot be started at all.
    """

    def __init__(self, most: int, patience: float = 20.0) -> None:
        self.useless = False
        self._most, self._patience = most, patience
        self._changed = threading.Condition()
        self._waiting: list[tuple[Turn, int, Job, Future[None]]] = []
        self._number = itertools.count()
        self._running = self._idle = 0
        self._early = 0  # processes at jobs that no call waits for yet
        self._most_early = max(1, most - most // 4)

    def submit(self, job: Job, turn: Turn) -> Future[None]:
        """Something to wait for until the job was tried, which is after those of earlier turns."""
        done: Future[None] = Future()
        with self._changed:
            heapq.heappush(self._waiting, (turn, next(self._number), job, done))
            self._call_one()
        return done

    def _call_one(self) -> None:
        """Have a process look at what waits, a new one if there are too few."""
        if self._idle < len(self._waiting) and self._running < self._most:
            threading.Thread(target=self._serve, name="subquad-compile", daemon=True).start()
            self._running += 1
        self._changed.notify()

    def hurry(self, done: Future[None], turn: Turn) -> None:
        """Give the job that ``done`` stands for an earlier turn, if it still waits for a later one."""
        with self._changed:
            for i, (old, number, job, waiting) in enumerate(self._waiting):
                if waiting is done and turn < old:
                    self._waiting[i] = turn, number, job, done
                    heapq.heapify(self._waiting)
                    self._call_one()
                    return

    def _next(self) -> tuple[Turn, Job, Future[None]] | None:
        """A job, waited for with patience; without one the thread that asks is no longer counted."""
        with self._changed:
            self._idle += 1
            self._changed.wait_for(self._may_start, self._patience)
            self._idle -= 1
            if not self._may_start():
                self._running -= 1
                return None
            turn, _, job, done = heapq.heappop(self._waiting)
            self._early += turn is not Turn.NOW
            return turn, job, done

    def _may_start(self) -> bool:
        return bool(self._waiting) and (self._waiting[0][0] is Turn.NOW or self._early < self._most_early)

    def _serve(self) -> None:
        worker = self._start()  # at once, whichever job is the first that it may take
        while (next_ := self._next()) is not None:
            turn, job, done = next_
            try:
                worker = worker or self._start()
                if worker is not None:
                    worker.compile(job)
            except Exception:  # the process is gone, or the job does not travel: the launch compiles
                if worker is not None:
                    worker.end()
                worker = None
            finally:
                with self._changed:
                    self._early -= turn is not Turn.NOW
                    self._changed.notify()
                done.set_result(None)
        if worker is not None:
            worker.end()

    def _start(self) -> _Worker | None:
        if not self.useless:
            try:
                return _Worker()
            except Exception:  # no such program, or not this Triton in it
                self.useless = True
        return None


@cache
def _workers() -> _Workers | None:
    most = _most_workers()
    return _Workers(most) if most else None


def _most_workers() -> int:
    """Processes to compile in: ``SUBQUAD_COMPILE_WORKERS``, or as many as help.

    Raises:
        ValueError: if the variable is no number.
    """
    import triton

    # A frozen program is its own sys.executable, and would run again; poll and pass_fds are POSIX.
    if os.name != "posix" or not sys.executable or getattr(sys, "frozen", False):
        return 0
    if not hasattr(triton, "AsyncCompileMode") or triton.knobs.compilation.always_compile:
        return 0
    given = os.environ.get("SUBQUAD_COMPILE_WORKERS")
    if given is not None:
        if not given.isdecimal():
            raise ValueError(f"SUBQUAD_COMPILE_WORKERS: expected a number of processes, got {given!r}")
        return int(given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # torchrun's processes on this host compile the same
    return min(cores, 16) if cores >= 4 else 0

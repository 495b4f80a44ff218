"""Processes that compile kernels: what they do, and that nothing depends on them. For whom: test_compile_ahead.py."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from subquad.ops import _compile, _compile_worker, _triton
from subquad.ops._compile import Turn

triton = pytest.importorskip("triton", reason="needs triton, which this torch came without")

DEVICE = torch.device("cuda", 0)
KERNEL = """
    @triton.jit
    def {name}(p_x, n, BLOCK: tl.constexpr):
        o_n = tl.arange(0, BLOCK)
        tl.store(p_x + o_n, {value}, mask=o_n < n)
"""


@pytest.fixture
def workers(gpu: None, monkeypatch: pytest.MonkeyPatch) -> _compile._Workers:
    """One process, started for the test and ended soon after it."""
    pool = _compile._Workers(1, patience=2)
    monkeypatch.setattr(_compile, "_workers", lambda: pool)
    return pool


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Writes a module that both processes can import, with a kernel of its name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written = []

    def write(name: str, code: str = "", value: str = "1.0") -> Path:
        text = "import os, sys, time\nimport triton\nimport triton.language as tl\n" + code
        text += textwrap.dedent(KERNEL.format(name=name, value=value))
        (tmp_path / f"{name}.py").write_text(text)
        written.append(name)
        return tmp_path / f"{name}.log"

    yield write
    for name in written:
        sys.modules.pop(name, None)


def _job(name: str) -> _compile_worker.Job:
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    backend = triton.compiler.compiler.make_backend(target).hash()
    arguments = ["torch.float32", 100, 128]
    return _compile_worker.Job(target, name, {}, name, arguments, [0], {"num_warps": 1}, dict(os.environ), backend)


def _launch(module: ModuleType) -> tuple[Any, tuple[Any, ...], dict[str, int], torch.device]:
    """A launch of a written module's kernel, as ``_compile`` takes it."""
    kernel = getattr(module, module.__name__)
    return kernel, (torch.empty(128, device="meta"), 100, 128), {"num_warps": 1}, DEVICE


def _wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def _is_gone(pid: int) -> bool:
    """A process that nobody waited for yet is gone too."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def test_a_worker_imports_kernels_without_torch(write: Callable[..., Path], workers: _compile._Workers) -> None:
    """Every module that has a kernel; importing torch would take seconds."""
    root = Path(_compile.__file__).parents[1]
    marks = "@triton.jit", "@_kernel"
    files = [
        path.relative_to(root)
        for path in root.glob("ops/**/*.py")
        if any(mark in path.read_text().splitlines() for mark in marks)
    ]
    modules = [".".join(("subquad", *path.with_suffix("").parts)) for path in files]
    assert "subquad.ops.selective_scan._triton_forward" in modules
    log = write("asks", f"import {', '.join(modules)}\nopen(__file__[:-2] + 'log', 'w').write(str(list(sys.modules)))")
    packages = {name.rpartition(".")[0] for name in modules} | {"subquad", "subquad.ops"}
    paths = {package: list(sys.modules[package].__path__) for package in packages}
    workers.submit(_job("asks")._replace(packages=paths), Turn.NOW).result()
    loaded = log.read_text()
    assert "'subquad.ops.selective_scan._triton_forward'" in loaded and "'subquad.ops._triton_attention'" in loaded
    assert "'torch'" not in loaded


@pytest.mark.usefixtures("ptxas")
def test_a_killed_worker_is_replaced(write: Callable[..., Path], workers: _compile._Workers) -> None:
    log = write("hangs", "open(__file__[:-2] + 'log', 'w').write(str(os.getpid()))\ntime.sleep(100)\n")
    write("well")
    done = workers.submit(_job("hangs"), Turn.NOW)
    _wait_for(lambda: log.exists() and log.read_text())
    os.kill(int(log.read_text()), signal.SIGKILL)
    done.result(timeout=30)
    workers.submit(_job("well"), Turn.NOW).result(timeout=60)
    assert not workers.useless
    assert _compile._in_cache(*_launch(importlib.import_module("well")))


@pytest.mark.usefixtures("ptxas")
def test_a_worker_compiles_as_the_process_would_now(
    write: Callable[..., Path], workers: _compile._Workers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """torch.compile sets Triton's variables in the process, and Triton keeps hashes that it made before."""
    for name in ("before", "after"):
        write(name)
    backend = type(triton.compiler.compiler.make_backend(triton.runtime.driver.active.get_current_target()))
    before, after = (_launch(importlib.import_module(name)) for name in ("before", "after"))
    _compile.start("before", *before)
    _compile.finish("before")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "another"))
    monkeypatch.setattr(backend, "hash", lambda _: "that of another ptxas")
    for name, launch in (("before", before), ("after", after)):
        assert not _compile._in_cache(*launch)
        _compile.start(name, *launch)
        _compile.finish(name)
        assert _compile._in_cache(*launch) and not workers.useless


@pytest.mark.usefixtures("ptxas")
def test_a_kernel_that_was_launched_first_is_found(
    write: Callable[..., Path], workers: _compile._Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hash, which it keeps, has to be the one that it has in the process that compiles it.

    With Triton 3.6; that of 3.9 does not depend on what was hashed before.
    """
    code = "TWO = tl.constexpr(2.0)\n\n@triton.jit\ndef twice(x):\n    return TWO * x\n\n"
    write("doubles", code, "twice(1.0)")
    kernel, arguments, options, device = _launch(importlib.import_module("doubles"))
    with monkeypatch.context() as launching:
        launching.setattr(type(kernel), "__getitem__", lambda kernel, grid: lambda *_, **__: kernel.cache_key and None)
        _triton.Launcher()("name", kernel, (1,), arguments[:2], {"BLOCK": arguments[2]} | options)
    _compile.start("doubles", kernel, arguments, options, device)
    _compile.finish("doubles")
    assert _compile._in_cache(kernel, arguments, options, device)


@pytest.mark.usefixtures("ptxas")
def test_what_a_worker_prints_disturbs_nobody(
    write: Callable[..., Path], workers: _compile._Workers, capfd: pytest.CaptureFixture[str]
) -> None:
    write("talks", "print('. . .', flush=True)\nprint('. . .', file=sys.stderr, flush=True)\n")
    write("well")
    for name in ("talks", "well"):
        workers.submit(_job(name), Turn.NOW).result(timeout=60)
    assert capfd.readouterr() == ("", "")
    assert _compile._in_cache(*_launch(importlib.import_module("well")))


@pytest.mark.usefixtures("ptxas")
@pytest.mark.parametrize("program", ["#!/bin/sh\necho ........\n", "#!/bin/sh\nexit 1\n", None])
def test_without_workers_threads_compile(
    program: str | None,
    write: Callable[..., Path],
    workers: _compile._Workers,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    executable = tmp_path / "no_python"
    if program is not None:
        executable.write_text(program)
        executable.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(executable))
    write("first")
    write("second")
    first, second = (_launch(importlib.import_module(name)) for name in ("first", "second"))
    _compile.start("first", *first)
    _compile.finish("first")
    assert workers.useless
    assert not _compile._in_cache(*first)  # the launch compiles it
    _compile.start("second", *second)
    _compile.finish("second")
    assert _compile._in_cache(*second)


@pytest.mark.usefixtures("ptxas")
def test_the_launch_says_why_a_kernel_does_not_compile(write: Callable[..., Path], workers: _compile._Workers) -> None:
    write("wrong", value="unknown_name")
    launch = _launch(importlib.import_module("wrong"))
    _compile.start("wrong", *launch)
    _compile.finish("wrong")
    assert not workers.useless
    with pytest.raises(triton.compiler.CompilationError, match="unknown_name"):
        _compile._warm_up(*launch)


@pytest.mark.usefixtures("ptxas")
def test_the_launch_says_that_the_cache_cannot_be_written(
    write: Callable[..., Path], workers: _compile._Workers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    write("well")
    launch = _launch(importlib.import_module("well"))
    _compile.start("well", *launch)
    _compile.finish("well")
    with pytest.raises(NotADirectoryError):
        _compile._warm_up(*launch)


def test_an_idle_worker_ends(write: Callable[..., Path], workers: _compile._Workers) -> None:
    log = write("idle", "open(__file__[:-2] + 'log', 'w').write(str(os.getpid()))\n")
    workers.submit(_job("idle"), Turn.NOW).result(timeout=60)
    assert not _is_gone(int(log.read_text()))
    _wait_for(lambda: _is_gone(int(log.read_text())))
    workers.submit(_job("idle"), Turn.NOW).result(timeout=60)
    assert not _is_gone(int(log.read_text()))  # another one


def test_a_call_that_waits_gets_a_process_after_the_kept_ones_ended(
    write: Callable[..., Path], gpu: None, tmp_path: Path
) -> None:
    pool = _compile._Workers(2, patience=0.2)
    code = "while not os.path.exists(os.path.dirname(__file__) + '/go'): time.sleep(0.01)\n"
    names = ["hangs", "hangs_too", "waits"]
    for name in names:
        write(name, code if name != "waits" else "")
    first, second = (pool.submit(_job(name), Turn.GRADIENTS) for name in names[:2])
    _wait_for(lambda: pool._early == 2)
    waits = pool.submit(_job("waits"), Turn.GRADIENTS)
    pool._most = 3
    time.sleep(0.5)
    assert not waits.done()
    pool.hurry(waits, Turn.NOW)
    waits.result(timeout=60)
    (tmp_path / "go").touch()
    for done in (first, second):
        done.result(timeout=60)


def test_jobs_take_turns(write: Callable[..., Path], workers: _compile._Workers, tmp_path: Path) -> None:
    code = "open(os.path.dirname(__file__) + '/order', 'a').write(__name__ + ' ')\n"
    turns = {
        "first": Turn.GRADIENTS,
        "backward": Turn.GRADIENTS,
        "stage_3": Turn.NEXT,
        "stage_2": Turn.NEXT,
        "urgent": Turn.NOW,
        "urgent_too": Turn.NOW,
    }
    for name in turns:
        write(name, code + "while not os.path.exists(os.path.dirname(__file__) + '/go'): time.sleep(0.01)\n")
    jobs = {"first": workers.submit(_job("first"), turns["first"])}
    _wait_for((tmp_path / "order").exists)
    jobs |= {name: workers.submit(_job(name), turn) for name, turn in turns.items() if name != "first"}
    workers.hurry(jobs["stage_2"], Turn.NOW)  # its stage is reached
    workers.hurry(jobs["urgent_too"], Turn.GRADIENTS)  # what is wanted now is not put off
    (tmp_path / "go").touch()
    for done in jobs.values():
        done.result(timeout=60)
    order = ["first", "stage_2", "urgent", "urgent_too", "stage_3", "backward"]
    assert (tmp_path / "order").read_text().split() == order


def test_a_quarter_of_the_workers_is_kept_for_calls_that_wait(
    write: Callable[..., Path], gpu: None, tmp_path: Path
) -> None:
    pool = _compile._Workers(4, patience=2)
    code = "open(os.path.dirname(__file__) + '/' + __name__ + '.started', 'w')\n"
    hangs = "while not os.path.exists(os.path.dirname(__file__) + '/go'): time.sleep(0.01)\n"
    early = [f"early_{i}" for i in range(5)]
    for name in early:
        write(name, code + hangs)
    write("wanted", code)
    jobs = [pool.submit(_job(name), Turn.NEXT) for name in early]
    _wait_for(lambda: len(list(tmp_path.glob("*.started"))) == 3)
    pool.submit(_job("wanted"), Turn.NOW).result(timeout=60)
    assert len(list(tmp_path.glob("early*.started"))) == 3
    pool.hurry(jobs[-1], Turn.NOW)  # its call came
    _wait_for(lambda: (tmp_path / "early_4.started").exists())
    assert not (tmp_path / "early_3.started").exists()
    (tmp_path / "go").touch()
    for done in jobs:
        done.result(timeout=60)


def test_workers_end_with_the_process_that_started_them(write: Callable[..., Path], tmp_path: Path) -> None:
    """At once, in the middle of a job; not before, by Ctrl-C, which reaches all processes of a terminal."""
    log = write("hangs", "open(__file__[:-2] + 'log', 'w').write(str(os.getpid()))\ntime.sleep(100)\n")
    script = f"""
        import os, signal, sys, time
        sys.path.insert(0, {str(tmp_path)!r})
        from subquad.ops import _compile, _compile_worker
        import triton
        target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
        job = _compile_worker.Job(target, "hangs", {{}}, "hangs", [], [], {{}}, os.environ | {{}}, "")
        _compile._Workers(1).submit(job, _compile.Turn.NOW)
        while not (os.path.exists({str(log)!r}) and open({str(log)!r}).read()): time.sleep(0.02)
        os.kill(int(open({str(log)!r}).read()), signal.SIGINT)
        time.sleep(0.5)
        print(open("/proc/" + open({str(log)!r}).read() + "/stat").read().rpartition(")")[2].split()[0])
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout.strip() == "S", done.stdout + done.stderr
    _wait_for(lambda: _is_gone(int(log.read_text())))


@pytest.mark.parametrize(("our_process", "our_triton"), [(True, True), (False, True), (True, False)])
def test_a_worker_ends_that_is_not_ours(our_process: bool, our_triton: bool) -> None:
    """Its input is open, as it is where a fork of the process that started it lives on."""
    answers, theirs = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-P", _compile_worker.__file__, str(theirs)], stdin=subprocess.PIPE, pass_fds=[theirs]
    )
    os.close(theirs)
    with process, open(answers, "rb", buffering=0) as stream:
        assert process.stdin is not None
        parent, file = os.getpid() if our_process else 1, triton.__file__ if our_triton else "another/triton"
        pickle.dump((parent, sys.path, file, "key"), process.stdin)
        process.stdin.flush()
        assert stream.read(1) == (b"." if our_triton else b"")
        if our_process and our_triton:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=1.5)
            process.kill()
        else:
            assert process.wait(timeout=30) == 0


@pytest.mark.parametrize(
    ("cores", "environment", "expected"),
    [
        (2, {}, 0),
        (4, {}, 4),
        (64, {}, 16),
        (64, {"LOCAL_WORLD_SIZE": "8"}, 8),
        (16, {"LOCAL_WORLD_SIZE": "8"}, 0),
        (64, {"SUBQUAD_COMPILE_WORKERS": "0"}, 0),
        (2, {"SUBQUAD_COMPILE_WORKERS": "3"}, 3),
        (64, {"TRITON_ALWAYS_COMPILE": "1"}, 0),  # then there is no cache to find kernels in
    ],
)
def test_workers_are_as_many_as_help(
    cores: int, environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    for name in ("LOCAL_WORLD_SIZE", "SUBQUAD_COMPILE_WORKERS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert _compile._most_workers() == expected


@pytest.mark.parametrize("value", ["", "-1", "many"])
def test_a_wrong_number_of_workers_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBQUAD_COMPILE_WORKERS", value)
    with pytest.raises(ValueError, match=f"SUBQUAD_COMPILE_WORKERS.*'{value}'"):
        _compile._most_workers()


def test_a_frozen_program_starts_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would start itself."""
    monkeypatch.setenv("SUBQUAD_COMPILE_WORKERS", "4")
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert _compile._most_workers() == 0

"""Kernels compiled ahead in processes of their own: what they do, and that nothing depends on them."""

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
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from subquad.ops import _compile, _compile_worker, _triton, depthwise_conv, neighborhood_attention
from subquad.ops._compile import Turn
from subquad.ops.layer_norm import prepare_sum
from subquad.ops.linear_attention import prepare as prepare_linear
from subquad.ops.selective_scan import CROSS, prepare
from subquad.ops.window_attention import prepare as prepare_windows

triton = pytest.importorskip("triton", reason="needs triton, which this torch came without")

DEVICE = torch.device("cuda", 0)
KERNEL = """
    @triton.jit
    def {name}(p_x, n, BLOCK: tl.constexpr):
        o_n = tl.arange(0, BLOCK)
        tl.store(p_x + o_n, {value}, mask=o_n < n)
"""


def _ptxas() -> bool:
    try:
        return os.access(triton.knobs.nvidia.ptxas.path, os.X_OK)
    except RuntimeError:
        return False


needs_ptxas = pytest.mark.skipif(not _ptxas(), reason="needs ptxas, which this triton came without")


class _Gpu:
    """A driver of a GPU that is not here; kernels keep what they know of it apart from what they know of others."""

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> _Gpu:
        return self

    def get_current_stream(self, device: object) -> int:
        return 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An H100 for Triton's eyes, and an empty cache."""
    monkeypatch.setattr(triton.runtime.driver, "_active", _Gpu())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(_compile, "_jobs", {})
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


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
    return _compile_worker.Job(target, name, {}, name, ["torch.float32", 100, 128], [0], {"num_warps": 1})


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


def _leaf(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta").requires_grad_()


def _scan(batch: int = 1, side: int = 4, dim: int = 32, rank: int = 6, d_state: int = 1) -> tuple[str, Any]:
    x = _leaf(batch, side, side, dim)
    steps = torch.empty(batch, side, side, 4, rank + 2 * d_state, dtype=torch.bfloat16, device="meta")
    a, d, weight = (torch.empty(4, dim, *last, device="meta") for last in ((d_state,), (), (rank,)))
    dt, b, c = steps.split([rank, d_state, d_state], -1)
    call = prepare(x, dt, a, b, c, d, dt_weight=weight, dt_bias=d, routes=CROSS, dt_softplus=True)
    return "selective_scan", call


def _conv() -> tuple[str, Any]:
    return "depthwise_conv", depthwise_conv.prepare_map(_leaf(1, 8, 8, 32), _leaf(32, 3, 3), None, activation="silu")


def _norm() -> tuple[str, Any]:
    weight = torch.empty(32, device="meta").requires_grad_()
    return "layer_norm", prepare_sum(_leaf(2, 9, 32).float(), _leaf(2, 9, 32), weight, weight)


def _neighborhood() -> tuple[str, Any]:
    return "neighborhood_attention", neighborhood_attention.prepare(2, *(_leaf(1, 8, 8, 2, 32) for _ in range(3)), 3)


def _linear() -> tuple[str, Any]:
    """Few images and heads, many tokens: two sweeps and what adds their sums up."""
    return "linear_attention", prepare_linear(*(_leaf(1, 2048, 1, 16) for _ in range(3)), feature_map="elu1")


def _window() -> tuple[str, Any]:
    table = torch.empty(25, 2, device="meta").requires_grad_()
    return "window_attention", prepare_windows(*(_leaf(1, 6, 6, 2, 32) for _ in range(3)), 3, 1, table=table)


@needs_ptxas
@pytest.mark.parametrize("make", [_scan, _conv, _norm, _neighborhood, _linear, _window])
def test_finds_what_workers_compiled(
    make: Callable[[], tuple[str, Any]], gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, call = make()
    kernels = importlib.import_module(f"subquad.ops.{op}.triton_impl")
    pool = _compile._Workers(2, patience=1)
    monkeypatch.setattr(_compile, "_workers", lambda: pool)
    hits: list[bool] = []
    compile_ahead: Any = getattr(kernels, "_compile_ahead")  # noqa: B009
    arguments = (call, kernels.default_config("forward", call)) if op == "selective_scan" else (call,)
    with monkeypatch.context() as listening:
        listening.setattr(
            triton.knobs.compilation, "listener", lambda *, cache_hit, **rest: hits.append(cache_hit), raising=False
        )
        compile_ahead(*arguments)
        jobs = dict(_compile._jobs)
        for job in jobs:
            _compile.finish(job)
        assert len(jobs) >= 3 and not hits and not pool.useless
        # Workers compile for aligned pointers; a launch with others would compile a kernel of its own.
        pointers = [kind for job in jobs for kind in job if isinstance(kind, tuple) and isinstance(kind[0], torch.dtype)]
        assert pointers and all(aligned for _, aligned in pointers)
        _compile._jobs.clear()
        compile_ahead(*arguments)
    assert len(hits) >= 3 and all(hits)  # and this process compiled none of them
    assert not _compile._jobs


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


@needs_ptxas
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


@needs_ptxas
def test_what_a_worker_prints_disturbs_nobody(
    write: Callable[..., Path], workers: _compile._Workers, capfd: pytest.CaptureFixture[str]
) -> None:
    write("talks", "print('. . .', flush=True)\nprint('. . .', file=sys.stderr, flush=True)\n")
    write("well")
    for name in ("talks", "well"):
        workers.submit(_job(name), Turn.NOW).result(timeout=60)
    assert capfd.readouterr() == ("", "")
    assert _compile._in_cache(*_launch(importlib.import_module("well")))


@needs_ptxas
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


@needs_ptxas
def test_the_launch_says_why_a_kernel_does_not_compile(write: Callable[..., Path], workers: _compile._Workers) -> None:
    write("wrong", value="unknown_name")
    launch = _launch(importlib.import_module("wrong"))
    _compile.start("wrong", *launch)
    _compile.finish("wrong")
    assert not workers.useless
    with pytest.raises(triton.compiler.CompilationError, match="unknown_name"):
        _compile._warm_up(*launch)


@needs_ptxas
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


@pytest.mark.parametrize("d_state", [1, 16])
def test_stages_compiled_ahead_are_those_of_a_model(d_state: int, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stage's scan has all kernels compiled that the forward passes of VMamba-T's other stages launch."""
    pool = SimpleNamespace(useless=False, submit=lambda job, turn: turn, hurry=lambda done, turn: None)
    monkeypatch.setattr(_compile, "_workers", lambda: pool)
    monkeypatch.setattr(_compile, "_in_cache", lambda *launch: False)
    monkeypatch.setattr(_triton, "_multiprocessor_count", lambda device: 132)
    kernels = importlib.import_module("subquad.ops.selective_scan.triton_impl")
    first, *others = [
        _scan(batch=128, side=56 // width, dim=96 * width, rank=6 * width, d_state=d_state)[1] for width in (1, 2, 4, 8)
    ]
    configs = [kernels.default_config(which, first) for which in ("forward", "backward")]

    def compile_ahead(call: Any) -> list[object]:
        """The turns of what that starts."""
        _compile._jobs, before = {}, _compile._jobs
        _compile._jobs.update(before)
        if d_state == 1:
            kernels._compile_ahead(call, configs[0])
        else:
            kernels._triton_many._compile_ahead(call, *configs)
        return [turn for job, turn in _compile._jobs.items() if job not in before]

    assert {Turn.NOW, Turn.NEXT, Turn.GRADIENTS} == set(compile_ahead(first))
    for call in others:
        assert set(compile_ahead(call)) == {Turn.GRADIENTS}  # not even a stage after the last one


def test_workers_end_with_the_process_that_started_them(write: Callable[..., Path], tmp_path: Path) -> None:
    """At once, in the middle of a job; not before, by Ctrl-C, which reaches all processes of a terminal."""
    log = write("hangs", "open(__file__[:-2] + 'log', 'w').write(str(os.getpid()))\ntime.sleep(100)\n")
    script = f"""
        import os, signal, sys, time
        sys.path.insert(0, {str(tmp_path)!r})
        from subquad.ops import _compile, _compile_worker
        import triton
        target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
        job = _compile_worker.Job(target, "hangs", {{}}, "hangs", [], [], {{}})
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


@pytest.mark.gpu
def test_a_cold_start_is_served_by_workers(tmp_path: Path) -> None:
    """In a fresh process with an empty cache this process compiles nothing, and the results are the reference's."""
    script = """
        import torch, triton
        from subquad.ops import selective_scan, use_backend
        from subquad.ops.selective_scan import CROSS
        hits = []
        triton.knobs.compilation.listener = lambda *, cache_hit, **rest: hits.append(cache_hit)
        def run(dtype, backend):
            generator = torch.Generator().manual_seed(0)
            make = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to("cuda", dtype)
            x, dt, b, c = make(2, 8, 8, 64), make(2, 8, 8, 4, 64), make(2, 8, 8, 4, 1), make(2, 8, 8, 4, 1)
            leaves = [x, dt, -make(4, 64, 1).exp(), b, c, make(4, 64)]
            for leaf in leaves:
                leaf.requires_grad_()
            with use_backend(backend):
                y = selective_scan(*leaves, routes=CROSS)
                return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]
        for mine, expected in zip(run(torch.float32, "triton"), run(torch.float64, "reference"), strict=True):
            assert (mine.double() - expected).norm() < 1e-4 * expected.norm()
        print(len(hits), all(hits))
    """
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "SUBQUAD_COMPILE_WORKERS": "4"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    count, all_hits = done.stdout.split()
    assert int(count) >= 4 and all_hits == "True"

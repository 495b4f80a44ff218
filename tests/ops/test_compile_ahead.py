"""Which kernels calls compile ahead, and that their launches find them. What compiles them: test_compile.py."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from subquad.ops import _compile, _triton, depthwise_conv, neighborhood_attention
from subquad.ops._compile import Turn
from subquad.ops.layer_norm import prepare_sum
from subquad.ops.linear_attention import prepare as prepare_linear
from subquad.ops.selective_scan import CROSS, prepare
from subquad.ops.window_attention import prepare as prepare_windows

triton = pytest.importorskip("triton", reason="needs triton, which this torch came without")

DEVICE = torch.device("cuda", 0)


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


@pytest.mark.usefixtures("ptxas")
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
        for job, _ in jobs:
            _compile.finish(job)
        assert len(jobs) >= 3 and not hits and not pool.useless
        # Workers compile for aligned pointers; a launch with others would compile a kernel of its own.
        kinds = [kind for job, _ in jobs for kind in job if isinstance(kind, tuple)]
        pointers = [kind for kind in kinds if isinstance(kind[0], torch.dtype)]
        assert pointers and all(aligned for _, aligned in pointers)
        _compile._jobs.clear()
        compile_ahead(*arguments)
    assert len(hits) >= 3 and all(hits)  # and this process compiled none of them
    assert not _compile._jobs


def test_the_first_call_of_training_compiles_ahead_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those before it, without gradients, had no reason to compile the backward pass."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    plans: _triton.Plans[object] = _triton.Plans()
    asked = []
    for training in (False, False, True, True):
        x: Any = SimpleNamespace(device=DEVICE, is_cuda=True, requires_grad=training)
        plans.get("key", x, object, lambda training=training: asked.append(training))
    assert asked == [False, True]


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

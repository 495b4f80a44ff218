"""SUBQUAD_AUTOTUNE: the search and its file, with the GPU's part replaced."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from subquad.ops import _triton

triton = pytest.importorskip("triton", reason="needs triton, which this torch came without")


class Choice(NamedTuple):
    block: int
    waves: int


DEFAULT, CANDIDATES = Choice(1, 1), [Choice(16, 12), Choice(32, 12), Choice(32, 24)]


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Call ``tuned`` on a pretended GPU where the second candidate is the fastest and the first does not fit."""
    times = dict(zip(CANDIDATES, (None, 1.0, 2.0), strict=True))
    tried: list[Choice] = []

    def bench(run: Any, return_mode: str) -> float:
        config = run()
        tried.append(config)
        time = times[config]
        if time is None:
            raise triton.runtime.errors.OutOfResources(2, 1, "shared memory")
        return time

    monkeypatch.setattr("triton.testing.do_bench", bench)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
    monkeypatch.setattr("torch.cuda.device", lambda device: nullcontext())
    monkeypatch.setattr(_triton, "_tuning", {})
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path))
    tensor: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"))

    def call() -> tuple[Choice, list[Choice]]:
        tried.clear()
        return _triton.tuned("op", tensor, CANDIDATES, DEFAULT, lambda config: config), list(tried)

    return call


def test_refuses_what_is_no_switch(search: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBQUAD_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="SUBQUAD_AUTOTUNE: expected 0 or 1, got 'yes'"):
        search()


def test_off_by_default(search: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUBQUAD_AUTOTUNE", raising=False)
    assert search() == (DEFAULT, [])


@pytest.mark.parametrize("content", [None, "{ trunc", '{"a GPU triton 0 op": [1]}'], ids=["none", "broken", "other"])
def test_searches_once_and_remembers(
    search: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    monkeypatch.setenv("SUBQUAD_AUTOTUNE", "1")
    if content is not None:
        (tmp_path / "autotune.json").write_text(content)
    assert search() == (CANDIDATES[1], CANDIDATES)
    assert search() == (CANDIDATES[1], [])
    monkeypatch.setattr(_triton, "_tuning", {})  # as in the next process
    assert search() == (CANDIDATES[1], [])
    assert list(CANDIDATES[1]) in json.loads((tmp_path / "autotune.json").read_text()).values()

"""What the tests of the benchmarks share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from subquad.tools.benchmarks import measure
from subquad.tools.benchmarks.measure import Ceilings


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a short run, with ceilings of the reference GPU in place of a measurement."""
    monkeypatch.setattr(measure, "ceilings", lambda device: Ceilings(copy=3.0e12, matmul=7.5e14, exp2=4.13e12))
    return {"device": "cpu", "dtype": "float32", "milliseconds": 1, "repeats": 1, "output": tmp_path / "results"}

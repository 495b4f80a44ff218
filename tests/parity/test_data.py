"""The recorded data itself: present where it must be, and read as it was written."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DATA = Path(__file__).parent / "data"


def test_parity_folder_holds_cases(parity_folder: Path) -> None:
    assert list(parity_folder.glob("*/*/*.safetensors")), f"{parity_folder} holds no cases"


def test_committed_cases_are_the_recorded_ones(parity_folder: Path) -> None:
    committed = [path for path in DATA.rglob("*") if path.suffix in (".json", ".safetensors")]
    assert committed
    for path in committed:
        assert path.read_bytes() == (parity_folder / path.relative_to(DATA)).read_bytes(), path.name
    for path in DATA.rglob("*.tsv.gz"):
        recorded = parity_folder / path.relative_to(DATA)
        text = gzip.decompress(recorded.read_bytes()) if recorded.exists() else recorded.with_suffix("").read_bytes()
        assert gzip.decompress(path.read_bytes()) == text, path.name


@pytest.mark.cases(where=lambda case: "overrides []" in case.sidecar.get("state_rule", ""))
def test_fill_rule_gives_the_stored_weights(any_case: Any, fill_rule: Callable[..., np.ndarray]) -> None:
    state = any_case.state()
    assert state
    for name, value in state.items():
        if value.is_floating_point():
            np.testing.assert_array_equal(fill_rule(name, tuple(value.shape)), value.numpy(), err_msg=name)

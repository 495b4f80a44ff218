"""Kernels on a machine without a GPU: Triton reads its interpreter flag once, so they need a process of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which this torch came without")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets kernels itself")
@pytest.mark.timeout(1200)
def test_kernels_pass_in_the_interpreter(root: Path) -> None:
    # -P: the root of the checkout must not be on sys.path, where its folders would shadow other packages.
    command = [sys.executable, "-P", "-m", "pytest", "-m", "interpret", "-q", "-p", "no:cacheprovider", "tests/ops"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=root, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    last = done.stdout.strip().rpartition("\n")[2]
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in last, done.stdout

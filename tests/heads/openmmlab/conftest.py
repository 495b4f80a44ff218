"""Registers the toy isotropic model of the backbones' tests."""

from __future__ import annotations

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parents[2] / "backbones" / "conftest.py"))

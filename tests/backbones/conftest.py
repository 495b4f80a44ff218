"""Registers the toy model before the test modules ask for the names of all models."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

NAME = "toy_isotropic"

if NAME not in sys.modules:
    spec = importlib.util.spec_from_file_location(NAME, Path(__file__).with_name(f"{NAME}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module  # timm looks up the module of a model that registers
    spec.loader.exec_module(module)

"""Recorded upstream cases: where they lie, which systems can run them, and how close is close enough.

Cases come from the folder that ``SUBQUAD_PARITY_DIR`` names (by default ``../shared/parity`` beside the repository) and
from ``data/``, a small part of it in the same form. A test module that says ``SYSTEM = "name"`` gets that op's cases as
the fixture ``case``; all other cases are models and go to ``test_models.py``.

A system is one file ``systems/<name>.py``, or an entry in the ``SYSTEMS`` of a file there, with

* ``MANIFESTS``: manifest name to the name of our model; ``MANIFEST_PATTERN``: which manifests belong to the system;
* ``build(constructor)``: the model for upstream's constructor arguments; ``build_case(case)`` where these do not tell;
* ``CLASSIFIER``: pattern of the upstream names that a detection backbone lacks, ``OUTPUT_NORM``: pattern of those that
  only it has, whose group ``i`` is the stage;
* ``LEGACY_NAMES``: where an older release had other names, renames from the current ones;
* ``probes(model)``: upstream module name, or a recorded ``out/...``, to a module of ours with the same output;
* where fill cases without a manifest need it, ``upstream_shapes(constructor)``: upstream's names and shapes;
* where something else than stage maps was recorded, ``outputs(model, image, maps)``: recorded name to our value, with
  the maps of stages as ``stage<i>`` and behind a detection backbone's norms as ``det<i>``;
* where a norm ends each stage, ``taps(model)``: a recorded ``out/...`` to a module of ours that it is the input of;
* ``SURPLUS``: manifest name to the number of upstream's parameters that our model has no use for, if there are any;
* where its results were recorded in float32, ``FLOAT32 = True``;
* where only some cases can run, ``CASES``: pattern of their names.

Cases in a folder ``ops`` are of ops and of single layers, whatever system they name: test modules ask for them by name.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
ROOT = Path(os.environ.get("SUBQUAD_PARITY_DIR") or HERE.parents[2] / "shared" / "parity")
COMMITTED = HERE / "data"

FLOAT32_SLACK = 2e-6
"""Of the largest value; added to 20 times upstream's own float32 error, because a parallel scan rounds differently."""

FLOAT32_GRADIENT = 1e-6
"""Of the largest value: the error of gradients that were recorded in float32, for which no sidecar states one."""

STORED_ROUNDING = 1e-6
"""Of the largest value: float64 results of models were stored as float32."""


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"parity_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fill = _load(HERE / "fill.py").fill
SYSTEMS: dict[str, Any] = {}
for _path in sorted((HERE / "systems").glob("*.py")):
    _module = _load(_path)
    SYSTEMS |= getattr(_module, "SYSTEMS", {_path.stem: _module})


@dataclass(frozen=True)
class Manifest:
    """Names, shapes and dtypes of one upstream state dict, and the number of its parameters (buffers do not count)."""

    path: Path
    name: str
    kind: str

    @classmethod
    def at(cls, path: Path) -> Manifest:
        name, _, kind = path.name.removesuffix(".gz").removesuffix(".tsv").partition(".")
        return cls(path, name, kind)

    @cached_property
    def _rows(self) -> list[list[str]]:
        data = self.path.read_bytes()
        text = (gzip.decompress(data) if self.path.suffix == ".gz" else data).decode()
        return [line.split("\t") for line in text.splitlines()]

    @property
    def entries(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name to (shape, dtype)."""
        return {name: (_shape(shape), dtype) for name, shape, dtype in self._rows[:-1]}

    @property
    def total(self) -> int:
        label, total = self._rows[-1]
        assert label == "total_params"
        return int(total)

    @property
    def system(self) -> Any:
        """The system that the manifest belongs to, None if that is not implemented."""
        return next((system for system in SYSTEMS.values() if re.match(system.MANIFEST_PATTERN, self.name)), None)

    def related(self, kind: str) -> Manifest | None:
        """Another manifest of the same model: ``legacy_names`` or ``backbone_extra``."""
        return next((other for other in manifests() if (other.name, other.kind) == (self.name, kind)), None)


def _shape(text: str) -> tuple[int, ...]:
    return () if text in ("", "scalar") else tuple(int(size) for size in text.split("x"))


@dataclass(frozen=True)
class Case:
    """A recorded case: ``path`` and its sidecar."""

    path: Path
    sidecar: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.system_name}/{self.sidecar['case']}"

    @property
    def system_name(self) -> str:
        return self.sidecar["system"]

    @property
    def system(self) -> Any:
        return SYSTEMS[self.system_name]

    def build(self) -> Any:
        """The system's model for the case, with random weights."""
        if (build_case := getattr(self.system, "build_case", None)) is not None:
            return build_case(self)
        return self.system.build(self.sidecar["constructor"])

    @property
    def is_model(self) -> bool:
        """Whether the case is of a whole model that we have."""
        if self.path.parent.name == "ops" or self.system_name not in SYSTEMS:
            return False
        return bool(re.search(getattr(self.system, "CASES", ""), self.sidecar["case"]))

    @property
    def has_gradients(self) -> bool:
        with safe_open(self.path, "pt") as file:
            return any(name.startswith("grad/") for name in file.keys())  # noqa: SIM118

    def tensors(self) -> dict[str, Tensor]:
        tensors = load_file(self.path)
        if not self.sidecar["input_stored"]:
            draw = np.random.RandomState(0).standard_normal(self.sidecar["input_shape"])
            tensors["input"] = torch.from_numpy(draw.astype("float32"))
        return tensors

    def state(self) -> dict[str, Tensor]:
        """Weights under upstream's names: stored ones, or values of the fill rule for its float entries.

        Some cases store the norms of the detection backbone apart from the classification model's weights.
        """
        if self.sidecar["weights"] == "stored":
            tensors = self.tensors()
            return group(tensors, "state") | group(tensors, "det")
        keep = self.sidecar.get("fill_keep", [])
        state = {}
        for name, shape in self._upstream_shapes().items():
            if any(re.search(pattern, name) for pattern in keep):
                continue
            values = fill(name, shape)
            for pattern, how, number in self.sidecar["fill_overrides"]:
                if re.search(pattern, name):
                    values = values * np.float32(number) if how == "scale" else np.full_like(values, number)
            state[name] = torch.from_numpy(values)
        return state

    def _upstream_shapes(self) -> dict[str, tuple[int, ...]]:
        names = (self.sidecar.get("variant", ""), self.sidecar["case"].removeprefix("fill_").removesuffix("_fill"))
        for manifest in manifests():
            if manifest.name in names and not manifest.kind:
                return {name: shape for name, (shape, dtype) in manifest.entries.items() if dtype == "float32"}
        return self.system.upstream_shapes(self.sidecar["constructor"])

    @property
    def in_float32(self) -> bool:
        """Whether the results themselves are upstream's in float32."""
        return getattr(SYSTEMS.get(self.system_name), "FLOAT32", False)

    def noise_floor(self, key: str, largest: float) -> float:
        """Upstream's float32 error of one output; some sidecars leave out ``out/`` or state one for several outputs."""
        floors = self.sidecar["noise_floor"]
        output = key.removeprefix("out/")
        names = [key, output, output.partition("/")[0], "/".join(key.split("/")[:2])]  # a summary, or its map's
        if output.startswith("det"):
            names.append(f"out/stage{output[3:]}")  # what the norm is taken of
        if key.startswith("grad/"):
            names += [key.replace("/", "_"), "grad (largest over all tensors)", "grad_params_max"]
        for name in names:
            if name in floors:
                return floors[name]
        if key.startswith("grad/") and self.in_float32:
            return FLOAT32_GRADIENT * largest
        raise KeyError(f"{self.name} states no noise floor for {key}, only for {list(floors)}")

    def recorded_error(self, key: str) -> float:
        """Relative error of the recorded values beyond their rounding: where gradients are a float32 run's."""
        stated = self.sidecar["noise_floor"].get("grad_params_max_relative_to_each_param_max", 0.0)
        return 1.01 * stated if key.startswith("grad/") else 0.0


def group(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under ``prefix/``, without it."""
    return {name.removeprefix(f"{prefix}/"): value for name, value in tensors.items() if name.startswith(f"{prefix}/")}


# Collection ------------------------------------------------------------------------------------------------------


def _files(pattern: str) -> list[Path]:
    """Files under the parity folder, then those under ``data/`` that it does not have."""
    found = {path.relative_to(root): path for root in (COMMITTED, ROOT) for path in root.glob(pattern)}
    return [found[relative] for relative in sorted(found)]


@cache
def cases() -> list[Case]:
    sidecars = [path for path in _files("*/*/*.json") if path.with_suffix(".safetensors").exists()]
    return [Case(path.with_suffix(".safetensors"), json.loads(path.read_text())) for path in sidecars]


@cache
def manifests() -> list[Manifest]:
    found: dict[str, Manifest] = {}
    for path in _files("*/manifests/*.tsv*"):
        found.setdefault(path.name.removesuffix(".gz"), Manifest.at(path))
    return list(found.values())


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cases(where): run only on the cases or manifests for which where(...) is true")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise ``case`` and ``manifest`` (implemented systems only), ``any_case``, and what is not implemented."""
    own = getattr(metafunc.module, "SYSTEM", None)
    mark = metafunc.definition.get_closest_marker("cases")
    where = mark.kwargs["where"] if mark else lambda _: True
    # systems that are ops
    ops = {name for path in HERE.glob("test_*.py") for name in re.findall(r'^SYSTEM = "(\w+)"', path.read_text(), re.M)}
    everything = {
        "any_case": cases(),
        "case": [case for case in cases() if (case.path.parent.name == own if own else case.is_model)],
        "manifest": [manifest for manifest in manifests() if manifest.system is not None and not manifest.kind],
    }
    for fixture, items in everything.items():
        if fixture in metafunc.fixturenames:
            wanted = [item for item in items if where(item)]
            metafunc.parametrize(fixture, wanted, ids=[item.name for item in wanted])
    if "unknown_system" in metafunc.fixturenames:
        systems = sorted({case.system_name for case in cases()} - SYSTEMS.keys() - ops)
        metafunc.parametrize("unknown_system", systems)
    if "unclaimed_manifests" in metafunc.fixturenames:
        folders: dict[str, list[str]] = {}
        for manifest in manifests():
            if manifest.system is None:
                folders.setdefault(manifest.path.parts[-3], []).append(manifest.path.name)
        metafunc.parametrize("unclaimed_manifests", list(folders.values()), ids=list(folders))


# Fixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def parity_folder() -> Path:
    """The whole recorded data; without it the test is skipped, and fails where CI=true."""
    if not ROOT.is_dir():
        reason = f"no parity data at {ROOT}, set SUBQUAD_PARITY_DIR to its folder"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(f"{reason}: only the committed cases run")
    return ROOT


@pytest.fixture
def assert_recorded() -> Callable[..., None]:
    """``assert_recorded(case, key, value, reference)``: float32 within tolerance, float64 within stored rounding."""

    def check(case: Case, key: str, value: Tensor, reference: Tensor, exact: float = STORED_ROUNDING) -> None:
        assert value.shape == reference.shape, f"{key}: {tuple(value.shape)} instead of {tuple(reference.shape)}"
        assert reference.numel() > 0
        error = (value.detach().double() - reference.double()).abs().max().item()
        largest = reference.abs().max().item()
        if value.dtype == torch.float64 and not case.in_float32:
            limit = max(exact, case.recorded_error(key)) * largest
        else:
            limit = 20 * case.noise_floor(key, largest) + FLOAT32_SLACK * largest
        assert math.isfinite(error) and error <= limit, f"{case.name} {key}: off by {error:.3g}, allowed {limit:.3g}"

    return check


@pytest.fixture
def fill_rule() -> Callable[[str, tuple[int, ...]], np.ndarray]:
    return fill

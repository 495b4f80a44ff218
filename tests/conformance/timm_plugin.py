"""Pytest plugin that turns timm's own tests/test_models.py into tests of this library's models.

That file takes its parameters from ``timm.list_models`` while it is imported, so the plugin replaces that function
before: only the models named in ``SUBQUAD_CONFORMANCE_MODELS`` (comma separated) remain, whatever module timm asks for.
Tests that name timm's own models are deselected.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from typing import Any

import pytest
import timm
import toy_isotropic  # noqa: F401  (registers models)

from subquad.backbones.base import Isotropic

EXCLUDED: dict[tuple[str, str], str] = {}
"""(name of a timm test, glob of our models) to the reason why that test is not run on them. Nothing is excluded."""

MODELS = os.environ["SUBQUAD_CONFORMANCE_MODELS"].split(",")
# timm tells models whose features are tokens from those whose features are maps by a list of its own names.
TOKEN_MODELS = [name for name in MODELS if isinstance(timm.create_model(name, device="meta"), Isotropic)]

_timm_list_models = timm.list_models


def _with_token_models(patterns: str | Sequence[str]) -> str | Sequence[str]:
    return [*patterns, *TOKEN_MODELS, *(f"{name}.*" for name in TOKEN_MODELS)] if "vit_*" in patterns else patterns


def _list_models(
    filter: str | Sequence[str] = "",
    module: Any = "",
    pretrained: bool = False,
    exclude_filters: str | Sequence[str] = "",
    **options: Any,
) -> list[str]:
    if pretrained:
        return []  # tests that download
    listed = _timm_list_models(
        _with_token_models(filter), exclude_filters=_with_token_models(exclude_filters), **options
    )
    return [name for name in listed if name.split(".")[0] in MODELS]


timm.list_models = _list_models
timm.list_pretrained = lambda *args, **kwargs: []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    selected = [item for item in items if _model(item) in MODELS and not _excluded(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in selected])
    items[:] = selected


def _model(item: pytest.Item) -> str:
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return str(parameters.get("model_name", "")).split(".")[0]


def _excluded(item: pytest.Item) -> bool:
    test = getattr(item, "originalname", "")
    return any(test == name and fnmatch.fnmatch(_model(item), models) for name, models in EXCLUDED)

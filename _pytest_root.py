"""Pytest plugin: the repository root is the package itself and must not be collected as a second copy of it.

Without it pytest imports the root ``__init__.py`` under the checkout's folder name, and every custom op and every timm
model would be registered twice.
"""

from pathlib import Path

import pytest


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if path == parent.config.rootpath:
        return pytest.Dir.from_parent(parent, path=path)
    return None

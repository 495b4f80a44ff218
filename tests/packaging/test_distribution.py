"""What gets installed: packages, files in the wheel and in the source archive, imports of an installed copy."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

import subquad

# Nothing in them is part of the installed package.
NOT_SHIPPED = ("tests/", ".")
# Forks whose insides the stand-in for compiled operators relies on; a name with a successor under another licence.
BOUNDED = ("onedl-", "albumentations")


@pytest.fixture(scope="module")
def archives(root: Path, sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """Names of the files in a wheel and in a source archive, both built from a copy of the source files."""
    checkout, built = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("built")
    for name in sources:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, checkout / name)
    build = f"from setuptools import build_meta as b; b.build_wheel({str(built)!r}); b.build_sdist({str(built)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = built.glob("*.whl")
    (archive,) = built.glob("*.tar.gz")
    in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    with tarfile.open(archive) as tar:
        in_archive = {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}
    return in_wheel, in_archive


def test_packages_are_the_folders_with_an_init(pyproject: dict[str, Any], sources: list[str]) -> None:
    folders = {Path(name).parent for name in sources if Path(name).name == "__init__.py"}
    assert set(pyproject["tool"]["setuptools"]["packages"]) == {".".join(("subquad", *f.parts)) for f in folders}


def test_wheel_holds_the_package_and_nothing_else(archives: tuple[set[str], set[str]], sources: list[str]) -> None:
    expected = {
        f"subquad/{name}"
        for name in sources
        if not name.startswith(NOT_SHIPPED)
        and (name.endswith((".py", "py.typed")) or (name.startswith("configs/") and name.endswith(".yaml")))
    }
    shipped = {name for name in archives[0] if ".dist-info/" not in name}
    assert shipped == expected


def test_wheel_carries_the_license(archives: tuple[set[str], set[str]]) -> None:
    assert any(re.fullmatch(r"subquad-[^/]+\.dist-info/licenses/LICENSE", name) for name in archives[0])


def test_source_archive_holds_every_source(archives: tuple[set[str], set[str]], sources: list[str]) -> None:
    assert {name for name in sources if not name.startswith(".")} <= archives[1]


def test_no_stray_module_in_the_root(sources: list[str]) -> None:
    """Every Python file in the root is shipped as a module of subquad."""
    in_root = {name for name in sources if name.endswith(".py") and "/" not in name}
    assert in_root == {"__init__.py", "__main__.py", "_pytest_root.py", "_version.py", "cli.py"}


def test_imported_once(root: Path) -> None:
    """The root holds an __init__.py: a runner that imports it by path would register every op and model twice."""
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    assert files.count(subquad.__file__) == 1
    assert Path(subquad.__file__) == root / "__init__.py"


def test_works_without_triton_and_without_extras(pyproject: dict[str, Any]) -> None:
    """triton exists on Linux only, and what the extras bring is not there after a plain install."""
    requirements = chain.from_iterable(pyproject["project"]["optional-dependencies"].values())
    names = {re.split(r"[\[<>=!~ ;]", requirement)[0].replace("-", "_") for requirement in requirements}
    absent = sorted((names | {"triton", "sklearn", "mmcv", "mmengine", "mmdet", "mmseg"}) - {"subquad", "setuptools"})
    program = textwrap.dedent(f"""
        import sys

        sys.modules.update(dict.fromkeys({absent!r}))  # None: importing it fails as if it were not installed
        import timm, torch
        import subquad

        model = timm.create_model("test_vmamba", num_classes=3)
        model(torch.randn(2, 3, 64, 64)).sum().backward()
        """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_dependency_has_an_upper_bound_and_triton_is_none(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    requirements = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    free = [r for r in requirements if not r.startswith(BOUNDED)]
    assert [r for r in free if re.search(r"<|==|~=", r) or r.startswith("triton")] == []

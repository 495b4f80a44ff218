"""timm's own, unmodified tests/test_models.py over this library's models.

The small test models run by default; every variant runs with ``pytest -m slow tests/conformance``. The file is not part
of timm's wheel: it comes from the source archive of the installed version, fetched once and kept in pytest's cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm

from subquad.backbones.registry import model_names

HERE = Path(__file__).parent
TOYS = ["test_isotropic", "test_isotropic_plain"]
# What timm has tested of every model since 1.0.29; later versions add to it.
MINIMUM = {
    "test_model_forward",
    "test_model_backward",
    "test_model_forward_torchscript",
    "test_model_forward_intermediates",
    "test_model_forward_intermediates_features",
    "test_model_forward_fx",
    "test_model_backward_fx",
    "test_model_forward_fx_torchscript",
}
ENDS_EARLY = "test_model_default_cfgs_non_std", "Fixed input size model > limit."
"""A test that timm ends with a skip, behind its first checks, for images of more than 320 px, and its reason."""
MARKERS = ("base", "forward", "backward", "cfg", "cfg_nonstd", "torchscript", "features", "fxforward", "fxbackward")
CONFIG = "\n    ".join(["[pytest]\nmarkers =", *(f"{marker}: of timm" for marker in MARKERS)])


def _pip(*arguments: str, **variables: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise OSError(f"pip {arguments[0]} failed: {done.stderr.strip()[-500:]}")


def _fetch(folder: Path) -> Path:
    """timm's test_models.py of the installed version, in ``folder``."""
    tests = folder / "test_models.py"
    if not tests.exists():
        backend = folder / "backend"  # of timm's build, which pip needs to read the archive's metadata
        _pip("install", "--quiet", "--target", str(backend), "pdm-backend")
        archive = ("--no-binary", ":all:", "--no-deps", "--no-build-isolation", f"timm=={timm.__version__}")
        _pip("download", "--quiet", *archive, "-d", str(folder), PYTHONPATH=str(backend))
        with tarfile.open(next(folder.glob("timm-*.tar.gz"))) as source:
            member = source.extractfile(f"timm-{timm.__version__}/tests/test_models.py")
            assert member is not None
            part = folder / "part"
            part.write_bytes(member.read())
            part.replace(tests)
    return tests


@pytest.fixture(scope="session")
def timm_tests(request: pytest.FixtureRequest) -> str:
    """Source of timm's test_models.py."""
    assert request.config.cache is not None
    try:
        return _fetch(request.config.cache.mkdir(f"timm-{timm.__version__}")).read_text()
    except (OSError, subprocess.TimeoutExpired) as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"timm's tests/test_models.py could not be fetched ({error})")


def _run(folder: Path, timm_tests: str, models: list[str]) -> dict[str, set[str]]:
    """Run timm's tests over ``models`` in a process of their own.

    Returns:
        The names of the tests that passed, or ended early as ``ENDS_EARLY`` says, by model.
    """
    # Alone in a folder: beside it, the archive's own timm would shadow the installed one.
    (folder / "test_models.py").write_text(timm_tests)
    (folder / "pytest.ini").write_text(CONFIG)
    environment = os.environ | {
        "SUBQUAD_CONFORMANCE_MODELS": ",".join(models),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent / "backbones")]),
    }
    environment["TIMEOUT"] = "600"  # of timm, for slow machines
    environment.pop("GITHUB_ACTIONS", None)  # drops tests
    command = [sys.executable, "-m", "pytest", "-q", "-p", "timm_plugin", "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["--junitxml=report.xml", "test_models.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
    passed = defaultdict(set)
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        test, _, parameters = case.attrib["name"].partition("[")
        skipped = case.find("skipped")
        if skipped is not None:
            reason = skipped.attrib["message"]
            assert (test, reason) == ENDS_EARLY, f"{case.attrib['name']} was skipped: {reason}"
        model = parameters.rstrip("]").split(".")[0].split("-")[-1]
        passed[model].add(test)
    return passed


def _assert_covered(passed: dict[str, set[str]], models: list[str]) -> None:
    assert set(passed) == set(models)
    for model in models:
        assert passed[model] >= MINIMUM, f"{model}: timm's tests were not run: {MINIMUM - passed[model]}"
        assert passed[model] & {"test_model_default_cfgs", "test_model_default_cfgs_non_std"}


@pytest.mark.timeout(1200)
def test_small_models(tmp_path: Path, timm_tests: str) -> None:
    models = [name for name in model_names() if name.startswith("test_") and name not in TOYS] + TOYS
    _assert_covered(_run(tmp_path, timm_tests, models), models)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", [name for name in model_names() if not name.startswith("test_")])
def test_every_variant(model: str, tmp_path: Path, timm_tests: str) -> None:
    _assert_covered(_run(tmp_path, timm_tests, [model]), [model])

"""README, CONTRIBUTING, CHANGELOG and CITATION say what is there."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import subquad
from subquad import cli
from subquad.tools import models

DOCUMENTS = ("README.md", "CONTRIBUTING.md")
TRAIN = 'pip install -e ".[train]" && subquad train'
TEST = 'pip install -e ".[dev]" && pytest'
FETCHED = {
    "pretrained=True": "pretrained=False",
    '"detector.pth"': "None",
    '"photo.jpg"': "__import__('numpy').zeros((80, 130, 3), 'uint8')",
}
README = (Path(subquad.__file__).parent / "README.md").read_text()


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def _commands(text: str) -> list[str]:
    lines = "".join(_blocks(text, "sh")).splitlines()
    return [line.split(" #")[0].strip() for line in lines]


def test_readme_has_the_two_commands() -> None:
    assert {TRAIN, TEST} <= set(_commands(README))


def test_extras_and_programs_of_the_commands_exist(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    assert set(re.findall(r'"\.\[(\w+)\]"', TRAIN + TEST)) <= set(project["optional-dependencies"])
    assert project["scripts"] == {"subquad": "subquad.cli:main"}


def test_ci_runs_the_test_command_of_the_readme(root: Path) -> None:
    steps = re.findall(r"^(?:\w+=\S+ )?step (.*)$", (root / ".ci/run").read_text(), re.MULTILINE)
    assert steps[-1] == TEST.split(" && ")[1]
    assert TEST.split(" && ")[0] in [step.replace(" --quiet", "") for step in steps]


@pytest.mark.parametrize("line", [line for line in _commands(README) if line.startswith("subquad ")])
def test_readme_command_lines_are_accepted(line: str) -> None:
    tyro = pytest.importorskip("tyro", reason="needs tyro (extra train)")
    _, name, *arguments = shlex.split(line)
    assert name in cli.COMMANDS
    tyro.cli(importlib.import_module(f"subquad.tools.{name}").Options, args=arguments)


@pytest.mark.parametrize("number", range(len(_blocks(README, "python"))))
def test_readme_python_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but what has to be fetched: weights and a photo."""
    block = _blocks(README, "python")[number]
    if "openmmlab" in block:
        pytest.importorskip("mmdet", reason='needs mmdet: pip install "subquad[mm]"')
        monkeypatch.chdir(tmp_path)
    if ".cuda()" in block and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; tests/backbones/test_graphs.py has the same for tiny models")
    for words, stand_in in FETCHED.items():
        block = block.replace(words, stand_in)
    exec(block, {})


def test_readme_config_builds(tmp_path: Path) -> None:
    """The config that changes the backbone of one of mmdet's own."""
    mmengine = pytest.importorskip("mmengine", reason='needs mmengine: pip install "subquad[mm]"')
    (block,) = [block for block in _blocks(README, "python") if "_base_" in block]
    (tmp_path / "config.py").write_text(block)
    cfg = mmengine.Config.fromfile(tmp_path / "config.py")
    from subquad.heads.openmmlab.checks import check_model
    from subquad.tools.mm_index import build

    model = build(cfg)
    check_model(model)
    assert model.backbone.model_name == "vmamba_tiny"


def test_readme_lists_every_released_model_as_the_command_does() -> None:
    ours = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("subquad.")]
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", README, re.MULTILINE)
    assert {name for name, _ in rows} == {name for name in ours if not name.startswith("test_")}
    found = models.table([name for name, _ in rows])
    assert models.replace(README, found) == README, "run `subquad models --write README.md`"


def test_readme_lists_every_environment_variable(sources: list[str], root: Path) -> None:
    def variables(names: list[str]) -> set[str]:
        texts = [(root / name).read_text() for name in names if name.endswith(".py")]
        return set(re.findall(r"SUBQUAD_[A-Z_]+", "".join(texts)))

    package = variables([name for name in sources if not name.startswith("tests/")])
    elsewhere = variables([name for name in sources if name.startswith("tests/") and "/packaging/" not in name])
    assert "SUBQUAD_BACKEND" in package
    assert package <= set(re.findall(r"SUBQUAD_[A-Z_]+", README)) <= package | elsewhere


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_documents_exist(document: str, root: Path, sources: list[str]) -> None:
    text = (root / document).read_text()
    paths = re.findall(r"(?<![\w./])((?:ops|backbones|heads|configs|tools|tests)/[\w./-]*\w)(?![\w/]*[<*])", text)
    names = re.findall(r"`([\w.-]+\.(?:md|cff|toml|py))`", text)
    assert len(paths) > 5
    assert [path for path in paths if not (root / path).exists()] == []
    assert set(names) <= {Path(source).name for source in sources}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_pytest_markers_in_documents_exist(document: str, root: Path, pytestconfig: pytest.Config) -> None:
    declared = {line.split(":")[0].strip() for line in pytestconfig.getini("markers")}
    used = set(re.findall(r"pytest -m (\w+)", (root / document).read_text()))
    assert used and used <= declared


def test_one_version_everywhere(root: Path) -> None:
    changelog = re.search(r"^## \[(.+?)\]", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = re.search(r"^version: (.+)$", (root / "CITATION.cff").read_text(), re.MULTILINE)
    assert changelog and changelog[1] == subquad.__version__
    assert citation and citation[1] == subquad.__version__


def test_no_path_of_a_machine(sources: list[str], root: Path) -> None:
    """A path of the machine that something was written on works nowhere else."""
    pattern = re.compile(rf"(?<![\w.$}}~-])/(?:{'|'.join(('home', 'root', 'work', 'tmp', 'Users', 'mnt'))})/\w")
    offences = []
    for name in sources:
        data = (root / name).read_bytes()
        if b"\0" in data[:8192]:
            continue
        for number, line in enumerate(data.decode().splitlines(), 1):
            if pattern.search(line):
                offences.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not offences, "\n" + "\n".join(offences)

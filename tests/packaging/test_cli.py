"""The command line around its subcommands: help, version, errors of the user, exit statuses."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import subquad
from subquad import cli

Run = Callable[[object], None]


@dataclass
class Options:
    """Options of a command made for the tests.

    Attributes:
        count: how often.
    """

    count: int = 1


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Run], None]]:
    """Give ``subquad train`` another body; importing any other subcommand fails."""
    for name in cli.COMMANDS:
        monkeypatch.setitem(sys.modules, f"subquad.tools.{name}", None)

    def install(run: Run) -> None:
        module = ModuleType("subquad.tools.train")
        module.__dict__.update(Options=Options, run=run)
        monkeypatch.setitem(sys.modules, "subquad.tools.train", module)

    yield install


def _raise(error: BaseException) -> Run:
    def run(options: object) -> None:
        raise error

    return run


def test_runs_the_command_with_its_options(command: Callable[[Run], None]) -> None:
    seen: list[object] = []
    command(seen.append)
    assert cli.main(["train", "--count", "3"]) == 0
    assert seen == [Options(count=3)]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("lr must be positive, got -1"),
        TypeError("lr must be a number, got 'fast'"),
        FileNotFoundError("no file weights.pth"),
        ImportError('training needs accelerate: pip install "subquad[train]"'),
    ],
    ids=lambda error: type(error).__name__,
)
def test_error_of_the_user_is_one_line(
    error: Exception, command: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(_raise(error))
    assert cli.main(["train"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"subquad train: error: {error}\n")


def test_error_without_a_message_has_its_name(
    command: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(_raise(ValueError()))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "subquad train: error: ValueError\n"


def test_traceback_on_request(command: Callable[[Run], None]) -> None:
    command(_raise(ValueError("bad value")))
    with pytest.raises(ValueError, match="bad value"):
        cli.main(["--traceback", "train"])


def test_defect_keeps_its_traceback(command: Callable[[Run], None]) -> None:
    command(_raise(ZeroDivisionError("a defect")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


def test_interrupt(command: Callable[[Run], None], capsys: pytest.CaptureFixture[str]) -> None:
    command(_raise(KeyboardInterrupt()))
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "subquad train: interrupted\n"


def test_rejected_option(command: Callable[[Run], None], capsys: pytest.CaptureFixture[str]) -> None:
    command(_raise(AssertionError("must not run")))
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--count", "many"])
    assert stop.value.code == 2
    assert "--count" in "".join(capsys.readouterr())


def test_missing_tyro_names_the_extra(
    command: Callable[[Run], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command(_raise(AssertionError("must not run")))
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert cli.main(["train"]) == 2
    assert 'pip install "subquad[train]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("trian", "did you mean 'train'?"),
        ("exprot", "did you mean 'export'?"),
        ("zzz", "expected one of train, export"),
    ],
)
def test_unknown_command(word: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([word, "--help"])
    assert stop.value.code == 2
    assert f"unknown command '{word}', {expected}" in capsys.readouterr().err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and line in text for name, line in cli.COMMANDS.items())


def test_no_command_prints_the_help_as_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"subquad {name}" in capsys.readouterr().out


def test_every_tool_with_options_is_a_command(root: Path) -> None:
    def has_options(path: Path) -> bool:
        body = ast.parse(path.read_text()).body
        bound = {node.name for node in body if isinstance(node, ast.ClassDef)}
        bound |= {alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
        targets = [t for node in body if isinstance(node, ast.Assign) for t in node.targets]
        targets += [node.target for node in body if isinstance(node, ast.AnnAssign)]
        bound |= {target.id for target in targets if isinstance(target, ast.Name)}
        return "Options" in bound

    assert {path.stem for path in (root / "tools").glob("*.py") if has_options(path)} == set(cli.COMMANDS)


def test_as_a_process() -> None:
    """``python -m subquad``, where the status of ``main`` becomes that of the process."""
    command = [sys.executable, "-m", "subquad", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"subquad {subquad.__version__}\n")


def test_installed_as_a_program() -> None:
    program = Path(sys.executable).with_name("subquad")
    done = subprocess.run(
        [program, "convert", "no-such-file.pth", "--model", "vmamba_tiny"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no-such-file.pth" in done.stderr
    assert "Traceback" not in done.stderr

"""``subquad models``: counts against published ones, and the file that it writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from subquad.tools import models
from subquad.tools.benchmarks.systems import TOP1
from subquad.tools.models import BEGIN, END, Options

# As the authors state them, with one operation for a multiply-add and their own rules for the scan (MzeroMiko/VMamba,
# YuHengsss/MSVMamba); ViG's isotropic model counted by hand, because the authors' counter does not see its MLP.
PUBLISHED_GFLOPS = {
    "vmamba_tiny": 4.9,
    "msvmamba_nano": 0.88,
    "msvmamba_tiny_v2": 5.0,
    "vig_tiny": 1.17,
    "vig_h_tiny": 4.5,
}


@pytest.mark.parametrize(("name", "gflops"), PUBLISHED_GFLOPS.items())
def test_counted_operations_are_near_the_published(name: str, gflops: float) -> None:
    assert models.measure(name).gflops == pytest.approx(gflops, rel=0.04)


def test_table_has_a_part_for_each_paper() -> None:
    table = models.table(["vmamba_tiny", "vig_tiny", "vmamba_tiny_s2l5"])
    first, second = table.split("\n\n**")
    assert first.startswith(
        "**VMamba: Visual State Space Model** ([arXiv 2401.10166](https://arxiv.org/abs/2401.10166)"
    )
    rows = [line.split(" | ") for line in first.splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == ["| `vmamba_tiny`", "| `vmamba_tiny_s2l5`"]
    assert rows[0][1] == "30,249,064" and rows[0][3] == str(TOP1["vmamba_tiny"])
    assert "ViG" in second and "MIT is the licence of the official code" in second


def test_file_gets_the_table_between_its_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "page.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    found = models.run(Options(("test_vim",), file))
    assert file.read_text() == f"before\n{BEGIN}\n\n{found}\n\n{END}\nafter\n"
    assert "`test_vim`" in found and " at 96 px | - | " in found
    again = models.run(Options(("test_vim",), file))
    assert file.read_text().count(again) == 1 and capsys.readouterr().out == ""
    models.run(Options(("test_vim",)))
    assert found in capsys.readouterr().out


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_terminals(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    found = models.run(Options(("test_vim", "test_nat")))
    out, err = capsys.readouterr()
    assert out == f"{found}\n"
    assert err.split("\r\x1b[K") == (
        ["", "counting 1 of 2: test_vim", "counting 2 of 2: test_nat", ""] if terminal else [""]
    )


def test_what_cannot_be_done(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model matches 'resnet\*'"):
        models.run(Options(("resnet*",)))
    (tmp_path / "page.md").write_text("no markers")
    with pytest.raises(ValueError, match=r"no lines .*begin of"):
        models.run(Options(("test_vim",), tmp_path / "page.md"))
    with pytest.raises(FileNotFoundError):
        models.run(Options(("test_vim",), tmp_path / "absent.md"))

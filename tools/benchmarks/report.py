"""What a benchmark leaves behind: a line for each row as it comes, CSV and JSON, a table at the end."""

from __future__ import annotations

import csv
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_UNBROKEN = 1000  # characters: figures that are wrapped to a narrow terminal cannot be read
_CELL_WIDTH = 40


def default_output(kind: str) -> Path:
    """A dated folder below the current one."""
    return Path("runs") / f"benchmark-{kind}-{datetime.now():%Y%m%d-%H%M%S}"


def command_line() -> str:
    """The command of this process, without the folder that its program lies in."""
    program, *rest = sys.argv
    return shlex.join([os.path.basename(program), *rest])


def number(value: object) -> str:
    """Three significant digits for a float; ``-`` for what was not measured."""
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


class Report:
    """Rows of one benchmark; every row is on disk before the next one starts.

    Args:
        output: folder for ``<name>.csv`` and ``<name>.json``; made if missing.
        name: stem of the file names.
        environment: device, versions, ceilings, command.
        columns: names of the row's fields, in order.
        shown: the columns of the terminal table.
        announced: the columns of the line that a row prints as it comes.
    """

    def __init__(
        self,
        output: Path,
        name: str,
        environment: dict[str, Any],
        *,
        columns: Sequence[str],
        shown: Sequence[str],
        announced: Sequence[str],
    ) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self.output = output
        self.rows: list[Row] = []
        self._name = name
        self._environment = environment
        self._columns = columns
        self._shown = shown
        self._announced = announced
        self._file = (output / f"{name}.csv").open("w", newline="", encoding="utf-8")
        self._csv = csv.DictWriter(self._file, columns)
        self._csv.writeheader()
        self._file.flush()

    def add(self, row: Row) -> None:
        """Write a row and print it; fields left out stay empty.

        Raises:
            ValueError: for a field that is not a column.
        """
        self._csv.writerow(row)
        self._file.flush()
        self.rows.append({column: row.get(column) for column in self._columns})
        self._write_json()
        print("  ".join(f"{key}={number(row[key])}" for key in self._announced if row.get(key) is not None), flush=True)

    def close(self, skipped: Sequence[str], legend: str) -> None:
        """Print the table, the legend and what was not run."""
        self._file.close()
        self._write_json()
        print_table(self._shown, self.rows)
        print(legend)
        if skipped:
            print(f"time limit reached, {len(skipped)} not run: {'; '.join(skipped)}")
        failed = [row for row in self.rows if str(row.get("status")).startswith("FAIL")]
        if failed:
            print(f"{len(failed)} of {len(self.rows)} rows FAIL")
        print(f"results: {self.output}", flush=True)

    def _write_json(self) -> None:
        # Through a second name: an interrupted run leaves the last complete file.
        partial = self.output / f"{self._name}.json.part"
        rows = [{key: _finite(value) for key, value in row.items()} for row in self.rows]
        content = {"environment": self._environment, "rows": rows}
        partial.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
        partial.replace(self.output / f"{self._name}.json")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: their names instead."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def print_head(environment: dict[str, Any]) -> None:
    """The first line of a run: device, versions and the ceilings that it measured."""
    facts = environment
    driver = f", driver {facts['driver']}" if "driver" in facts else ""
    exp2 = "not measured (no triton)" if facts["exp2_per_s"] is None else f"{facts['exp2_per_s']:.3g} /s"
    unit = "multiprocessors" if "driver" in facts else "cores"
    machine = f"{facts['device']}, {facts['multiprocessors']} {unit}{driver}"
    software = f"torch {facts['torch']}, triton {facts['triton']}"
    matmul = f"{facts['matmul_dtype']} matmul {facts['matmul_tflop_per_s']:.3g} TFLOP/s"
    copy = f"copy {facts['copy_tb_per_s']:.3g} TB/s"
    print(f"{machine}, {software}; {copy}, {matmul}, exp2 {exp2}", flush=True)


def print_table(columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Print rows under the columns that any of them fills; with rich where it is installed."""
    columns = [column for column in columns if any(row.get(column) is not None for row in rows)]
    cells = [[number(row.get(column))[:_CELL_WIDTH] for column in columns] for row in rows]
    if find_spec("rich") is not None:
        from rich.box import SIMPLE
        from rich.console import Console
        from rich.table import Table

        table = Table(*columns, box=SIMPLE)
        for line in cells:
            table.add_row(*line)
        Console(width=_UNBROKEN).print(table)
        return
    widths = [max(len(cell) for cell in column) for column in zip(columns, *cells, strict=True)]
    for line in [columns, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print('(plain table: pip install "subquad[train]" brings rich)')


def plot(path: Path, curves: dict[str, list[tuple[float, float]]], x: str, y: str) -> None:
    """A PNG with one line per system on logarithmic axes; without matplotlib, a note."""
    if find_spec("matplotlib") is None:
        print('no plot: matplotlib is not installed (pip install "subquad[train]")')
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel=x, ylabel=y)
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    ticks = sorted({point[0] for points in curves.values() for point in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)

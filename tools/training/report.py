"""Metrics of a training run: CSV table, curves, progress bar."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from subquad.tools.training.checkpoints import replacing

if TYPE_CHECKING:
    from rich.progress import Progress


@dataclass(frozen=True)
class EpochMetrics:
    """One row of ``metrics.csv``. Accuracies in [0, 1]; ``epoch`` counts from 1; ``lr`` is the one at its end."""

    epoch: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    lr: float
    seconds: float
    images_per_second: float

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch:3d}  train loss {self.train_loss:.4f}  accuracy {self.train_accuracy:6.2%}  "
            f"val loss {self.val_loss:.4f}  accuracy {self.val_accuracy:6.2%}  "
            f"lr {self.lr:.2e}  {self.seconds:.1f} s  {self.images_per_second:.0f} img/s"
        )


def save_csv(path: Path, rows: Sequence[EpochMetrics]) -> None:
    """Write the table of all epochs."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(EpochMetrics)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def save_curves(path: Path, rows: Sequence[EpochMetrics], title: str) -> None:
    """Draw loss, accuracy and learning rate over the epochs as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    figure.suptitle(title)
    loss, accuracy, rate = figure.subplots(1, 3)
    epochs = [row.epoch for row in rows]
    marker = "o" if len(rows) == 1 else ""
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        for part in ("train", "val"):
            axes.plot(epochs, [getattr(row, f"{part}_{name}") for row in rows], marker=marker, label=part)
        axes.set(xlabel="epoch", title=name)
        axes.legend()
    rate.plot(epochs, [row.lr for row in rows], marker=marker)
    rate.set(xlabel="epoch", title="learning rate")
    for axes in (loss, accuracy, rate):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def progress_bar(visible: bool) -> Progress:
    """A bar over all steps of the run, with the time that is left."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not visible,
    )

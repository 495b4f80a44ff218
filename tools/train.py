"""``subquad train``: fine-tune a model on a folder of images, or on the handwritten digits that come with scikit-learn.

The loop below is all there is of an engine: accelerate brings devices, mixed precision and several processes
(``accelerate launch -m subquad train ...``), timm the models, optimizers, schedules and transforms.

Every epoch ends with one atomic write of ``state.pt``, which holds all that a run needs to go on; the other files are
made from it. All random numbers of an epoch follow from the seed and the epoch's number, so that a run that was killed
and resumed (with as many processes) gives the weights of one that was not.
"""

from __future__ import annotations

import importlib
import math
import os
import shlex
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from subquad.tools.training import checkpoints, report
from subquad.tools.training.data import Batch, load_digits, load_folder
from subquad.tools.training.options import Options, as_json, check_options, complete, continued
from subquad.tools.training.session import Session, build, restore, save

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.progress import Progress

__all__ = ["Options", "Summary", "run"]

_CHECK_LOSS_EVERY = 10  # steps; reading a loss waits for the GPU
_SEED_STRIDE = 100_003  # between epochs; each process adds its rank


@dataclass(frozen=True)
class Summary:
    """What a run has come to. ``load_line`` is Python that builds the best model."""

    output: Path
    best_epoch: int
    best_accuracy: float
    load_line: str


def run(options: Options) -> Summary:
    """Train as ``options`` say; see ``Options``.

    Returns:
        The folder, the best epoch and how to load it.

    Raises:
        ValueError: for options or data that cannot work, before anything is written.
        FileNotFoundError: for a data folder, checkpoint or run that does not exist.
        FloatingPointError: if the loss is not finite; the last epoch's files stay.
        ImportError: if the extra ``train`` is not installed.
    """
    _require_extra()
    options = continued(options) if options.resume else complete(options)
    check_options(options)
    if options.data is None:
        data = load_digits(options.val_fraction, options.seed)
    else:
        data = load_folder(options.data, options.val_fraction, options.seed)

    session = build(options, data)
    main = session.accelerator.is_main_process
    if options.resume:
        restore(session)
    elif main:
        session.output.mkdir(parents=True, exist_ok=True)
        checkpoints.save_json(session.output / checkpoints.OPTIONS, as_json(options))
    if main:
        images = f"{len(data.train.labels)} training and {len(data.val.labels)} validation images"
        print(f"{options.model} on {session.accelerator.device}: {images} of {len(data.classes)} classes")
        print(f"files in {session.output}")
    try:
        with _calm_threads(options, session.accelerator.device):
            _fit(session)
    except KeyboardInterrupt:
        if main:
            print(f"stopped; go on with: subquad train --resume --output {shlex.quote(str(session.output))}")
        raise
    best = session.rows[session.best_epoch - 1]
    summary = Summary(session.output, best.epoch, best.val_accuracy, session.load_line)
    if main:
        print(f"best accuracy {best.val_accuracy:.2%} in epoch {best.epoch}; load it with")
        print(summary.load_line)
    return summary


@contextmanager
def _calm_threads(options: Options, device: torch.device) -> Iterator[None]:
    """One thread for the digits on a CPU, unless OMP_NUM_THREADS asks for others.

    Two threads gain a factor of 1.5 on maps of 8x8 on an idle machine; on a busy one they spin for each other, and an
    epoch was seen to take 50 times as long.
    """
    threads = torch.get_num_threads()
    if options.data is None and device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _require_extra() -> None:
    for name in ("accelerate", "matplotlib", "rich", "sklearn"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f'training needs {name}: pip install "subquad[train]"') from error


def _fit(session: Session) -> None:
    options, main = session.options, session.accelerator.is_main_process
    steps, done = len(session.train_loader), len(session.rows)
    writer = _tensorboard(session) if options.tensorboard and main else None
    with report.progress_bar(visible=main) as progress:
        task = progress.add_task("training", total=options.epochs * steps, completed=done * steps)
        for epoch in range(done + 1, options.epochs + 1):
            start = time.perf_counter()
            train_loss, train_accuracy, images = _train_epoch(session, epoch, progress, task)
            seconds = time.perf_counter() - start
            val_loss, val_accuracy, _ = _evaluate(session)
            row = report.EpochMetrics(
                epoch=epoch,
                train_loss=train_loss,
                train_accuracy=train_accuracy,
                val_loss=val_loss,
                val_accuracy=val_accuracy,
                lr=max(group["lr"] for group in session.optimizer.param_groups),
                seconds=time.perf_counter() - start,
                images_per_second=images / seconds,
            )
            session.rows.append(row)
            if session.best_epoch == 0 or val_accuracy > session.rows[session.best_epoch - 1].val_accuracy:
                session.best_epoch = epoch
            if main:
                save(session)
                progress.console.print(str(row), highlight=False, soft_wrap=True)
            if writer is not None:
                for name, value in asdict(row).items():
                    writer.add_scalar(name, value, epoch)
    if writer is not None:
        writer.close()


def _train_epoch(session: Session, epoch: int, progress: Progress, task: Any) -> tuple[float, float, float]:
    """One pass over the training set: mean loss, accuracy (of the unmixed labels), number of images."""
    from accelerate.utils import set_seed

    options, accelerator, model = session.options, session.accelerator, session.model
    set_seed((options.seed + epoch * _SEED_STRIDE) % 2**31, device_specific=True)
    session.train_loader.set_epoch(epoch)
    criterion = nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)
    totals = torch.zeros(3, device=accelerator.device)
    losses: list[Tensor] = []
    model.train()
    for step, batch in enumerate(session.train_loader, start=1):
        progress.update(task, advance=1, description=f"epoch {epoch}/{options.epochs}")
        _report_broken(session, batch)
        if len(batch.labels) == 0:
            if accelerator.num_processes > 1:  # the other processes wait for this one's gradients
                raise ValueError(f"none of the {len(batch.broken)} images of a batch could be read")
            continue
        images, targets = (batch.images, batch.labels) if session.mix is None else session.mix(*batch[:2])
        with accelerator.accumulate(model):
            logits = model(images)
            loss = criterion(logits, targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients and options.clip_grad is not None:
                accelerator.clip_grad_norm_(model.parameters(), options.clip_grad)
            session.optimizer.step()
            session.optimizer.zero_grad()
        if accelerator.sync_gradients:
            session.updates += 1
            session.scheduler.step_update(session.updates)
            if session.ema is not None:
                session.ema.update(session.net, step=session.updates)
        totals += _count(loss.detach(), logits.detach(), batch.labels)
        losses.append(loss.detach())
        if step % _CHECK_LOSS_EVERY == 0 or step == len(session.train_loader):
            _check_finite(losses, epoch, step)
            losses.clear()
    return _means(accelerator, totals, "training")


@torch.no_grad()
def _evaluate(session: Session) -> tuple[float, float, float]:
    """Mean loss, accuracy and number of validation images; each image that can be read counts once."""
    accelerator, model = session.accelerator, session.evaluated
    totals = torch.zeros(3, device=accelerator.device)
    model.eval()
    for batch in session.val_loader:
        _report_broken(session, batch)
        if len(batch.labels) > 0:
            labels = batch.labels.to(accelerator.device)
            with accelerator.autocast():
                logits = model(batch.images.to(accelerator.device)).float()
            totals += _count(nn.functional.cross_entropy(logits, labels), logits, labels)
    return _means(accelerator, totals, "validation")


def _count(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the losses, right answers and images of a batch."""
    right = (logits.argmax(dim=1) == labels).sum()
    return torch.stack([loss.float() * len(labels), right.float(), torch.full_like(right, len(labels)).float()])


def _means(accelerator: Accelerator, totals: Tensor, name: str) -> tuple[float, float, float]:
    loss, right, images = accelerator.reduce(totals, reduction="sum").tolist()
    if images == 0:
        raise ValueError(f"none of the {name} images could be read")
    return loss / images, right / images, images


def _check_finite(losses: list[Tensor], epoch: int, step: int) -> None:
    for index, value in enumerate(torch.stack(losses).tolist() if losses else []):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} in epoch {epoch}, step {step - len(losses) + 1 + index}; the files keep the "
                f"state of epoch {epoch - 1}. A new run with a smaller lr or clip_grad, or without fp16, may do better"
            )


def _report_broken(session: Session, batch: Batch) -> None:
    for line in batch.broken:
        if line not in session.reported:
            session.reported.add(line)
            warnings.warn(f"skipped a broken image, {line}", stacklevel=2)


def _tensorboard(session: Session) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError('tensorboard is not installed: pip install "subquad[train]"') from error
    return SummaryWriter(session.output / "tensorboard", purge_step=len(session.rows) + 1)

"""A training run in memory: built from options and data, saved, restored."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import timm.data
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

from subquad.backbones import weights
from subquad.tools.training import checkpoints, report
from subquad.tools.training.data import Batch, ImageData, ImageSet, build_transforms, collate
from subquad.tools.training.options import RUNS, Options

if TYPE_CHECKING:
    from accelerate import Accelerator

_DIGITS_SIZE = 32


@dataclass
class Session:
    """A run at work: ``net`` is the model itself, ``model`` what accelerate made of it."""

    options: Options
    accelerator: Accelerator
    output: Path
    net: nn.Module
    model: nn.Module
    optimizer: Any
    scheduler: Any
    ema: ModelEmaV3 | None
    train_loader: Any
    val_loader: DataLoader[Batch]
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None
    load_line: str
    updates: int = 0
    best_epoch: int = 0
    rows: list[report.EpochMetrics] = field(default_factory=list)
    reported: set[str] = field(default_factory=set)

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are validated and saved: the average where there is one."""
        return self.net if self.ema is None else self.ema.module


def build(options: Options, data: ImageData) -> Session:
    """Make the model and all that trains it; writes nothing."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DataLoaderConfiguration, broadcast_object_list, set_seed

    AcceleratorState._reset_state()  # it keeps the precision of the first run in a process, and refuses another
    accelerator = Accelerator(
        mixed_precision=options.amp,
        gradient_accumulation_steps=options.grad_accumulation,
        step_scheduler_with_optimizer=False,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=options.seed, non_blocking=True),
    )
    set_seed(options.seed)
    net, kwargs = _build_model(options, len(data.classes), data.digits)
    net.to(accelerator.device)
    output = [options.output or RUNS / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{options.model}".replace("/", "-")]
    broadcast_object_list(output)

    train_loader, val_loader = _build_loaders(options, data, net, accelerator)
    optimizer = create_optimizer_v2(
        net, options.opt, lr=options.lr, weight_decay=options.weight_decay, layer_decay=options.layer_decay
    )
    ema = ModelEmaV3(net, decay=options.ema, use_warmup=True) if options.ema is not None else None
    model, prepared, train_loader = accelerator.prepare(net, optimizer, train_loader)
    # "linear" is the polynomial of power 1, "constant" steps of factor 1: decay_rate is both for timm.
    scheduler, _ = create_scheduler_v2(
        optimizer,
        {"cosine": "cosine", "linear": "poly", "constant": "step"}[options.sched],
        num_epochs=options.epochs,
        decay_rate=1.0,
        min_lr=options.lr / 100,
        warmup_lr=options.lr / 100,
        warmup_epochs=options.warmup_epochs,  # type: ignore[arg-type]
        step_on_epochs=False,
        updates_per_epoch=math.ceil(len(train_loader) / options.grad_accumulation),
    )
    mixes = [
        mix(alpha=alpha, num_classes=len(data.classes))
        for mix, alpha in ((v2.MixUp, options.mixup), (v2.CutMix, options.cutmix))
        if alpha > 0
    ]
    best = str(output[0].resolve() / checkpoints.BEST)
    arguments = ", ".join(f"{name}={value!r}" for name, value in (kwargs | {"checkpoint_path": best}).items())
    return Session(
        options=options,
        accelerator=accelerator,
        output=output[0],
        net=net,
        model=model,
        optimizer=prepared,
        scheduler=scheduler,
        ema=ema,
        train_loader=train_loader,
        val_loader=val_loader,
        mix=v2.RandomChoice(mixes) if mixes else None,
        load_line=f"import subquad, timm; model = timm.create_model({options.model!r}, {arguments})",
    )


def _build_model(options: Options, num_classes: int, digits: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The model to train, and the arguments that make its like."""
    name = str(options.model)
    size = options.image_size or (_DIGITS_SIZE if digits else None)
    kwargs: dict[str, Any] = {"num_classes": num_classes}
    cfg = None if ":" in name else timm.get_pretrained_cfg(name)
    if size is not None and cfg is not None and cfg.fixed_input_size:
        kwargs["img_size"] = size
    net = timm.create_model(name, pretrained=options.pretrained, drop_path_rate=options.drop_path_rate, **kwargs)
    if options.checkpoint is not None:
        load_weights(net, options.checkpoint)
    feature_info = getattr(net, "feature_info", None)
    reduction = feature_info[-1]["reduction"] if isinstance(feature_info, list) and feature_info else 1
    if size is not None and size < reduction:
        raise ValueError(f"image_size {size} is too small for {name}, whose last map has 1/{reduction} of the pixels")
    return net, kwargs


def load_weights(net: nn.Module, path: Path) -> None:
    """Load a checkpoint, official or ours, executing nothing in it; a classifier for other classes keeps its start.

    Raises:
        ValueError: if the file cannot be read, or anything but the classifier does not fit.
    """
    checkpoint = weights.read_checkpoint(path)
    try:
        state_dict = weights.unwrap(checkpoint, weights.wrapper_for(net, checkpoint))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if type(net).__module__.startswith("subquad."):
        state_dict = weights.filter_of(net)(state_dict, net)
    expected = net.state_dict()
    difference = weights.compare(state_dict, expected)
    heads = net.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    heads = (heads,) if isinstance(heads, str) else heads
    for name in [name for name in difference.misshaped if name.rpartition(".")[0] in heads]:
        state_dict[name] = expected[name]
    if difference := weights.compare(state_dict, expected):
        raise ValueError(f"{str(path)!r} does not fit {type(net).__name__}:\n{difference}")
    net.load_state_dict(state_dict)


def _build_loaders(
    options: Options, data: ImageData, net: nn.Module, accelerator: Accelerator
) -> tuple[DataLoader[Batch], DataLoader[Batch]]:
    config = timm.data.resolve_model_data_config(net)
    size = options.image_size or (_DIGITS_SIZE if data.digits else config["input_size"][-1])
    train_transform, val_transform = build_transforms(size, options.aug, config, digits=data.digits)
    workers = options.workers if options.workers is not None else 0 if data.digits else min(8, os.cpu_count() or 1)
    # Workers start anew each epoch: their random numbers then depend on the epoch's seed alone.
    common: dict[str, Any] = {
        "batch_size": options.batch_size,
        "num_workers": workers,
        "collate_fn": collate,
        "pin_memory": accelerator.device.type == "cuda",
    }
    train_set = ImageSet(data.train, train_transform)
    # The last, smaller batch is left out, but not where it is the only one.
    drop_last = len(train_set) >= options.batch_size * accelerator.num_processes
    train_loader = DataLoader(train_set, shuffle=True, drop_last=drop_last, **common)
    # Each process validates its own part: accelerate would repeat images to make the parts equal.
    mine = range(accelerator.process_index, len(data.val.labels), accelerator.num_processes)
    val_loader = DataLoader(Subset(ImageSet(data.val, val_transform), mine), **common)
    return train_loader, val_loader


# Saving and restoring ----------------------------------------------------------------------------------------------


def save(session: Session) -> None:
    """Write all files of the run: the state in one piece first, then what is made from it."""
    scaler = session.accelerator.scaler
    checkpoints.save_state(
        session.output,
        {
            "model": session.net.state_dict(),
            "ema": None if session.ema is None else session.ema.module.state_dict(),
            "optimizer": session.optimizer.state_dict(),
            "scheduler": session.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "updates": session.updates,
            "best_epoch": session.best_epoch,
            "metrics": [asdict(row) for row in session.rows],
        },
    )
    _publish(session)


def _publish(session: Session) -> None:
    """Write what is made from the state. After an interruption between the two, resuming makes up for it."""
    state_dict = session.evaluated.state_dict()
    if session.best_epoch == len(session.rows):
        checkpoints.save_weights(session.output / checkpoints.BEST, state_dict)
    checkpoints.save_weights(session.output / checkpoints.LAST, state_dict)
    report.save_csv(session.output / checkpoints.METRICS, session.rows)
    report.save_curves(session.output / checkpoints.CURVES, session.rows, str(session.options.model))
    checkpoints.save_text(session.output / checkpoints.LOAD, session.load_line)


def restore(session: Session) -> None:
    """Bring a freshly built session to the last complete epoch of the run in its folder, if there is one."""
    state = checkpoints.load_state(session.output)
    if state is None:
        return
    try:
        session.net.load_state_dict(state["model"])
        if session.ema is not None:
            session.ema.module.load_state_dict(state["ema"])
        session.optimizer.load_state_dict(state["optimizer"])
        session.scheduler.load_state_dict(state["scheduler"])
        if session.accelerator.scaler is not None and state["scaler"] is not None:
            session.accelerator.scaler.load_state_dict(state["scaler"])
        session.updates, session.best_epoch = state["updates"], state["best_epoch"]
        session.rows = [report.EpochMetrics(**row) for row in state["metrics"]]
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"the state in {str(session.output)!r} does not fit {session.options.model}: {error}"
        ) from error
    if session.accelerator.is_main_process:
        _publish(session)

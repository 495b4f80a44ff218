"""Options of ``subquad train``: what they are, which are refused, and how a run keeps them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch

from subquad.backbones.registry import check_any_model
from subquad.tools.training import checkpoints
from subquad.tools.training.data import Augmentation

RUNS = Path("runs")
"""Where runs without ``--output`` go."""

_DIGITS_MODEL, _FOLDER_MODEL = "test_vmamba", "vmamba_tiny"
_PATHS = ("data", "checkpoint")
_NOT_KEPT = ("output", "resume")


@dataclass(frozen=True)
class Options:
    """Fine-tune a model on images; one folder gets weights, the line that loads them, state, metrics and curves.

    Runs on a GPU where there is one; on several with ``accelerate launch -m subquad train ...``.
    """

    data: Path | None = None
    """Folder with train/CLASS/* and val/CLASS/*, or with CLASS/* to be split. Default: scikit-learn's digits."""
    model: str | None = None
    """Any timm model. Default: test_vmamba for the digits, vmamba_tiny for a folder."""
    pretrained: bool = False
    """Start from the model's released weights (downloaded)."""
    checkpoint: Path | None = None
    """Start from this file: official, ours, or of an earlier run. A head for other classes is left out."""
    output: Path | None = None
    """Folder of the run. Default: runs/DATE_TIME_MODEL."""
    resume: bool = False
    """Go on with the run in --output (default: the newest in runs/) with the options it was started with.
    Another value for one of them is refused; but an option's default counts as not given, and is ignored."""

    epochs: int = 12
    batch_size: int = 64
    """Images a step and process."""
    lr: float = 2e-3
    """Highest learning rate."""
    weight_decay: float = 0.05
    opt: Literal["adamw", "sgd", "lamb", "lion"] = "adamw"
    sched: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up, step by step."""
    warmup_epochs: float = 0.5
    layer_decay: float | None = None
    """Factor on the learning rate from each layer to the one before it, such as 0.75."""
    clip_grad: float | None = 1.0
    """Largest norm of the gradient."""
    grad_accumulation: int = 1
    """Steps that are added up to one update."""

    image_size: int | None = None
    """Height and width in pixels. Default: 32 for the digits, else the model's own."""
    aug: Augmentation = "light"
    """light: random crop and flip (digits: no flip); heavy: also RandAugment and random erasing."""
    mixup: float = 0.0
    """Alpha of mixup, 0 for none."""
    cutmix: float = 0.0
    """Alpha of CutMix, 0 for none."""
    label_smoothing: float = 0.0
    drop_path_rate: float | None = None
    """Stochastic depth. Default: the model's own."""
    ema: float | None = None
    """Decay of an average of the weights, such as 0.9998; it is then what is validated and saved."""

    val_fraction: float = 0.2
    """Part of each class that is held out where the data has no validation folder."""
    seed: int = 0
    amp: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision."""
    workers: int | None = None
    """Processes that read images. Default: 0 for the digits, else one a core, at most 8. May change with --resume."""
    tensorboard: bool = False
    """Also write event files for TensorBoard."""


def complete(options: Options) -> Options:
    """Fill in the default model, and make the paths that a run keeps independent of the working directory."""
    model = options.model or (_DIGITS_MODEL if options.data is None else _FOLDER_MODEL)
    data, checkpoint = (path and path.resolve() for path in (options.data, options.checkpoint))
    return replace(options, model=model, data=data, checkpoint=checkpoint)


def check_options(options: Options) -> None:
    """Raise ValueError or FileNotFoundError, with the value and what was expected, for options that cannot work."""
    at_least = {"epochs": 1, "batch_size": 1, "grad_accumulation": 1, "seed": 0, "workers": 0, "warmup_epochs": 0}
    at_least |= {"weight_decay": 0, "mixup": 0, "cutmix": 0, "image_size": 1}
    for name, least in at_least.items():
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value >= least):
            raise ValueError(f"{name} must be at least {least}, got {value}")
    for name in ("lr", "clip_grad"):
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive, got {value}")
    for name in ("label_smoothing", "drop_path_rate"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")
    for name in ("val_fraction", "ema"):
        value = getattr(options, name)
        if value is not None and not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
    if options.layer_decay is not None and not 0 < options.layer_decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {options.layer_decay}")
    if options.warmup_epochs >= options.epochs:
        raise ValueError(f"warmup_epochs must be less than the {options.epochs} epochs, got {options.warmup_epochs}")
    for name, hint in get_type_hints(Options).items():
        choices = get_args(hint)
        if choices and isinstance(choices[0], str) and getattr(options, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(options, name)!r}")
    if options.amp == "fp16" and not torch.cuda.is_available():
        raise ValueError("amp fp16 needs a GPU; bf16 also works on a CPU")
    _check_start(options)


def _check_start(options: Options) -> None:
    if options.pretrained and options.checkpoint is not None:
        raise ValueError("pretrained and checkpoint exclude each other: both say where to start from")
    check_any_model(str(options.model), options.pretrained)
    if options.checkpoint is not None and not options.checkpoint.is_file():
        wrong = "is no file" if options.checkpoint.exists() else "does not exist"
        raise FileNotFoundError(f"checkpoint {str(options.checkpoint)!r} {wrong}")
    if options.output is not None and not options.resume:
        if options.output.exists() and not options.output.is_dir():
            raise ValueError(f"output {str(options.output)!r} is not a folder")
        if (options.output / checkpoints.OPTIONS).exists():
            raise ValueError(
                f"{str(options.output)!r} already holds a run: go on with it with --resume, or choose another --output"
            )


def as_json(options: Options) -> dict[str, Any]:
    """The options that belong to the run, as JSON holds them."""
    kept = {name: value for name, value in asdict(options).items() if name not in _NOT_KEPT}
    return kept | {name: str(kept[name]) for name in _PATHS if kept[name] is not None}


def continued(options: Options) -> Options:
    """The options of the run to resume; others that were given with ``--resume`` must agree with them.

    A value that is an option's default cannot be told from one that was not given, and is ignored. Where the run has a
    state, its start (``pretrained`` or ``checkpoint``) is left out: the state replaces it, and it may be gone.

    Raises:
        FileNotFoundError: if there is no run to resume.
        ValueError: for options that differ, or a file that does not hold options.
    """
    output = options.output
    if output is None:
        found = sorted(RUNS.glob(f"*/{checkpoints.OPTIONS}"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise FileNotFoundError(f"no run to resume in {str(RUNS)!r}: say which one with --output")
        output = found[-1].parent
    path = output / checkpoints.OPTIONS
    if not path.is_file():
        raise FileNotFoundError(f"no run to resume in {str(output)!r}: it has no {checkpoints.OPTIONS}")
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        kept |= {name: Path(kept[name]) for name in _PATHS if kept.get(name) is not None}
        stored = Options(**kept, output=output, resume=True)
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} does not hold the options of a run: {error}") from error
    if options.workers is not None:  # the one option that may change: the machine may have
        stored = replace(stored, workers=options.workers)
    for option in fields(Options):
        given, value = getattr(options, option.name), getattr(stored, option.name)
        same = given.resolve() == value.resolve() if given and value and option.name in _PATHS else given == value
        if option.name not in _NOT_KEPT and given != option.default and not same:
            raise ValueError(
                f"{option.name} was {value} when the run in {str(output)!r} started and cannot become {given}: leave "
                f"it out, or start a new run with --checkpoint {str(output / checkpoints.LAST)!r}"
            )
    if (output / checkpoints.STATE).exists():
        return replace(stored, pretrained=False, checkpoint=None)
    return stored

"""``subquad mm_train``: train or test a detector or segmentor of OpenMMLab by config, on mmengine's Runner.

Also ``python -m subquad.tools.mm_train CONFIG``, and on several GPUs
``torchrun --nproc-per-node 8 -m subquad.tools.mm_train CONFIG --launcher pytorch``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch

from subquad import configs
from subquad.tools.openmmlab import smoke

with suppress(ImportError):  # only the command line reads the annotations, and it cannot run without tyro
    from tyro.conf import Positional, arg

_WARM_UP = 5  # iterations whose time does not count


@dataclass(frozen=True)
class Options:
    """Train or test a detector or segmentor of MMDetection or MMSegmentation, by config."""

    config: Positional[str]
    """A file, or the name of a config that comes with subquad: mmdet/vmamba/mask-rcnn_vmamba-tiny_fpn_1x_coco.py."""
    work_dir: Path | None = None
    """Folder for logs and checkpoints. Default: work_dirs/NAME_OF_THE_CONFIG, with -smoke behind it for a smoke run."""
    resume: bool = False
    """Go on from the newest checkpoint in the work_dir."""
    load_from: str | None = None
    """Start from the weights of a whole detector or segmentor, a file or URL: an official one, or of an earlier run."""
    test: str | None = None
    """Only test these weights, a file or URL: an official checkpoint, or one of an earlier run."""
    amp: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision, on a GPU."""
    launcher: Literal["none", "pytorch", "slurm", "mpi"] = "none"
    """How the processes were started; pytorch with torchrun."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share the model."""
    cfg_options: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...")] = ()
    """Changes of the config, such as train_dataloader.batch_size=4."""
    smoke: bool = False
    """Try the config on made data with random weights: small images and few proposals, two iterations."""
    full_size: bool = False
    """With --smoke: keep the config's image sizes and proposals."""
    iterations: int = 2
    """With --smoke: how many."""


class Summary(NamedTuple):
    """Of a run.

    Attributes:
        work_dir: where logs and checkpoints are.
        losses: of each iteration of a smoke run, the mean of all processes; empty otherwise.
        metrics: of the last validation or of the test.
        images_per_second: of a smoke run on all processes, NaN for fewer than six iterations.
        peak_memory: largest allocation on the GPU in an iteration of a smoke run's training in MiB, 0 without a GPU.
    """

    work_dir: Path
    losses: list[float]
    metrics: dict[str, float]
    images_per_second: float
    peak_memory: float


def run(options: Options) -> Summary:
    """Read the config, check it, train or test; a smoke run prints losses, speed and memory.

    Raises:
        FileNotFoundError: no such config, checkpoint, annotation file or image.
        ValueError: a config or data that cannot work; see ``subquad.heads.openmmlab.checks``.
        FloatingPointError: a loss of a smoke run is not finite.
    """
    _check(options)
    import_module("subquad.heads.openmmlab")  # before anything of mmdet; names the extra if mmengine is not there
    from mmengine.registry import RUNNERS, init_default_scope
    from mmengine.runner import Runner

    cfg = load(options)
    if options.resume and not Path(cfg.work_dir, "last_checkpoint").is_file():
        raise FileNotFoundError(f"nothing to resume in {cfg.work_dir!r}: it has no last_checkpoint")
    init_default_scope(cfg.get("default_scope", "mmengine"))
    if options.smoke:
        smoke.shrink(cfg, Path(cfg.work_dir) / "smoke", options.iterations, options.full_size)
    datasets = _datasets(cfg, ("train", "val") if options.test is None else ("test",))
    _check_annotation_files(datasets)
    runner = RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
    if options.strategy == "fsdp":
        _prepare_before_sharding(runner)
    memory = smoke.peak_memory_hook()
    runner.register_hook(memory)
    with _named_data_errors(datasets):
        if options.test is not None:
            return Summary(Path(cfg.work_dir), [], runner.test(), math.nan, 0.0)
        runner.train()
    if not options.smoke:
        return Summary(Path(cfg.work_dir), [], _metrics(runner), math.nan, 0.0)
    summary = _summary(runner, cfg, memory.peak)
    _report(summary)
    return summary


def load(options: Options) -> Any:
    """The config with what the options change, as ``mmengine.Config``."""
    from mmengine.config import Config, DictAction

    path = Path(options.config)
    cfg = Config.fromfile(path if path.is_file() else configs.path(options.config))
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="*", action=DictAction, default={})
    cfg.merge_from_dict(parser.parse_args(["--cfg-options", *options.cfg_options]).cfg_options)
    # What a smoke run leaves is not to be resumed by a real one.
    name = f"{path.stem}-smoke" if options.smoke else path.stem
    cfg.work_dir = str(options.work_dir or cfg.get("work_dir") or Path("work_dirs") / name)
    cfg.launcher = options.launcher
    cfg.resume = options.resume or cfg.get("resume", False)
    weights = options.test or options.load_from
    if weights is not None:
        cfg.load_from = weights
    backbone = cfg.model.get("backbone", {})
    if (weights is not None or cfg.resume) and backbone.get("type") == "SubquadBackbone":
        backbone.update(pretrained=False, checkpoint=None)  # nothing to download for weights that are replaced
    hooks = list(cfg.get("custom_hooks") or [])
    if not any(hook["type"] == "SubquadChecks" for hook in hooks):
        cfg.custom_hooks = [*hooks, {"type": "SubquadChecks"}]
    if options.amp != "no":
        # With a scale of 1 the scaler leaves bfloat16 alone, which needs none.
        dtype, scale = ("bfloat16", 1.0) if options.amp == "bf16" else ("float16", "dynamic")
        cfg.optim_wrapper.update(type="AmpOptimWrapper", dtype=dtype, loss_scale=scale)
    if options.strategy == "fsdp":
        cfg.runner_type = "FlexibleRunner"
        wrapper = {"use_orig_params": True, "auto_wrap_policy": "subquad_blocks"}
        cfg.strategy = {"type": "SubquadFSDPStrategy", "model_wrapper": wrapper, "state_dict_cfg": "full"}
    return cfg


def _prepare_before_sharding(runner: Any) -> None:
    """Check the model, and load weights, while it is whole: FSDP would drop those that do not fit."""
    from mmengine.runner import find_latest_checkpoint
    from mmengine.runner.checkpoint import load_checkpoint

    from subquad.heads.openmmlab.checks import SubquadChecks, check_model

    runner.model = runner.strategy.build_model(runner.model)
    if any(isinstance(hook, SubquadChecks) and hook.model for hook in runner.hooks):
        check_model(runner.model)
    path = runner._load_from or (find_latest_checkpoint(runner.work_dir) if runner._resume else None)
    if path is None:
        return
    runner.model.init_weights()  # here, because it does nothing when FlexibleRunner calls it again
    load_checkpoint(runner.model, path, map_location="cpu")
    if not runner._resume:
        runner._load_from = None


def _check(options: Options) -> None:
    if options.amp != "no" and not torch.cuda.is_available():
        raise ValueError(f"amp {options.amp} needs a GPU")
    if options.iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {options.iterations}")
    for path in (options.test, options.load_from):
        if path is not None and "://" not in path and not Path(path).is_file():
            raise FileNotFoundError(f"checkpoint {path!r} does not exist")
    if sum(map(bool, (options.resume, options.load_from, options.test))) > 1:
        raise ValueError("resume, load_from and test exclude each other: each says which weights to take")
    if options.test and options.amp != "no":
        raise ValueError(f"amp {options.amp} is for training; tests run in the precision of the weights")
    if not options.smoke and (options.full_size or options.iterations != Options.iterations):
        raise ValueError("full_size and iterations go with smoke")
    if wrong := [word for word in options.cfg_options if "=" not in word]:
        raise ValueError(f"cfg_options must be KEY=VALUE, got {wrong[0]!r}")


def _datasets(cfg: Any, modes: Sequence[str]) -> list[Any]:
    """Configs of the data sets that a run reads, also those inside of wrappers."""
    loaders = [cfg.get(f"{mode}_dataloader") for mode in modes]
    parts = smoke.dicts([loader.dataset for loader in loaders if loader])
    return [part for part in parts if part.keys() & {"ann_file", "data_root"}]


def _check_annotation_files(datasets: Sequence[Any]) -> None:
    """Raise an error that names a file of annotations that is missing, empty or not JSON."""
    for part in datasets:
        path = os.path.join(part.get("data_root") or "", part.get("ann_file") or "")
        if not path.endswith(".json") or "://" in path:
            continue
        if not os.path.isfile(path):
            raise FileNotFoundError(f"annotation file {path!r} does not exist")
        with open(path, "rb") as file:
            start = file.read(64).lstrip()
        if not start.startswith((b"{", b"[")):
            raise ValueError(f"annotation file {path!r} is {'not JSON' if start else 'empty'}")


@contextmanager
def _named_data_errors(datasets: Sequence[Any]) -> Iterator[None]:
    """Errors of the data sets' readers say what is wrong, but not with which file, or what it means."""
    where = ", ".join(sorted({str(part.get("ann_file") or part.get("data_root")) for part in datasets}))
    try:
        yield
    except json.JSONDecodeError as error:
        raise ValueError(f"one of the annotation files {where} is not JSON: {error}") from error
    except ValueError as error:
        if "need at least one array to concatenate" not in str(error):  # mmengine packs no images
            raise
        raise ValueError(f"no images with annotations in one of the data sets {where}") from error


def _metrics(runner: Any) -> dict[str, float]:
    return {
        name.removeprefix("val/"): float(buffer.current())
        for name, buffer in runner.message_hub.log_scalars.items()
        if name.startswith("val/") and not name.endswith("time")
    }


def _summary(runner: Any, cfg: Any, peak_memory: float) -> Summary:
    from mmengine.dist import all_reduce, get_world_size

    scalars = runner.message_hub.log_scalars
    losses, seconds = (torch.tensor(scalars[name].data[0]) for name in ("train/loss", "train/time"))
    all_reduce(losses, "mean")
    seconds = seconds[_WARM_UP:]
    images = cfg.train_dataloader.batch_size * get_world_size() * len(seconds)
    speed = images / seconds.sum().item() if len(seconds) else math.nan
    return Summary(Path(cfg.work_dir), losses.tolist(), _metrics(runner), speed, peak_memory)


def _report(summary: Summary) -> None:
    """Print a line and write ``smoke.json``."""
    from mmengine.dist import is_main_process

    if is_main_process():
        record = summary._asdict() | {"work_dir": str(summary.work_dir)}
        if math.isnan(summary.images_per_second):  # JSON has no such number
            del record["images_per_second"]
        (summary.work_dir / "smoke.json").write_text(json.dumps(record, indent=1))
        first, last = summary.losses[0], summary.losses[-1]
        speed = "" if math.isnan(summary.images_per_second) else f", {summary.images_per_second:.3g} images/s"
        memory = f", peak memory {summary.peak_memory:,.0f} MiB" if summary.peak_memory else ""
        print(f"smoke: {len(summary.losses)} iterations, loss {first:.4g} to {last:.4g}{speed}{memory}")
    if not all(map(math.isfinite, summary.losses)):
        raise FloatingPointError(f"losses of the smoke run are not finite: {summary.losses}")


if __name__ == "__main__":
    from subquad.cli import main

    sys.exit(main(["mm_train", *sys.argv[1:]]))

"""A run of any detection or segmentation config on small made data: ``--smoke``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

IMAGES = {"train": 8, "val": 2}
_MODES = {"train": "train", "val": "val", "test": "val"}  # and the images that each uses
SHRINK = 8
"""Factor by which image sizes of the pipelines fall."""
_LARGEST = {"nms_pre": 100, "max_per_img": 20, "num": 16}
"""Numbers of proposals, detections and samples of a small run."""
_SIZES = {"scale", "scales", "crop_size", "size", "stride"}
_COLORS = ((220, 60, 60), (60, 200, 80), (70, 90, 230))


def make_coco(
    folder: Path,
    size: tuple[int, int],
    names: tuple[str, ...],
    images: int,
    seed: int = 0,
    kinds: int = len(_COLORS),
) -> Path:
    """Noise with coloured rectangles and ellipses, of a category for each colour, in COCO's format.

    Args:
        folder: gets ``images/*.png`` and ``annotations.json``.
        size: width and height.
        names: of the categories, the data set's classes.
        kinds: objects are of so many of the first categories, at most three.

    Returns:
        The annotation file.
    """
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(images):
        picture = _noise(rng, size)
        draw = ImageDraw.Draw(picture)
        for kind, box in _boxes(rng, size, kinds):
            outline = _draw(draw, kind, box)
            x1, y1, x2, y2 = box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": kind + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "segmentation": [outline],
                    "iscrowd": 0,
                }
            )
        name = f"{number:04d}.png"
        picture.save(folder / "images" / name)
        records.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    path = folder / "annotations.json"
    path.write_text(json.dumps({"info": {}, "images": records, "annotations": annotations, "categories": categories}))
    return path


def make_ade(folder: Path, size: tuple[int, int], images: int, seed: int = 0, kinds: int = len(_COLORS)) -> Path:
    """The same pictures with label maps in ADE20K's format: 0 unlabelled, 1 background, 2 to 4 by colour.

    With ``kinds`` 0 all is background.

    Args:
        folder: gets ``images/*.jpg`` and ``annotations/*.png``.
        size: width and height.
        kinds: objects are of so many colours, at most three.

    Returns:
        ``folder``.
    """
    rng = np.random.default_rng(seed)
    for name in ("images", "annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(images):
        picture, labels = _noise(rng, size), Image.new("L", size, 1)
        draw, draw_labels = ImageDraw.Draw(picture), ImageDraw.Draw(labels)
        draw_labels.rectangle((0, 0, size[0], 2), fill=0)
        for kind, box in _boxes(rng, size, kinds):
            _draw(draw, kind, box)
            _draw(draw_labels, kind, box, fill=kind + 2)
        picture.save(folder / "images" / f"{number:04d}.jpg", quality=95)
        labels.save(folder / "annotations" / f"{number:04d}.png")
    return folder


def _noise(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    coarse = rng.integers(90, 160, (max(1, size[1] // 8), max(1, size[0] // 8), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR)


def _boxes(
    rng: np.random.Generator, size: tuple[int, int], kinds: int
) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
    """Category and corners of one to three objects of a quarter to a half of the picture's sides."""
    for _ in range(rng.integers(1, 4) if kinds else 0):
        width, height = (int(rng.uniform(0.25, 0.5) * side) for side in size)
        x, y = int(rng.integers(0, size[0] - width)), int(rng.integers(0, size[1] - height))
        yield int(rng.integers(kinds)), (x, y, x + width, y + height)


def _draw(draw: Any, kind: int, box: tuple[int, int, int, int], fill: Any = None) -> list[float]:
    """Draw an object, a rectangle or, for the second category, an ellipse; returns its outline as a polygon."""
    fill = _COLORS[kind] if fill is None else fill
    x1, y1, x2, y2 = box
    if kind != 1:
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=fill)
        return [x1, y1, x2, y1, x2, y2, x1, y2]
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    outline = np.stack([(x1 + x2 + (x2 - x1) * np.cos(angles)) / 2, (y1 + y2 + (y2 - y1) * np.sin(angles)) / 2], axis=1)
    draw.polygon([tuple(point) for point in outline.tolist()], fill=fill)
    return outline.flatten().tolist()


# The config ----------------------------------------------------------------------------------------------------


def shrink(cfg: Any, folder: Path, iterations: int, full_size: bool) -> None:
    """Change a config in place: made data, random weights, ``iterations`` at a constant rate, one validation.

    Args:
        cfg: an ``mmengine.Config`` of scope mmdet or mmseg.
        folder: for the data.
        full_size: keep the config's image sizes and numbers of proposals; else both become small.

    Raises:
        ValueError: for a config of another scope.
    """
    scope = cfg.get("default_scope")
    if scope not in ("mmdet", "mmseg"):
        raise ValueError(f"--smoke makes data for configs with default_scope mmdet or mmseg, got {scope!r}")
    if lacking := [f"{mode}_dataloader" for mode in _MODES if not cfg.get(f"{mode}_dataloader")]:
        raise ValueError(f"--smoke trains and validates, but the config has no {', '.join(lacking)}")
    pipelines = {mode: _pipeline(cfg[f"{mode}_dataloader"].dataset) for mode in ("train", "val")}
    if not full_size:
        _shrink_sizes([pipelines, cfg.model.get("data_preprocessor"), cfg.model.get("test_cfg")])
        _limit(cfg.model)
    size = (160, 120) if not full_size else (1333, 800) if scope == "mmdet" else (704, 512)
    kinds = _kinds(cfg.model, background=scope == "mmseg")
    folder = folder / f"{size[0]}x{size[1]}x{kinds}"
    (_use_coco if scope == "mmdet" else _use_ade)(cfg, folder, size, kinds, pipelines)
    if "backbone" in cfg.model and "pretrained" in cfg.model.backbone:
        cfg.model.backbone.pretrained = False
    for mode in _MODES:
        cfg[f"{mode}_dataloader"].num_workers = 2 if full_size and mode == "train" else 0
        cfg[f"{mode}_dataloader"].persistent_workers = full_size and mode == "train"
    cfg.train_dataloader.sampler = {"type": "InfiniteSampler", "shuffle": True}
    cfg.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": iterations, "val_interval": iterations}
    cfg.param_scheduler = None
    cfg.log_processor = {"by_epoch": False, "window_size": 1}
    cfg.default_hooks.logger = {"type": "LoggerHook", "interval": 1, "log_metric_by_epoch": False}
    cfg.default_hooks.checkpoint = {"type": "CheckpointHook", "by_epoch": False, "interval": iterations}
    cfg.randomness = {"seed": 0}


def peak_memory_hook() -> Any:
    """An mmengine hook whose ``peak`` is the largest allocation on the GPU in a training iteration so far, in MiB.

    Torch's own maximum does not tell it in the end: mmengine's logger starts it anew after each iteration.
    """
    from mmengine.hooks import Hook

    class PeakMemory(Hook):
        priority = "NORMAL"  # before the logger
        peak = 0.0

        def after_train_iter(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                self.peak = max(self.peak, torch.cuda.max_memory_allocated() / 2**20)

    return PeakMemory()


def _once(folder: Path, make: Callable[[Path], object]) -> None:
    """Let ``make`` fill a folder, which another process may be doing as well, unless it is there."""
    if folder.exists():
        return
    own = folder.with_name(f".{folder.name}.{os.getpid()}")
    make(own)
    try:
        own.rename(folder)
    except OSError:  # the other process was faster
        shutil.rmtree(own)


def _pipeline(dataset: Any) -> Any:
    """Of the innermost data set: wrappers that repeat or mix hold one in ``dataset``, or several in ``datasets``."""
    if "dataset" in dataset:
        return _pipeline(dataset.dataset)
    return _pipeline(dataset.datasets[0]) if "datasets" in dataset else dataset.pipeline


def _kinds(model: Any, background: bool) -> int:
    """How many of the colours a model has classes for, besides a class for the background if it needs one."""
    classes = [part["num_classes"] for part in dicts(model) if isinstance(part.get("num_classes"), int)]
    return min([len(_COLORS), *(number - background for number in classes)])


def _use_coco(cfg: Any, folder: Path, size: tuple[int, int], kinds: int, pipelines: dict[str, Any]) -> None:
    from mmdet.datasets import CocoDataset

    classes = CocoDataset.METAINFO["classes"]
    for seed, (mode, images) in enumerate(IMAGES.items()):
        _once(folder / mode, partial(make_coco, size=size, names=classes, images=images, seed=seed, kinds=kinds))
    for mode, source in _MODES.items():
        cfg[f"{mode}_dataloader"].dataset = {
            "type": "CocoDataset",
            "data_root": str(folder / source),
            "ann_file": "annotations.json",
            "data_prefix": {"img": "images"},
            "pipeline": pipelines[source],
            "test_mode": mode != "train",
        }
    for mode in ("val", "test"):
        cfg[f"{mode}_evaluator"] = dict(cfg[f"{mode}_evaluator"], ann_file=str(folder / "val/annotations.json"))


def _use_ade(cfg: Any, folder: Path, size: tuple[int, int], kinds: int, pipelines: dict[str, Any]) -> None:
    for seed, (mode, images) in enumerate(IMAGES.items()):
        _once(folder / mode, partial(make_ade, size=size, images=images, seed=seed, kinds=kinds))
    for mode, source in _MODES.items():
        cfg[f"{mode}_dataloader"].dataset = {
            "type": "ADE20KDataset",
            "data_root": str(folder / source),
            "data_prefix": {"img_path": "images", "seg_map_path": "annotations"},
            "pipeline": pipelines[source],
            "test_mode": mode != "train",
        }


def _shrink_sizes(value: Any) -> None:
    for part in dicts(value):
        for key in _SIZES & set(part):
            part[key] = _smaller(part[key])


def _smaller(size: Any) -> Any:
    if isinstance(size, list | tuple):
        return type(size)(_smaller(item) for item in size)  # mmcv tells one size from several by the type
    return max(1, size // SHRINK) if isinstance(size, int) else size


def _limit(model: Any) -> None:
    for part in dicts(model):
        for key in _LARGEST.keys() & set(part):
            if isinstance(part[key], int) and part[key] > 0:
                part[key] = min(part[key], _LARGEST[key])
        if "score_thr" in part:
            part["score_thr"] = 0.0  # so that the evaluation has something to do


def dicts(value: Any) -> Iterator[Any]:
    """Every dict inside of dicts and lists."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from dicts(item)

"""What can be known to fail before the first iteration: channels, strides, annotations, missing files."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import nn
from torch.func import functional_call

from subquad.heads.openmmlab.backbone import SubquadBackbone, is_sharded

_SHOWN = 5
_LEVELS = 128  # of the image's side to the largest stride, so that necks can halve the last map seven times


@HOOKS.register_module()
class SubquadChecks(Hook):
    """Checks the model and the data before a run starts; see ``check_model`` and ``check_dataset``.

    Args:
        model: False leaves the model out, for one that the checks refuse although it works.
    """

    def __init__(self, model: bool = True) -> None:
        self.model = model

    def before_run(self, runner: Any) -> None:
        """Called by the Runner before weights are loaded and before the first iteration."""
        if self.model:
            check_model(getattr(runner.model, "module", runner.model))
        if is_main_process():  # the others would only ask the same files again
            # Not the properties: they would build the loops that this run does without.
            for loop in (runner._train_loop, runner._val_loop, runner._test_loop):
                if hasattr(loop, "dataloader"):
                    check_dataset(loop.dataloader.dataset, annotated=not _only_writes(loop))


# The model -----------------------------------------------------------------------------------------------------


def check_model(model: nn.Module) -> None:
    """Raise ValueError if neck or heads expect other channels or strides than the ``SubquadBackbone`` gives."""
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, SubquadBackbone):
        return
    neck = getattr(model, "neck", None)
    if neck is not None:
        strides = _strides_behind(neck, backbone)
    else:
        strides = list(backbone.strides)
        for name in ("decode_head", "auxiliary_head"):
            for head in _as_list(getattr(model, name, None)):
                _check_channels(name, head, backbone, _as_list(head.in_index))
    for name, expected in _expected_strides(model):
        if strides and list(expected) != strides[: len(expected)]:
            raise ValueError(
                f"{name} expects maps of strides {list(expected)}, {backbone.model_name} with out_indices"
                f" {backbone.out_indices} and this neck gives {strides}"
            )


def _check_channels(name: str, part: Any, backbone: SubquadBackbone, index: Sequence[int]) -> None:
    if not hasattr(part, "in_channels"):
        return
    if max(index) >= len(backbone.channels):
        raise ValueError(f"in_index {list(index)} of {name}: the backbone returns {len(backbone.channels)} maps")
    given = [backbone.channels[i] for i in index]
    wanted = _as_list(part.in_channels)
    if getattr(part, "input_transform", None) == "resize_concat":  # mmseg's heads then hold the sum
        given, wanted = [sum(given)], [sum(wanted)]
    if given != wanted:
        raise ValueError(
            f"{name} ({type(part).__name__}) takes {wanted} channels, {backbone.model_name} with out_indices"
            f" {backbone.out_indices} gives {given}: set {name}.in_channels"
        )


def _strides_behind(neck: Any, backbone: SubquadBackbone) -> list[int]:
    """Strides of the neck's maps, which it makes of the backbone's on the meta device; none if it cannot run there."""
    if is_sharded(backbone):  # mm_train checks before
        return []
    side = _LEVELS * math.lcm(*backbone.strides)
    maps = [
        torch.empty(1, channels, side // stride, side // stride, device="meta")
        for channels, stride in zip(backbone.channels, backbone.strides, strict=True)
    ]
    tensors = dict(neck.named_parameters()) | dict(neck.named_buffers())
    state = {name: torch.empty_like(value, device="meta") for name, value in tensors.items()}
    modes = {module: module.training for module in neck.modules()}
    try:
        with torch.no_grad():
            found = functional_call(neck.eval(), state, (tuple(maps),))
    except (NotImplementedError, TypeError):  # an operator for data on a device, or a neck that takes more than maps
        return []
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        first = neck[0] if isinstance(neck, nn.Sequential) else neck
        wanted = f"takes {_as_list(first.in_channels)}" if hasattr(first, "in_channels") else "takes other"
        raise ValueError(
            f"neck ({type(first).__name__}) {wanted} channels, {backbone.model_name} with out_indices"
            f" {backbone.out_indices} gives {list(backbone.channels)}: set neck.in_channels ({error})"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    return [side // y.shape[-1] for y in ([found] if isinstance(found, torch.Tensor) else found)]


def _expected_strides(model: Any) -> Iterator[tuple[str, Sequence[int]]]:
    for name in ("rpn_head", "bbox_head"):
        generator = getattr(getattr(model, name, None), "prior_generator", None)
        if generator is not None:
            yield f"{name}.anchor_generator", [stride[0] for stride in generator.strides]
    roi_head = getattr(model, "roi_head", None)
    for name in ("bbox_roi_extractor", "mask_roi_extractor"):
        for extractor in _as_list(getattr(roi_head, name, None)):
            yield f"roi_head.{name}", extractor.featmap_strides
    for head in _as_list(getattr(model, "decode_head", None)):
        if hasattr(head, "feature_strides"):
            yield "decode_head", head.feature_strides


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple | nn.ModuleList) else [value]


# The data ------------------------------------------------------------------------------------------------------


def check_dataset(dataset: Any, annotated: bool = True) -> None:
    """Raise an error that names the files if a data set of mmdet or mmseg cannot be read to its end.

    Folders are listed once, instead of asking for each file; files that are not on a disk are left to their reader.
    With ``annotated``, data sets of a detector must hold an object.

    Raises:
        ValueError: no images with annotations, an object without the mask that the pipeline loads, or an empty file.
        FileNotFoundError: a missing image or label map.
    """
    for part in _parts(dataset):
        part.full_init()
        where = getattr(part, "ann_file", None) or part.data_prefix
        infos = [part.get_data_info(i) for i in range(len(part))]
        # Data of segmentors has label maps instead of instances.
        if not infos or (annotated and not any(info.get("instances", True) for info in infos)):
            raise ValueError(f"no images with annotations in {where!r}: is it empty, or of other classes?")
        if any(getattr(step, "with_mask", False) for step in part.pipeline.transforms):
            bare = [i["img_path"] for i in infos if any("mask" not in each for each in i.get("instances", ()))]
            if bare:
                raise ValueError(f"{where!r} has annotations without a mask: {_some(bare)}")
        paths = [info[key] for info in infos for key in ("img_path", "seg_map_path") if info.get(key)]
        _check_files(paths, where)


def _only_writes(loop: Any) -> bool:
    """Whether a test only writes predictions down, for images without annotations such as COCO's test-dev."""
    metrics = getattr(getattr(loop, "evaluator", None), "metrics", [])
    return bool(metrics) and all(getattr(metric, "format_only", False) for metric in metrics)


def _parts(dataset: Any) -> Iterator[Any]:
    """The datasets inside of wrappers that concatenate or repeat."""
    if hasattr(dataset, "datasets"):
        for part in dataset.datasets:
            yield from _parts(part)
    elif hasattr(dataset, "dataset"):
        yield from _parts(dataset.dataset)
    elif hasattr(dataset, "get_data_info"):
        yield dataset


def _check_files(paths: list[str], where: Any) -> None:
    folders: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        if "://" not in path:
            folder, name = os.path.split(path)
            folders[folder].add(name)
    missing, empty = [], []
    for folder, names in folders.items():
        found = {}
        if os.path.isdir(folder):
            found = {entry.name: entry for entry in os.scandir(folder) if entry.name in names}
        missing += [os.path.join(folder, name) for name in sorted(names - set(found))]
        empty += [entry.path for entry in found.values() if entry.stat().st_size == 0]
    for kind, files in ((FileNotFoundError, missing), (ValueError, empty)):
        if files:
            state = "missing" if files is missing else "empty"
            raise kind(f"files of {where!r} are {state}: {_some(files)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

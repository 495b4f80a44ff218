"""Stands in for ``mmcv._ext``, the compiled operators of mmcv, where they are absent.

mmcv's wheels have no operators, and without them not even ``mmdet.models`` can be imported. A finder at the end of
``sys.meta_path`` answers for the one name ``mmcv._ext``: compiled operators, which Python finds first, always win.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from subquad.heads.openmmlab import standin_ops

EXTENSION = "mmcv._ext"

# Names under which mmdet and mmseg hold operators of mmcv, imported once and for all when they are imported.
_HELD = {
    "CARAFEPack",
    "CornerPool",
    "CrissCrossAttention",
    "DeformConv2d",
    "MaskedConv2d",
    "ModulatedDeformConv2d",
    "MultiScaleDeformableAttention",
    "PSAMask",
    "RoIPool",
    "batched_nms",
    "deform_conv2d",
    "line_nms",
    "nms",
    "nms_match",
    "point_sample",
    "rel_roi_point_to_rel_img_point",
    "roi_align",
    "sigmoid_focal_loss",
}
_ALIASES = {("mmdet.models.dense_heads.clr_head.clr_head", "nms"): "line_nms"}


class _Finder(MetaPathFinder, Loader):
    """Finds and makes the module ``mmcv._ext``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, origin=standin_ops.__file__) if fullname == EXTENSION else None

    def exec_module(self, module: ModuleType) -> None:
        for name in standin_ops.__all__:
            setattr(module, name, getattr(standin_ops, name))
        module.__dict__["__getattr__"] = _absent_operator


def _absent_operator(name: str) -> Callable[..., NoReturn]:
    """mmcv asks for some hundred operators by name when it is imported; an absent one fails when it is called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args: Any, **kwargs: Any) -> NoReturn:
        raise standin_ops.absence(f"the operator {name}")

    return absent


def install() -> None:
    """Make ``mmcv._ext`` importable if it is not, and repair parts of mmdet and mmseg that were imported without it."""
    if importlib.util.find_spec(EXTENSION) is None:
        sys.meta_path.append(_Finder())
        _repair()


def _repair() -> None:
    """Give the operators to modules of mmdet and mmseg that hold a substitute, which raises when called, or None."""
    if any(name.startswith("mmdet.models.") for name in sys.modules):
        importlib.import_module("mmdet.models")  # its import may have broken off for want of the operators
    early = [name for name in sys.modules if name.split(".")[0] in ("mmdet", "mmseg")]
    if not early:
        return
    operators = importlib.import_module("mmcv.ops")
    for module_name in early:
        held = vars(sys.modules[module_name])
        for name in list(held):
            operator = name.removeprefix("_")
            substitute = held[name] is None or getattr(held[name], "__module__", None) == module_name
            if operator not in _HELD or not substitute or _is_own(module_name, name):
                continue
            held[name] = getattr(operators, _ALIASES.get((module_name, name), operator))


def _is_own(module_name: str, name: str) -> bool:
    """mmdet's loss is a function of its own, under the name of an operator that it calls by an underscored one."""
    return name == "sigmoid_focal_loss" and module_name.endswith(".focal_loss")

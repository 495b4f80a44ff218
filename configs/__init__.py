"""Training and evaluation configs (package data): ``mmdet/`` and ``mmseg/`` hold those of the OpenMMLab libraries."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

__all__ = ["names", "path"]

_ROOT = Path(__file__).parent


def names() -> list[str]:
    """Every config that can be trained, as ``path`` takes them: ``mmdet/vmamba/mask-rcnn_vmamba-tiny_fpn_1x_coco.py``.

    Those in folders ``_base_`` are parts to inherit from.
    """
    found = (file.relative_to(_ROOT) for library in ("mmdet", "mmseg") for file in (_ROOT / library).rglob("*.py"))
    return sorted(file.as_posix() for file in found if "_base_" not in file.parts)


def path(name: str) -> Path:
    """Where a config lies, wherever the library is installed.

    Args:
        name: of a config in ``names()``, or of a part such as ``mmdet/_base_/models/retinanet_fpn.py``; ``.py`` may be
            left out.

    Raises:
        FileNotFoundError: for any other name; the message has those that are close.
    """
    file = _ROOT / (name if name.endswith(".py") else f"{name}.py")
    if not file.is_file() or Path(name).is_absolute() or ".." in Path(name).parts:
        close = get_close_matches(name, names(), n=3, cutoff=0.4)
        raise FileNotFoundError(f"no config {name!r}" + (f"; did you mean {', '.join(close)}?" if close else ""))
    return file

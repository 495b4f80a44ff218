"""Files of a training run, written so that a reader finds a complete old file or a complete new one, never a part."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

OPTIONS = "options.json"
STATE = "state.pt"
BEST = "best.safetensors"
LAST = "last.safetensors"
METRICS = "metrics.csv"
CURVES = "curves.png"
LOAD = "load.txt"

_FORMAT = 1


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path``; when the block ends well, what it wrote there becomes ``path`` at once."""
    temporary = path.with_name(f".{path.name}.tmp")
    yield temporary
    _flush(temporary)
    os.replace(temporary, path)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as indented JSON."""
    save_text(path, json.dumps(content, indent=2))


def save_text(path: Path, text: str) -> None:
    """Write ``text`` and the end of its line."""
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def save_weights(path: Path, state_dict: Mapping[str, Tensor]) -> None:
    """Write the tensors of a state dict as safetensors."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    with replacing(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={"format": "pt"}))  # save_file hides its files from other users


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the resumable state: tensors, numbers and strings in dicts and lists, readable with ``weights_only``."""
    with replacing(folder / STATE) as temporary:
        torch.save({"format": _FORMAT, **state}, temporary)


def load_state(folder: Path) -> dict[str, Any] | None:
    """Read the resumable state of a run, None if the run ended before its first checkpoint.

    Raises:
        ValueError: if the file is damaged, not a state of ours, or holds anything but plain data.
    """
    path = folder / STATE
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and storage errors alike
        raise ValueError(f"{str(path)!r} is not a readable training state: {error}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{str(path)!r} is not a training state of format {_FORMAT}")
    return state

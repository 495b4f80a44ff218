"""``subquad convert``: an official checkpoint as a safetensors file with this library's names, without executing it.

The file then loads everywhere that timm takes weights: ``checkpoint_path=``, ``pretrained_cfg_overlay=dict(file=...)``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn

from subquad.backbones import weights
from subquad.backbones.registry import check_model

with suppress(ImportError):  # only the command line reads the annotations, and it cannot run without tyro
    from tyro.conf import Positional, arg


@dataclass
class Options:
    """Turn an official checkpoint, which is never executed, into a safetensors file with this library's names."""

    file: Positional[Path]
    """Checkpoint: a torch file (zip or legacy format) or safetensors."""

    model: str
    """Name of the model that the weights belong to, such as vmamba_tiny."""

    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    """File to write, MODEL.safetensors in the current folder by default. An existing file is replaced."""

    key: str | None = None
    """Entry of the checkpoint to take, such as model; by default what the authors evaluate, or averaged weights."""

    num_classes: int | None = None
    """Classes of the checkpoint, if they are not the model's default."""

    in_chans: int | None = None
    """Input channels of the checkpoint, if they are not the model's default."""


def run(options: Options) -> Path:
    """Read, rename, compare with the model, write; prints what was taken and what was left out.

    Returns:
        The file that was written. Tensors keep the dtypes that they have in the checkpoint.

    Raises:
        FileNotFoundError: no checkpoint, or no folder to write to.
        ValueError: an unknown model, an unreadable checkpoint, or one that does not fit (see ``weights.Difference``).
    """
    output = options.output or Path(f"{options.model}.safetensors")
    if output.suffix != ".safetensors":
        raise ValueError(f"output must be a .safetensors file, got {output}")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"no folder {output.parent} to write {output.name} to")
    model = _model(options)
    checkpoint = weights.read_checkpoint(options.file)
    try:
        key = weights.wrapper_for(model, checkpoint, options.key)
        taken = weights.unwrap(checkpoint, key)
        state_dict = weights.filter_of(model)(taken, model)
    except ValueError as error:
        raise ValueError(f"{options.file}: {error}") from error
    if difference := weights.compare(state_dict, model.state_dict()):
        raise ValueError(
            f"{options.file} does not fit {options.model}:\n{difference}{_classes_hint(difference, model)}"
        )
    _write(state_dict, output)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{output}: {options.model}, {len(state_dict)} tensors, {parameters:,} parameters")
    print(f"taken from: {key or 'the top level'}")
    print(f"left out: {', '.join(_left_out(checkpoint, key, taken)) or 'nothing'}")
    return output


def _model(options: Options) -> nn.Module:
    check_model(options.model)
    return timm.create_model(options.model, num_classes=options.num_classes, in_chans=options.in_chans, device="meta")


def _classes_hint(difference: weights.Difference, model: Any) -> str:
    """What to say to a checkpoint with another number of classes than the model, as the end of a message."""
    shapes = difference.misshaped.values()
    classes = {found[0] for found, wanted in shapes if found and wanted and wanted[0] == model.num_classes}
    return f"\nFor a checkpoint with {classes.pop()} classes say so with --num-classes." if len(classes) == 1 else ""


def _left_out(checkpoint: Mapping[str, Any], key: str | None, taken: Mapping[str, Tensor]) -> list[str]:
    """Entries beside the weights, and parts of the weights that are not the model's: a detector's neck, a loss."""
    kept = {id(value) for value in taken.values()}
    chosen = checkpoint if key is None else checkpoint[key]
    parts = {str(name).split(".")[0] for name, value in chosen.items() if id(value) not in kept}
    return [str(name) for name in checkpoint if key not in (None, name)] + sorted(parts)


def _write(state_dict: dict[str, Tensor], output: Path) -> None:
    """All or nothing: a reader never sees a part of the file."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        # Parts of one tensor (a projection and its gate) share memory, which safetensors does not write.
        tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state_dict.items()}
        # Not save_file, which makes its file unreadable for other users. More metadata would come in any order.
        temporary.write_bytes(save(tensors, {"format": "pt"}))
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)

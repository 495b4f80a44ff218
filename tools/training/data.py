"""Images for training: the embedded digits, or a folder of classes. Broken images are skipped, never replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import timm.data
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

Augmentation = Literal["none", "light", "heavy"]

_VALIDATION_FOLDERS = ("val", "valid", "validation", "test")


class Samples(NamedTuple):
    """Images (files, or pictures in memory) and the class index of each."""

    images: list[Path] | list[Image.Image]
    labels: list[int]


@dataclass(frozen=True)
class ImageData:
    """Two disjoint sets of images over the same classes. ``digits``: small gray glyphs, which must not be mirrored."""

    classes: list[str]
    train: Samples
    val: Samples
    digits: bool = False


def load_digits(val_fraction: float, seed: int) -> ImageData:
    """The 1,797 handwritten digits (8x8, 10 classes) that come with scikit-learn, split by class with ``seed``."""
    from sklearn.datasets import load_digits as load

    digits = load()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    samples = Samples([Image.fromarray(image) for image in pixels], digits.target.tolist())
    classes = [str(name) for name in digits.target_names]
    return ImageData(classes, *_split(samples, classes, val_fraction, seed), digits=True)


def load_folder(root: Path, val_fraction: float, seed: int) -> ImageData:
    """Read ``root/train/<class>/*`` and ``root/val/<class>/*``, or split ``root/<class>/*`` by class with ``seed``.

    Instead of ``val``, the folder may be called ``valid``, ``validation`` or ``test``; without one, ``train`` is split.
    Only names are read here: pictures are opened when they are needed.

    Raises:
        FileNotFoundError: if ``root`` is not a folder.
        ValueError: if there are no images, fewer than two classes, a class without images, or a validation class that
            the training set does not have.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"data folder {str(root)!r} {'is no folder' if root.exists() else 'does not exist'}")
    train_root = root / "train" if (root / "train").is_dir() else root
    classes = sorted(entry.name for entry in train_root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    train = _read_samples(train_root, classes)
    if not train.images:
        raise ValueError(
            f"no images in {str(train_root)!r}: expected one folder a class with {', '.join(IMG_EXTENSIONS)} files"
        )
    if len(classes) < 2:
        raise ValueError(f"{str(train_root)!r} has one class, {classes[0]!r}; a classifier needs two or more")
    if empty := [name for index, name in enumerate(classes) if index not in set(train.labels)]:
        raise ValueError(f"no images in the class folders {empty} of {str(train_root)!r}; fill or remove them")

    val_root = next((root / name for name in _VALIDATION_FOLDERS if (root / name).is_dir()), None)
    if train_root == root or val_root is None:
        return ImageData(classes, *_split(train, classes, val_fraction, seed))
    val_classes = {entry.name for entry in val_root.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    if unknown := sorted(val_classes - set(classes)):
        raise ValueError(f"{str(val_root)!r} has classes that {str(train_root)!r} has not: {unknown}")
    val = _read_samples(val_root, classes)
    if not val.images:
        raise ValueError(f"no images in {str(val_root)!r}: expected one folder a class, as in {str(train_root)!r}")
    return ImageData(classes, train, val)


def _read_samples(root: Path, classes: list[str]) -> Samples:
    if not classes:
        return Samples([], [])
    indices = {name: index for index, name in enumerate(classes)}
    files = make_dataset(root, indices, extensions=IMG_EXTENSIONS, allow_empty=True)
    return Samples([Path(path) for path, _ in files], [label for _, label in files])


def _split(samples: Samples, classes: list[str], val_fraction: float, seed: int) -> tuple[Samples, Samples]:
    """Hold out ``val_fraction`` of every class, one image at least."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(samples.labels)
    held_out: set[int] = set()
    for label, name in enumerate(classes):
        members = (labels == label).nonzero().flatten()
        if len(members) < 2:
            raise ValueError(f"class {name!r} has a single image: one to train with and one to hold out are needed")
        count = min(max(1, round(val_fraction * len(members))), len(members) - 1)
        held_out.update(members[torch.randperm(len(members), generator=generator)[:count]].tolist())

    def pick(inside: bool) -> Samples:
        chosen = [index for index in range(len(labels)) if (index in held_out) == inside]
        return Samples([samples.images[index] for index in chosen], [samples.labels[index] for index in chosen])  # type: ignore[arg-type]

    return pick(False), pick(True)


def build_transforms(
    image_size: int, augmentation: Augmentation, model_config: dict[str, Any], *, digits: bool
) -> tuple[Callable[[Image.Image], Tensor], Callable[[Image.Image], Tensor]]:
    """Transforms of training and validation images: PIL image to a normalised (3, image_size, image_size) tensor.

    ``model_config`` is what ``timm.data.resolve_model_data_config`` returns. Digits are neither mirrored nor cropped
    away: their crops keep 70 % of the picture, and nearly its aspect.
    """
    common = {key: model_config[key] for key in ("mean", "std", "interpolation")} | {"input_size": image_size}
    crop_pct = 1.0 if digits else model_config["crop_pct"]
    val_transform = timm.data.create_transform(**common, crop_pct=crop_pct)
    if augmentation == "none":
        return val_transform, val_transform
    if digits:
        common |= {"scale": (0.7, 1.0), "ratio": (0.9, 1 / 0.9), "hflip": 0.0}
    else:
        common |= {"scale": (0.35, 1.0) if augmentation == "light" else (0.08, 1.0)}
    if augmentation == "heavy":
        # No "mstd": at a magnitude of 10 timm asks Pillow to posterize to 0 bits, which Pillow refuses.
        common |= {"auto_augment": "rand-m9-inc1", "re_prob": 0.25, "re_mode": "pixel"}
    return timm.data.create_transform(**common, is_training=True, color_jitter=0.0), val_transform


class ImageSet(Dataset):
    """Transformed images by index: ``(tensor, label)``, or, for one that cannot be decoded, a line that names it."""

    def __init__(self, samples: Samples, transform: Callable[[Image.Image], Tensor]) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        image = self.samples.images[index]
        try:
            picture = _open(image).convert("RGB")
        except Exception as error:  # decoders raise anything from OSError to struct.error on broken files
            return f"{image}: {type(error).__name__}: {error}"
        return self.transform(picture), self.samples.labels[index]


def _open(image: Path | Image.Image) -> Image.Image:
    return Image.open(image) if isinstance(image, Path) else image


class Batch(NamedTuple):
    """images (B, 3, H, W) float32, labels (B,) int64, and a line for each image that could not be read."""

    images: Tensor
    labels: Tensor
    broken: list[str]


def collate(samples: Sequence[tuple[Tensor, int] | str]) -> Batch:
    """Stack the images that could be read; without any, ``labels`` is empty."""
    good = [sample for sample in samples if not isinstance(sample, str)]
    broken = [sample for sample in samples if isinstance(sample, str)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return Batch(images, torch.tensor([label for _, label in good], dtype=torch.long), broken)

"""Images for training: which folders are refused, how they are split, what a broken picture does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from subquad.tools.training.data import ImageSet, Samples, build_transforms, collate, load_digits, load_folder


def _write(folder: Path, count: int, suffix: str = "png") -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / f"{index}.{suffix}")


def test_digits_are_split_by_class() -> None:
    data = load_digits(0.2, seed=0)
    assert data.classes == [str(digit) for digit in range(10)]
    assert len(data.train.labels) + len(data.val.labels) == 1797
    for label in range(10):
        held_out, trained = data.val.labels.count(label), data.train.labels.count(label)
        assert abs(held_out / (held_out + trained) - 0.2) < 0.01
    assert not {id(image) for image in data.train.images} & {id(image) for image in data.val.images}
    again = load_digits(0.2, seed=0)
    assert again.val.labels == data.val.labels
    assert [image.tobytes() for image in again.val.images] == [image.tobytes() for image in data.val.images]
    other = load_digits(0.2, seed=1)
    assert [image.tobytes() for image in other.val.images] != [image.tobytes() for image in data.val.images]


def test_folder_of_classes_is_split_without_overlap(tmp_path: Path) -> None:
    _write(tmp_path / "cat", 10)
    _write(tmp_path / "dog", 3, "jpg")
    data = load_folder(tmp_path, 0.3, seed=0)
    assert data.classes == ["cat", "dog"]
    assert sorted(data.val.labels) == [0, 0, 0, 1]
    files = {*data.train.images, *data.val.images}
    assert files == {*tmp_path.glob("*/*.png"), *tmp_path.glob("*/*.jpg")}
    assert len(files) == len(data.train.images) + len(data.val.images)


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_validation_folder_is_used_as_it_is(tmp_path: Path, name: str) -> None:
    _write(tmp_path / "train" / "a", 2)
    _write(tmp_path / "train" / "b", 3)
    _write(tmp_path / "train" / ".cache", 1)
    _write(tmp_path / name / "b", 4)
    data = load_folder(tmp_path, 0.5, seed=0)
    assert data.classes == ["a", "b"]
    assert data.train.labels == [0, 0, 1, 1, 1]
    assert data.val.labels == [1, 1, 1, 1]


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.*does not exist"):
        load_folder(tmp_path / "nowhere", 0.2, seed=0)
    with pytest.raises(ValueError, match="no images"):
        load_folder(tmp_path, 0.2, seed=0)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="no images"):
        load_folder(tmp_path, 0.2, seed=0)
    Image.new("L", (8, 8)).save(tmp_path / "a" / "0.png")
    with pytest.raises(ValueError, match="one class, 'a'"):
        load_folder(tmp_path, 0.2, seed=0)
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"no images in the class folders \['b'\]"):
        load_folder(tmp_path, 0.2, seed=0)
    Image.new("L", (8, 8)).save(tmp_path / "b" / "0.png")
    with pytest.raises(ValueError, match="class 'a' has a single image"):
        load_folder(tmp_path, 0.2, seed=0)


def test_unusable_validation_folders_are_refused(tmp_path: Path) -> None:
    _write(tmp_path / "train" / "a", 2)
    _write(tmp_path / "train" / "b", 2)
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match=r"no images in .*val"):
        load_folder(tmp_path, 0.2, seed=0)
    _write(tmp_path / "val" / "c", 1)
    with pytest.raises(ValueError, match=r"classes that .* has not: \['c'\]"):
        load_folder(tmp_path, 0.2, seed=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_left_out_and_named(tmp_path: Path, workers: int) -> None:
    whole = tmp_path / "whole.png"
    Image.new("RGB", (8, 8), (255, 0, 0)).save(whole)
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:50])
    files = [tmp_path / "text.png", whole, tmp_path / "empty.png", tmp_path / "cut.png"]
    to_tensor = lambda picture: torch.tensor(picture.getpixel((0, 0)), dtype=torch.float32)
    dataset = ImageSet(Samples(files, [0, 1, 2, 3]), to_tensor)
    mixed, hopeless = DataLoader(dataset, batch_size=3, collate_fn=collate, num_workers=workers)
    assert mixed.labels.tolist() == [1]
    assert mixed.images.tolist() == [[255.0, 0.0, 0.0]]
    assert [Path(line.split(": ")[0]).name for line in mixed.broken] == ["text.png", "empty.png"]
    assert hopeless.labels.tolist() == []
    assert "cut.png" in hopeless.broken[0]


@pytest.mark.parametrize("augmentation", ["none", "light", "heavy"])
@pytest.mark.parametrize("size", [24, 40])
def test_transforms_give_normalised_squares(augmentation: str, size: int) -> None:
    config = {"mean": (0.5, 0.25, 0.0), "std": (0.5, 0.25, 1.0), "interpolation": "bicubic", "crop_pct": 0.9}
    picture = Image.new("RGB", (30, 50), (255, 255, 255))
    train, val = build_transforms(size, augmentation, config, digits=False)  # type: ignore[arg-type]
    assert train(picture).shape == val(picture).shape == (3, size, size)
    white = torch.tensor([1.0, 3.0, 1.0])[:, None, None].expand(3, size, size)
    torch.testing.assert_close(val(picture), white)


def test_digits_are_never_mirrored() -> None:
    config = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bilinear", "crop_pct": 0.9}
    left_half = Image.new("RGB", (32, 32))
    left_half.paste((255, 255, 255), (0, 0, 16, 32))
    for augmentation in ("light", "heavy"):
        train, _ = build_transforms(32, augmentation, config, digits=True)  # type: ignore[arg-type]
        mirrored = sum(bool(view[:, :, 28:].mean() > view[:, :, :4].mean()) for view in map(train, [left_half] * 30))
        # RandAugment may invert the picture and random erasing hit an edge, but half of all views would be a mirror's.
        assert mirrored <= (0 if augmentation == "light" else 10)

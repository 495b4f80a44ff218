"""``subquad convert``: official names to ours, all or nothing, and nothing executed."""

from __future__ import annotations

import argparse
import gzip
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from subquad import cli
from subquad.tools import convert

MODEL = "test_vmamba"
MANIFESTS = Path(__file__).parents[1] / "parity" / "data" / "mamba" / "manifests"


@pytest.fixture
def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    expected = timm.create_model(MODEL).state_dict()
    return {name: torch.rand(value.shape, generator=generator) for name, value in expected.items()}


def _checkpoint(path: Path, state: dict[str, Any], **beside: Any) -> Path:
    torch.save({"model": state, **beside}, path)
    return path


def _official(manifest: str) -> dict[str, Tensor]:
    """A state dict with the names and shapes of a released file; each value is stored once, so that it is small."""
    lines = gzip.decompress((MANIFESTS / manifest).read_bytes()).decode().splitlines()[:-1]
    entries = (line.split("\t") for line in lines)
    return {
        name: torch.full((1,), i, dtype=torch.bfloat16).expand([int(size) for size in shape.split("x")])
        for i, (name, shape, _) in enumerate(entries)
    }


def test_official_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = _official("vmamba_tiny_s1l8.tsv.gz")
    source = _checkpoint(tmp_path / "official.pth", state, optimizer={}, config=argparse.Namespace(a=1), epoch=264)
    output = tmp_path / "vmamba_tiny.safetensors"
    assert convert.run(convert.Options(source, "vmamba_tiny", output)) == output
    printed = capsys.readouterr().out
    assert "30,249,064 parameters" in printed
    assert "taken from: model" in printed
    assert "left out: optimizer, config, epoch" in printed

    expected = timm.create_model("vmamba_tiny", device="meta").state_dict()
    converted = load_file(output)
    assert {name: value.shape for name, value in converted.items()} == {n: v.shape for n, v in expected.items()}
    assert {value.dtype for value in converted.values()} == {torch.bfloat16}
    assert torch.equal(converted["head.fc.bias"], state["classifier.head.bias"])
    assert torch.equal(converted["stem.conv2.weight"], state["patch_embed.5.weight"])
    with safe_open(output, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    (tmp_path / "ordinary").touch()
    assert output.stat().st_mode == (tmp_path / "ordinary").stat().st_mode  # other users may read it


@pytest.mark.parametrize(
    ("manifest", "name", "taken"),
    [
        ("vim_tiny_patch16_224", "vim_tiny", "model"),
        ("msvmamba_nano", "msvmamba_nano", "model_ema"),
        ("vig_tiny", "vig_tiny", "model"),
        ("vig_h_tiny", "vig_h_tiny", "model"),
    ],
)
def test_official_checkpoints_with_averaged_weights_too(
    manifest: str, name: str, taken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Taken is what upstream evaluates."""
    state = _official(f"{manifest}.tsv.gz")
    source = _checkpoint(tmp_path / "official.pth", state, model_ema=state, args=argparse.Namespace(lr=1e-3))
    converted = load_file(convert.run(convert.Options(source, name, tmp_path / "ours.safetensors")))
    assert f"taken from: {taken}\n" in capsys.readouterr().out
    expected = timm.create_model(name, device="meta").state_dict()
    assert {key: value.shape for key, value in converted.items()} == {key: v.shape for key, v in expected.items()}


def test_timm_loads_the_result(state: dict[str, Tensor], tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    convert.run(convert.Options(_checkpoint(tmp_path / "c.pth", state), MODEL, output))
    model = timm.create_model(MODEL, checkpoint_path=str(output))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    again = tmp_path / "again.safetensors"
    convert.run(convert.Options(output, MODEL, again))
    assert load_file(again).keys() == state.keys()


def test_command_line(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tyro", reason='the command line needs pip install "subquad[train]"')
    source = _checkpoint(tmp_path / "c.pth", state)
    output = tmp_path / "out.safetensors"
    assert cli.main(["convert", str(source), "--model", MODEL, "-o", str(output)]) == 0
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", str(source), "--model", MODEL]) == 0
    assert output.read_bytes() == (tmp_path / f"{MODEL}.safetensors").read_bytes()
    assert cli.main(["convert", "none.pth", "--model", MODEL]) == 2
    assert "none.pth: no such file" in capsys.readouterr().err


def test_runs_without_tyro(state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tyro", "tyro.conf"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("subquad.tools.convert", convert)  # the import below replaces it
    monkeypatch.delitem(sys.modules, "subquad.tools.convert")
    module = importlib.import_module("subquad.tools.convert")
    assert not hasattr(module, "arg")
    output = tmp_path / "out.safetensors"
    assert module.run(module.Options(_checkpoint(tmp_path / "c.pth", state), MODEL, output)) == output


def test_chosen_entry_and_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = timm.create_model(MODEL, num_classes=5, in_chans=1).state_dict()
    averaged = {name: torch.zeros_like(value) for name, value in trained.items()}
    source = _checkpoint(tmp_path / "c.pth", trained, model_ema=averaged)
    output = tmp_path / "out.safetensors"
    convert.run(convert.Options(source, MODEL, output, key="model", num_classes=5, in_chans=1))
    assert torch.equal(load_file(output)["head.fc.weight"], trained["head.fc.weight"])
    assert "left out: model_ema" in capsys.readouterr().out


def test_parts_of_a_detector_are_left_out(
    state: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector = {f"backbone.{name}": value for name, value in state.items()}
    detector |= {"neck.0.weight": torch.ones(1), "neck.0.bias": torch.ones(1), "bbox_head.fc.bias": torch.ones(1)}
    convert.run(convert.Options(_checkpoint(tmp_path / "c.pth", detector), MODEL, tmp_path / "out.safetensors"))
    assert "left out: bbox_head, neck" in capsys.readouterr().out


def test_misfit_is_listed_and_nothing_is_written(state: dict[str, Tensor], tmp_path: Path) -> None:
    del state["norm.weight"]
    state |= {"norm.bias": torch.ones(3), "extra": torch.ones(1)}
    source = _checkpoint(tmp_path / "c.pth", state)
    with pytest.raises(ValueError) as error:
        convert.run(convert.Options(source, MODEL, tmp_path / "out.safetensors"))
    text = str(error.value)
    assert f"{source} does not fit {MODEL}" in text
    assert "missing (1): norm.weight\nunexpected (1): extra\nwrong shape (1): norm.bias is (3,), expected (48,)" in text
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth"]


def test_weights_of_another_number_of_classes(tmp_path: Path) -> None:
    source = _checkpoint(tmp_path / "c.pth", timm.create_model(MODEL, num_classes=5).state_dict())
    with pytest.raises(ValueError, match=r"wrong shape \(2\)(.*\n)+For a checkpoint with 5 classes .* --num-classes"):
        convert.run(convert.Options(source, MODEL, tmp_path / "out.safetensors"))


def test_weights_of_another_model(tmp_path: Path) -> None:
    other = timm.create_model("nat_tiny", device="meta").state_dict()
    source = _checkpoint(tmp_path / "c.pth", {name: torch.zeros(1).expand(x.shape) for name, x in other.items()})
    message = r"does not fit vmamba_tiny:\nonly \d+ of \d+ tensors fit: these seem to be weights of another model\n"
    with pytest.raises(ValueError, match=message) as error:
        convert.run(convert.Options(source, "vmamba_tiny", tmp_path / "out.safetensors"))
    assert len(str(error.value)) < 1000 + len(str(source))
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("vmamba_tinny", r"unknown model 'vmamba_tinny', did you mean vmamba_tiny"),
        ("resnet50", r"unknown model 'resnet50', expected one of .*vmamba_base"),
    ],
)
def test_unknown_model(model: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        convert.run(convert.Options(tmp_path / "c.pth", model, tmp_path / "out.safetensors"))


def test_output_that_cannot_be_written(state: dict[str, Tensor], tmp_path: Path) -> None:
    source = _checkpoint(tmp_path / "c.pth", state)
    with pytest.raises(ValueError, match=r"output must be a \.safetensors file, got .*out\.pth"):
        convert.run(convert.Options(source, MODEL, tmp_path / "out.pth"))
    with pytest.raises(FileNotFoundError, match=r"no folder .*none to write out\.safetensors to"):
        convert.run(convert.Options(source, MODEL, tmp_path / "none" / "out.safetensors"))


@pytest.mark.parametrize("broken", ["subquad.tools.convert.save", "os.replace"])
def test_interrupted_write_keeps_the_old_file(
    broken: str, state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = _checkpoint(tmp_path / "c.pth", state), tmp_path / "out.safetensors"
    output.write_bytes(b"old")

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(broken, fail)
    with pytest.raises(OSError, match="disk full"):
        convert.run(convert.Options(source, MODEL, output))
    assert output.read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"c.pth", "out.safetensors"}


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_hostile_checkpoint(zipped: bool, state: dict[str, Tensor], tmp_path: Path) -> None:
    sentinel, source, output = (tmp_path / name for name in ("executed", "c.pth", "out.safetensors"))
    torch.save({"model": state, "config": Payload(sentinel)}, source, _use_new_zipfile_serialization=zipped)
    convert.run(convert.Options(source, MODEL, output))
    assert load_file(output).keys() == state.keys()
    assert not sentinel.exists()

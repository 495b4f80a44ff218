"""``subquad export``: every format read back by its own runtime and compared with the model, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from subquad.backbones import weights
from subquad.tools import export
from subquad.tools.export import Options

TRACED = 64
TRACED_LARGER = {"test_msvmamba": 128}  # its half maps, too, must be larger than a pixel where it is traced
# Odd, not square, other batches; 33 pixels make a map of 2 x 2 in the last stage.
SHAPES = [(1, 96, 64), (3, 72, 100), (2, 33, 121)]
PROGRAM = """
import sys
import torch
import subquad

program, image, output = sys.argv[1:]
torch.save(torch.export.load(program).module()(torch.load(image)), output)
"""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Weights of a test model with every parameter moved, so that no part of it is idle."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def make(name: str, **kwargs: Any) -> Path:
        path = folder / f"{name}{''.join(f'_{value}' for value in kwargs.values())}.safetensors"
        if not path.exists():
            generator = torch.Generator().manual_seed(len(name))
            model = timm.create_model(name, **kwargs)
            state = {
                key: value + 0.05 * torch.randn(value.shape, generator=generator)
                for key, value in model.state_dict().items()
            }
            save_file(state, path)
        return path

    return make


@pytest.fixture(scope="session")
def exported(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Each export is made once, without its own check: the tests are to find what it would miss."""
    folder = tmp_path_factory.mktemp("exported")

    def make(model: str, kind: Any, features: bool = False) -> Path:
        path = folder / f"{model}_{features}{export._SUFFIXES[kind]}"
        if not path.exists():
            options = Options(model, kind, path, checkpoints(model), features=features, check=False)
            options.image_size = TRACED_LARGER.get(model, TRACED)
            assert export.run(options) == path
        return path

    return make


def eager(path: Path, name: str, **kwargs: Any) -> nn.Module:
    model = timm.create_model(name, **kwargs).eval()
    weights.load_checkpoint(model, path)
    return model


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(batch, 3, height, width, generator=generator) for batch, height, width in SHAPES]


@torch.no_grad()
def expected(model: Any, image: Tensor, features: bool) -> list[Tensor]:
    return model.forward_intermediates(image, intermediates_only=True) if features else [model(image)]


def assert_near(outputs: list[Tensor], targets: list[Tensor]) -> None:
    assert [output.shape for output in outputs] == [target.shape for target in targets]
    for output, target in zip(outputs, targets, strict=True):
        assert (output - target).abs().max() <= 2e-5 * target.abs().max()


def onnx_session(path: Path) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime", reason='ONNX needs pip install "subquad[export]"')
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_torch_program_in_a_new_process(
    exported: Callable[..., Path], checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    image = images()[1]
    torch.save(image, tmp_path / "image.pt")
    arguments = [exported("test_vmamba", "torch"), tmp_path / "image.pt", tmp_path / "logits.pt"]
    subprocess.run([sys.executable, "-c", PROGRAM, *map(str, arguments)], check=True, cwd=tmp_path)
    model = eager(checkpoints("test_vmamba"), "test_vmamba")
    assert_near([torch.load(tmp_path / "logits.pt")], expected(model, image, features=False))


def test_torch_program_of_features(exported: Callable[..., Path], checkpoints: Callable[..., Path]) -> None:
    program = torch.export.load(exported("test_vmamba", "torch", features=True)).module()
    model = eager(checkpoints("test_vmamba"), "test_vmamba")
    for image in images():
        assert_near(list(program(image)), expected(model, image, features=True))


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("test_vmamba", False),
        ("test_vmamba_vanilla", True),
        # half a minute each and more, nearly all of it PyTorch's exporter
        pytest.param("test_vim", False, marks=pytest.mark.slow),
        pytest.param("test_vim", True, marks=pytest.mark.slow),
        pytest.param("test_msvmamba", True, marks=pytest.mark.slow),
        pytest.param("test_vig", False, marks=pytest.mark.slow),
        pytest.param("test_vig_h", True, marks=pytest.mark.slow),
        pytest.param("test_mlla", False, marks=pytest.mark.slow),
        pytest.param("test_nat", True, marks=pytest.mark.slow),
        pytest.param("test_nat_isotropic", False, marks=pytest.mark.slow),
        pytest.param("test_biformer", True, marks=pytest.mark.slow),
        pytest.param("test_ravlt", False, marks=pytest.mark.slow),
        pytest.param("test_mavit", True, marks=pytest.mark.slow),
        pytest.param("test_nalaformer", False, marks=pytest.mark.slow),
        pytest.param("test_flatten_swin", True, marks=pytest.mark.slow),
        pytest.param("test_inline_pvt", False, marks=pytest.mark.slow),
        pytest.param("test_slab_pvt", False, marks=pytest.mark.slow),
        pytest.param("test_slab_cswin", True, marks=pytest.mark.slow),
    ],
)
def test_onnx_at_sizes_that_were_not_traced(
    name: str, features: bool, exported: Callable[..., Path], checkpoints: Callable[..., Path]
) -> None:
    session = onnx_session(exported(name, "onnx", features))
    names = [f"features_{i}" for i in range(4)] if features else ["logits"]
    assert [value.name for value in session.get_outputs()] == names
    assert [(value.name, value.shape) for value in session.get_inputs()] == [("image", ["batch", 3, "height", "width"])]
    model = eager(checkpoints(name), name)
    for image in images():
        outputs = [torch.from_numpy(output) for output in session.run(None, {"image": image.numpy()})]
        assert_near(outputs, expected(model, image, features))


def test_onnx_is_portable(exported: Callable[..., Path]) -> None:
    onnx = pytest.importorskip("onnx", reason='ONNX needs pip install "subquad[export]"')
    model = onnx.load(exported("test_vmamba", "onnx"))
    onnx.checker.check_model(model, full_check=True)
    assert [opset.domain for opset in model.opset_import] == [""]
    assert not model.functions


def test_safetensors_holds_our_names(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    path = checkpoints("test_vmamba")
    written = export.run(Options("test_vmamba", "safetensors", tmp_path / "weights.safetensors", path))
    target = eager(path, "test_vmamba").state_dict()
    tensors = load_file(written)
    assert tensors.keys() == target.keys()
    assert all(torch.equal(tensors[name], target[name]) for name in target)
    with safe_open(written, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_hf_folder_restores_classes_and_channels(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {"num_classes": 7, "in_chans": 4}
    path = checkpoints("test_vmamba", **sizes)
    (tmp_path / "model").mkdir()  # an empty folder may be there
    folder = export.run(Options("test_vmamba", "hf", tmp_path / "model", path, **sizes))
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    image = torch.randn(2, 4, 40, 56)
    with torch.no_grad():
        torch.testing.assert_close(loaded(image), eager(path, "test_vmamba", **sizes)(image), rtol=0, atol=0)
    assert loaded.num_classes == 7
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3)(image).shape == (2, 3)


@pytest.mark.parametrize(("kind", "name"), [("safetensors", "x.safetensors"), ("hf", "folder")])
def test_other_users_may_read_what_was_written(kind: Any, name: str, tmp_path: Path) -> None:
    written = export.run(Options("test_vmamba", kind, tmp_path / name, check=False))
    (tmp_path / "ordinary").touch()
    files = sorted(written.iterdir()) if written.is_dir() else [written]
    assert {file.stat().st_mode for file in files} == {(tmp_path / "ordinary").stat().st_mode}


@pytest.mark.parametrize("upstream", [False, True])
def test_classes_are_those_of_the_checkpoint(upstream: bool, checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    path = checkpoints("test_vmamba", num_classes=7)
    target = load_file(path)
    if upstream:
        renamed = {name.replace("head.fc.", "classifier.head."): value for name, value in target.items()}
        path = tmp_path / "upstream.safetensors"
        save_file(renamed, path)
    written = export.run(Options("test_vmamba", "safetensors", tmp_path / "x.safetensors", path))
    assert torch.equal(load_file(written)["head.fc.weight"], target["head.fc.weight"])
    with pytest.raises(ValueError, match=r"head\.fc\.weight is \(7, \d+\), expected \(3, "):
        export.run(Options("test_vmamba", "safetensors", tmp_path / "y.safetensors", path, num_classes=3))


def test_a_program_that_differs_is_refused() -> None:
    options = Options("test_vmamba", "torch", Path("unused.pt2"), image_size=TRACED)
    model = timm.create_model("test_vmamba").eval()
    assert "largest difference 0 " in export._compare(model, lambda image: [model(image)], options)
    for wrong in (1 + 2 * export.TOLERANCE, float("nan")):
        with pytest.raises(RuntimeError, match="differs from the model"):
            export._compare(model, lambda image, wrong=wrong: [wrong * model(image)], options)
    with pytest.raises(RuntimeError, match="gives shapes"):
        export._compare(model, lambda image: [model(image)[:1]], options)


@pytest.mark.parametrize(("kind", "name"), [("safetensors", "x.safetensors"), ("hf", "folder")])
def test_nothing_appears_under_the_final_name_before_the_check(
    kind: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> str:
        (hidden,) = tmp_path.iterdir()
        assert hidden.name.startswith(".") and (hidden / name).exists()
        raise RuntimeError("differs")

    monkeypatch.setattr(export, "_compare_tensors", refuse)
    with pytest.raises(RuntimeError, match="differs"):
        export.run(Options("test_vmamba", kind, tmp_path / name))
    assert not list(tmp_path.iterdir())


def test_an_existing_file_survives_a_failed_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("the file before")
    monkeypatch.setattr(export, "load_file", lambda path: {})
    with pytest.raises(RuntimeError, match="does not load back"):
        export.run(Options("test_vmamba", "safetensors", path))
    assert path.read_text() == "the file before"
    monkeypatch.undo()
    export.run(Options("test_vmamba", "safetensors", path))
    assert load_file(path)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "model": ({"model": "vmamba_tinny"}, ValueError, "unknown model 'vmamba_tinny', did you mean vmamba_tiny"),
    "format": ({"format": "tflite"}, ValueError, "unknown format 'tflite', expected one of torch, onnx"),
    "suffix": ({"output": "model.bin"}, ValueError, "must be a .onnx file, got .*model.bin"),
    "folder": ({"output": "nowhere/model.onnx"}, FileNotFoundError, "no folder .*nowhere"),
    "file for a folder": ({"format": "hf", "output": "file"}, ValueError, "file exists and is not an empty folder"),
    "full folder": ({"format": "hf", "output": "full"}, ValueError, "full exists and is not an empty folder"),
    "folder for a file": ({"output": "folder.onnx"}, ValueError, "folder.onnx is a folder, expected a file"),
    "small": ({"image_size": (96, 32)}, ValueError, r"at least 64, got \(96, 32\)"),
    "old opset": ({"opset": 11}, ValueError, "opset must be from 18 to 23, got 11"),
    "new opset": ({"opset": 99}, ValueError, "opset must be from 18 to 23, got 99"),
    "nothing released": ({"pretrained": True}, ValueError, "'test_vmamba' has no released weights"),
    "opset elsewhere": ({"format": "hf", "output": "new", "opset": 20}, ValueError, "opset does not apply to .* hf"),
    "features elsewhere": ({"format": "hf", "output": "new", "features": True}, ValueError, "features does not apply"),
    "classes": ({"num_classes": -1}, ValueError, "num_classes must not be negative, got -1"),
    "channels": ({"in_chans": 0}, ValueError, "in_chans must be at least 1, got 0"),
    "two sources": ({"pretrained": True, "checkpoint": Path("file")}, ValueError, "exclude each other"),
    "no checkpoint": ({"checkpoint": Path("missing.pth")}, FileNotFoundError, "missing.pth"),
    "no tensors": ({"checkpoint": "file"}, ValueError, "found a file of unknown type"),
}


@pytest.mark.parametrize(("given", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_options_are_refused_before_any_work(
    given: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a model")
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    options = {"model": "test_vmamba", "format": "onnx", "output": "model.onnx"} | given
    for name in {"output", "checkpoint"} & options.keys():
        options[name] = tmp_path / options[name]
    with pytest.raises(error, match=message):
        export.run(Options(**options))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(ImportError, match=r'needs onnxruntime: pip install "subquad\[export\]"'):
        export.run(Options("test_vmamba", "onnx", tmp_path / "model.onnx"))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tyro", reason='the command line needs pip install "subquad[export]"')
    from subquad.cli import main

    output = tmp_path / "model.pt2"
    words = ["--model", "test_vmamba", "--format", "torch", "-o", str(output), "--image-size", "64", "96", "--features"]
    assert main(["export", *words]) == 0
    assert "checked at 1x96x96 and 3x72x133: largest difference" in capsys.readouterr().out
    assert output.exists()
    assert main(["export", *words[:3], "onnx", *words[4:]]) == 2
    assert "output must be a .onnx file" in capsys.readouterr().err

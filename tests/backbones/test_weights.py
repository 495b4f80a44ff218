"""Foreign checkpoints: nothing in a file runs, what is wrong with it is said, and tensors arrive bit for bit."""

from __future__ import annotations

import argparse
import builtins
import collections
import io
import os
import pickle
import re
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from subquad.backbones import weights
from subquad.backbones.registry import check_any_model, model_names

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])

# torch's reader of the legacy format compares the source code of pickled modules, and finds that of the placeholder.
pytestmark = pytest.mark.filterwarnings("ignore::torch.serialization.SourceChangeWarning")


class Payload:
    """An object whose unpickling calls ``function(*args)``."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def _bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


PAYLOADS: dict[str, Callable[[Path], Payload]] = {
    "os.system": lambda path: Payload(os.system, f"touch {path}"),
    "exec": lambda path: Payload(builtins.exec, f"open({str(path)!r}, 'w')"),
    "eval": lambda path: Payload(builtins.eval, f"open({str(path)!r}, 'w')"),
    "open": lambda path: Payload(builtins.open, str(path), "w"),
    "nested pickle": lambda path: Payload(pickle.loads, pickle.dumps(Payload(os.system, f"touch {path}"))),
    "nested torch.load": lambda path: Payload(
        torch.storage._load_from_bytes, _bytes(Payload(os.system, f"touch {path}"))
    ),
}
"""What a hostile file may hold: each creates the file at ``path`` when it is unpickled."""


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def _save(value: Any, path: Path, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


# Nothing runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAYLOADS)
def test_payload_works_where_pickles_are_trusted(name: str, sentinel: Path) -> None:
    """Otherwise the tests below could not fail."""
    pickle.loads(pickle.dumps(PAYLOADS[name](sentinel)))
    assert sentinel.exists()


@FORMATS
@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("place", ["beside", "config", "optimizer"])
def test_payload_beside_the_weights(place: str, name: str, zipped: bool, sentinel: Path, tmp_path: Path) -> None:
    payload = PAYLOADS[name](sentinel)
    beside = {
        "beside": {"extra": payload},
        "config": {"config": argparse.Namespace(name="x", hook=payload, lr=np.float64(1e-3))},
        "optimizer": {"optimizer": {"state": {0: {"step": payload}}, "param_groups": [{"params": [payload]}]}},
    }[place]
    path = _save(beside | {"model": {"weight": torch.ones(2)}}, tmp_path / "hostile.pth", zipped)
    state_dict = weights.unwrap(weights.read_checkpoint(path))
    assert state_dict.keys() == {"weight"} and torch.equal(state_dict["weight"], torch.ones(2))
    assert not sentinel.exists()


@FORMATS
@pytest.mark.parametrize("name", PAYLOADS)
def test_payload_among_the_weights(name: str, zipped: bool, sentinel: Path, tmp_path: Path) -> None:
    state = {"weight": torch.ones(2), "bias": PAYLOADS[name](sentinel)}
    path = _save({"model": state}, tmp_path / "hostile.pth", zipped)
    with pytest.raises(ValueError, match=r"'model' has a pickled object of .* at 'bias', expected a tensor"):
        weights.unwrap(weights.read_checkpoint(path))
    assert not sentinel.exists()


@FORMATS
@pytest.mark.parametrize("name", PAYLOADS)
def test_payload_instead_of_a_checkpoint(name: str, zipped: bool, sentinel: Path, tmp_path: Path) -> None:
    path = _save(PAYLOADS[name](sentinel), tmp_path / "hostile.pth", zipped)
    with pytest.raises(ValueError, match=r"hostile\.pth: found a pickled object of .*, expected a dict"):
        weights.read_checkpoint(path)
    assert not sentinel.exists()


@FORMATS
def test_no_module_is_imported(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile_module.py").write_text("class Config(dict):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__("hostile_module")
    path = _save({"model": {"w": torch.ones(1)}, "config": module.Config(a=1)}, tmp_path / "c.pth", zipped)
    monkeypatch.delitem(sys.modules, "hostile_module")
    weights.unwrap(weights.read_checkpoint(path))
    assert "hostile_module" not in sys.modules


def test_pickle_cannot_change_a_function_of_torch(tmp_path: Path) -> None:
    """BUILD sets attributes of whatever lies on the stack: here new defaults for a function on the allow-list."""
    before = torch._utils._rebuild_tensor_v2.__defaults__
    path = tmp_path / "build.pth"
    with zipfile.ZipFile(path, "w") as archive:  # as torch writes them, around a handwritten pickle
        archive.writestr(
            "a/data.pkl", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}U\x0c__defaults__K\x01\x85s\x86b."
        )
        archive.writestr("a/version", "3\n")
    with pytest.raises(ValueError, match="sets attributes of a function"):
        weights.read_checkpoint(path)
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_torchscript_archive_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    with pytest.raises(ValueError, match="found a TorchScript archive"):
        weights.read_checkpoint(path)
    with path.open("rb") as file, pytest.raises(ValueError, match="map_location"):
        weights._torch_load(file)  # were it not recognised before


def test_tar_archive_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's oldest format is a tar archive, whose members it writes to disk; one can begin like a pickle."""
    path = tmp_path / "old.pth"
    with tarfile.open(path, "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as archive:
        for name in ("\x80\x02", "storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert path.read_bytes().startswith(b"\x80\x02") and tarfile.is_tarfile(path)
    opened: list[Any] = []
    monkeypatch.setattr(tarfile, "open", lambda *args, **kwargs: opened.append(args))
    with pytest.raises(ValueError, match=r"old\.pth"):
        weights.read_checkpoint(path)
    assert not opened


# What real files hold ----------------------------------------------------------------------------------------------


def _tensors() -> dict[str, Tensor]:
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    shared = torch.arange(12.0)
    return {
        "float32": values,
        "float16": values.half(),
        "bfloat16": values.bfloat16(),
        "float64": values.double(),
        "int64": torch.arange(5),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "transposed": values.t(),
        "part": shared[2:8].view(2, 3),
        "overlapping_part": shared[::2],
    }


def _assert_bit_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        bits, expected_bits = (tensor.flatten().contiguous().view(torch.uint8) for tensor in (found[name], value))
        assert torch.equal(bits, expected_bits), name


@FORMATS
def test_tensors_are_bit_equal(zipped: bool, tmp_path: Path) -> None:
    path = _save({"model": collections.OrderedDict(_tensors())}, tmp_path / "c.pth", zipped)
    _assert_bit_equal(weights.unwrap(weights.read_checkpoint(path)), _tensors())


def test_safetensors_are_bit_equal(tmp_path: Path) -> None:
    expected = {name: value.contiguous().clone() for name, value in _tensors().items()}
    path = tmp_path / "any_name.bin"
    save_file(expected, path)
    _assert_bit_equal(weights.unwrap(weights.read_checkpoint(path)), expected)


@FORMATS
def test_parameters_arrive_as_plain_tensors(zipped: bool, tmp_path: Path) -> None:
    module = nn.Linear(2, 3)
    path = _save(dict(module.named_parameters()), tmp_path / "c.pth", zipped)
    state_dict = weights.unwrap(weights.read_checkpoint(path))
    _assert_bit_equal(state_dict, module.state_dict())
    assert not any(value.requires_grad for value in state_dict.values())


def _training_state(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What stands beside the weights in files of the wild, yacs's and a vanished package's classes included."""
    yacs = types.ModuleType("yacs.config")
    exec("class CfgNode(dict):\n    pass\nclass Registry(list):\n    pass\nclass Tags(set):\n    pass", yacs.__dict__)
    for name in ("CfgNode", "Registry", "Tags"):
        getattr(yacs, name).__module__ = "yacs.config"
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", yacs)
    node = yacs.CfgNode(DATA=yacs.CfgNode(IMG_SIZE=224), NAMES=["a", "b"])
    node.__dict__["__immutable__"] = True
    module = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {
        "config": node,
        "subclasses": [yacs.Registry([1, 2]), yacs.Tags({"a"})],
        "args": argparse.Namespace(lr=0.1, data=Path("x")),
        "max_accuracy": np.float64(82.6),
        "confusion": np.eye(3),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0]).state_dict(),
        "ema": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm2d(2)),
        "of torch": (torch.Size([1, 2]), torch.device("cpu"), torch.bfloat16),
        "rng": torch.get_rng_state(),
        "epoch": 264,
        "model_ema": None,
    }


@FORMATS
def test_training_state_does_no_harm(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        checkpoint = _training_state(patch) | {"model": _tensors()}
        path = _save(checkpoint, tmp_path / "c.pth", zipped)
    assert "yacs.config" not in sys.modules
    read = weights.read_checkpoint(path)
    assert read.keys() == checkpoint.keys()
    assert read["epoch"] == 264
    assert isinstance(read["config"], weights.Placeholder) and read["config"].origin == "yacs.config.CfgNode"
    assert isinstance(read["ema"], weights.Placeholder)
    _assert_bit_equal(weights.unwrap(read), _tensors())
    assert "yacs.config" not in sys.modules


@FORMATS
def test_whole_module_is_no_state_dict(zipped: bool, tmp_path: Path) -> None:
    path = _save(nn.Linear(2, 2), tmp_path / "module.pth", zipped)
    with pytest.raises(ValueError, match=r"found a pickled object of torch\.nn\.modules\.linear\.Linear"):
        weights.read_checkpoint(path)
    read = weights.read_checkpoint(_save({"model_ema": nn.Linear(2, 2), "model": _tensors()}, path, zipped))
    with pytest.raises(ValueError, match=r"'model_ema' is a pickled object of torch\.nn\.modules\.linear\.Linear"):
        weights.unwrap(read, "model_ema")
    _assert_bit_equal(weights.unwrap(read), _tensors())


# Errors ----------------------------------------------------------------------------------------------------------


DAMAGED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "found an empty file"),
    "git-lfs pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "found a git-lfs pointer"),
    "web page": (lambda: b"\n<!DOCTYPE html><html></html>", "found a web page"),
    "text": (lambda: b"hello, world", "starts with b'hello, w'"),
    "truncated zip": (lambda: _bytes(_tensors())[:-100], "found a truncated or damaged zip archive"),
    "truncated pickle": (lambda: pickle.dumps(list(range(1000)), protocol=2)[:-50], "found a truncated"),
    "other pickle": (lambda: pickle.dumps({"a": 1}, protocol=2), "Invalid magic number"),
    "truncated safetensors": (lambda: save({"w": torch.ones(9)})[:-10], "found a truncated or damaged safetensors"),
    "truncated header": (lambda: save({"w": torch.ones(9)})[:20], "found a truncated or damaged safetensors"),
    "tensor": (lambda: _bytes(torch.ones(1)), "found an object of type Tensor, expected a dict"),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_file(name: str, suffix: str, tmp_path: Path) -> None:
    make, message = DAMAGED[name]
    path = tmp_path / f"file{suffix}"
    path.write_bytes(make())
    with pytest.raises(ValueError) as error:
        weights.read_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_truncated_legacy_file(cut: int, tmp_path: Path) -> None:
    path = _save({"w": torch.ones(100)}, tmp_path / "c.pth", False)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=r"c\.pth: found a truncated"):
        weights.read_checkpoint(path)


def test_compressed_archive(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10000))
    with pytest.raises(ValueError, match="found a compressed zip archive"):
        weights.read_checkpoint(path)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pth: no such file, expected a safetensors file or a torch"):
        weights.read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="found a directory, expected a safetensors file or a torch checkpoint"):
        weights.read_checkpoint(tmp_path)


# Names -----------------------------------------------------------------------------------------------------------

ONE, TWO = torch.ones(1), torch.full((1,), 2.0)


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"w": ONE},
        {"w": ONE, "epoch": 3, "note": "x"},
        {"model": {"w": ONE}},
        {"model": {"w": TWO}, "model_ema": {"w": ONE}},
        {"state_dict": {"w": TWO}, "state_dict_ema": {"w": ONE}},
        {"model": {"w": ONE}, "model_ema": None},
        {"model": {"w": ONE}, "model_ema": {}, "state_dict_ema": {"step": 1}, "state_dict": {"w": TWO}},
        {"state_dict": {"module.w": ONE}},
        {"_orig_mod.module.w": ONE},
        {"module._orig_mod.w": ONE},
        {"state_dict": {"backbone.w": ONE, "neck.w": TWO, "bbox_head.w": TWO}, "meta": {}},
        {"state_dict": {"model.w": ONE, "criterion.w": TWO}},
        {"state_dict": {"module.model.backbone.w": ONE, "module.model.head.w": TWO}},
    ],
    ids=str,
)
def test_unwrap(checkpoint: dict[str, Any]) -> None:
    state_dict = weights.unwrap(checkpoint)
    assert state_dict.keys() == {"w"} and state_dict["w"] is ONE
    assert weights.unwrap(state_dict) == state_dict


def test_unwrap_a_chosen_entry() -> None:
    checkpoint = {"model": {"w": TWO}, "model_ema": {"w": ONE}, "epoch": 1}
    assert weights.unwrap(checkpoint, "model")["w"] is TWO
    with pytest.raises(ValueError, match="no entry 'net' in the checkpoint, found model, model_ema, epoch"):
        weights.unwrap(checkpoint, "net")
    with pytest.raises(ValueError, match="'epoch' is an object of type int, expected a dict of tensors"):
        weights.unwrap(checkpoint, "epoch")


@pytest.mark.parametrize("checkpoint", [{}, {"model": {}}, {"epoch": 1, "net": {"w": ONE}}], ids=str)
def test_unwrap_without_tensors(checkpoint: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="holds no tensors"):
        weights.unwrap(checkpoint)


def test_rename() -> None:
    state_dict = {"layers.0.norm.weight": ONE, "layers.1.mask": TWO, "head.weight": TWO}
    rules = [(r"^layers\.(\d+)", r"stages.\1"), (r"^stages\.0\.", "first."), (r"\.mask$", None)]
    assert weights.rename(state_dict, rules) == {"first.norm.weight": ONE, "head.weight": TWO}
    with pytest.raises(ValueError, match=r"'layers\.0\.norm\.weight' and 'head\.weight' both become 'weight'"):
        weights.rename(state_dict, [(r".*weight$", "weight")])


# Models ----------------------------------------------------------------------------------------------------------

MODEL = "test_vmamba"
CLASSES = 7


@pytest.fixture
def model() -> Any:
    return timm.create_model(MODEL, num_classes=CLASSES)


@pytest.fixture
def state(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.rand(value.shape, generator=generator) for name, value in model.state_dict().items()}


def test_load_checkpoint(model: nn.Module, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = _save({"model_ema": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "c.pth")
    assert not weights.load_checkpoint(model, path)
    _assert_bit_equal(model.state_dict(), state)


def test_every_misfit_is_listed(model: nn.Module, state: dict[str, Tensor], tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    missing = ["norm.weight", "head.fc.bias"]
    damaged = {name: value for name, value in state.items() if name not in missing}
    damaged |= {"norm.bias": torch.zeros(3), "extra.weight": ONE, "extra.bias": ONE}
    path = _save(damaged, tmp_path / "c.pth")
    with pytest.raises(ValueError) as error:
        weights.load_checkpoint(model, path)
    text = str(error.value)
    assert "c.pth does not fit VMamba" in text
    assert "missing (2): norm.weight, head.fc.bias" in text
    assert "unexpected (2): extra.weight, extra.bias" in text
    assert f"wrong shape (1): norm.bias is (3,), expected {tuple(state['norm.bias'].shape)}" in text
    assert "another model" not in text
    with pytest.raises(ValueError, match="wrong shape"):
        weights.load_checkpoint(model, path, strict=False)
    _assert_bit_equal(model.state_dict(), before)


def test_weights_of_another_model_are_not_listed_in_full(model: nn.Module, tmp_path: Path) -> None:
    other = timm.create_model("test_nat").state_dict()
    path = _save(other, tmp_path / "c.pth")
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in other]
    for load in (
        lambda: weights.load_checkpoint(model, path),
        lambda: timm.create_model(MODEL, **_overlay(path, custom_load=True)),
    ):
        with pytest.raises(ValueError) as error:
            load()
        first, hint, *lists = str(error.value).splitlines()
        assert first == f"{path} does not fit VMamba:"
        assert re.fullmatch(rf"only \d+ of {len(other)} tensors fit: these seem to be weights of another model", hint)
        assert lists[0] == f"missing ({len(missing)}): {', '.join(missing[:3])} and {len(missing) - 3} more"
        assert [line.partition(" (")[0] for line in lists] == ["missing", "unexpected", "wrong shape"]
        assert all(line.endswith(" more") for line in lists)


def test_names_are_listed_in_full_where_a_part_fits(state: dict[str, Tensor]) -> None:
    """Every name counts for someone who maps the names of a file."""
    names = list(state)
    mapped = {name if i % 2 else f"old.{name}": state[name] for i, name in enumerate(names)}
    text = str(weights.compare(mapped, state))
    assert text.startswith(f"missing ({len(names[::2])}): {', '.join(names[::2])}\nunexpected (")
    assert " more" not in text


def test_names_are_listed_in_full_behind_a_prefix_and_in_small_files(state: dict[str, Tensor]) -> None:
    prefixed = {f"student.encoder.{name}": value for name, value in state.items()}
    assert str(weights.compare(prefixed, state)).startswith(f"missing ({len(state)}): {', '.join(state)}\nunexpected (")
    head = {"head.fc.weight": torch.zeros(3, 5)}
    assert "another model" not in str(weights.compare(head, {"head.fc.weight": torch.zeros(2, 5)}))


def test_load_a_part(model: nn.Module, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = _save({"norm.weight": state["norm.weight"], "extra": ONE}, tmp_path / "c.pth")
    difference = weights.load_checkpoint(model, path, strict=False)
    assert difference.unexpected == ["extra"] and set(difference.missing) == state.keys() - {"norm.weight"}
    assert torch.equal(model.state_dict()["norm.weight"], state["norm.weight"])


def test_model_of_no_family(tmp_path: Path) -> None:
    path = _save({"weight": torch.ones(2, 2)}, tmp_path / "c.pth")
    with pytest.raises(TypeError, match="got Linear"):
        weights.load_checkpoint(nn.Linear(2, 2, bias=False), path)


# timm ------------------------------------------------------------------------------------------------------------


def _overlay(path: Path, **overlay: Any) -> dict[str, Any]:
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "num_classes": CLASSES, **overlay}}


@pytest.mark.parametrize(
    "options",
    [{}, {"num_classes": 3}, {"num_classes": 0}, {"in_chans": 1}, {"in_chans": 5, "num_classes": 2}],
    ids=str,
)
def test_adapts_as_timm_does(options: dict[str, int], state: dict[str, Tensor], tmp_path: Path) -> None:
    """The same file through timm's reader and through ours, into other input channels and classes."""
    path = _save({"model": state, "epoch": 1}, tmp_path / "c.pth")
    torch.manual_seed(0)  # for the new classifier
    theirs = timm.create_model(MODEL, **_overlay(path), **options)
    torch.manual_seed(0)
    ours = timm.create_model(MODEL, **_overlay(path, custom_load=True), **options)
    _assert_bit_equal(ours.state_dict(), theirs.state_dict())
    adapted = {name for name, value in ours.state_dict().items() if not torch.equal(value, state.get(name, ONE))}
    expected = {"head.fc.weight", "head.fc.bias"} if options.get("num_classes") else set()
    assert adapted == expected | ({"stem.conv1.weight"} if "in_chans" in options else set())


def test_features_only(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = _save({"model": state}, tmp_path / "c.pth")
    features = timm.create_model(MODEL, **_overlay(path, custom_load=True), features_only=True, out_indices=(1, 3))
    loaded = {name.removeprefix("model."): value for name, value in features.state_dict().items()}
    assert {"stem.conv1.weight", "stages.3.blocks.0.mixer.A_log"} <= loaded.keys() <= state.keys()
    _assert_bit_equal(loaded, {name: state[name] for name in loaded})


def test_what_timm_may_not_adapt_must_fit(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = _save({"model": state | {"norm.bias": torch.zeros(3), "extra": ONE}}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"unexpected \(1\): extra\nwrong shape \(1\): norm.bias"):
        timm.create_model(MODEL, **_overlay(path, custom_load=True), num_classes=3, in_chans=1)


@pytest.mark.parametrize("way", ["file", "url", "timm's file", "checkpoint_path"])
@FORMATS
def test_hostile_file_through_timm(
    way: str, zipped: bool, state: dict[str, Tensor], sentinel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = {"model": state, "config": PAYLOADS["os.system"](sentinel)}
    path = _save(checkpoint, tmp_path / "hostile.pth", zipped)
    # Stands for the download.
    monkeypatch.setattr("timm.models._builder.download_cached_file", lambda *args, **kwargs: str(path))
    options = {
        "file": _overlay(path, custom_load=True),
        "url": _overlay(path, file="", url="https://example.org/hostile.pth", custom_load=True),
        "timm's file": _overlay(path),
        "checkpoint_path": {"checkpoint_path": str(path), "num_classes": CLASSES},
    }[way]
    if way in ("file", "url"):
        _assert_bit_equal(timm.create_model(MODEL, **options).state_dict(), state)
    else:
        with pytest.raises(RuntimeError, match="weights_only=True blocked"):
            timm.create_model(MODEL, **options)
    assert not sentinel.exists()


def test_official_files_go_through_our_reader() -> None:
    """Official checkpoints hold more than tensors: a default cfg with an address asks for ``load_pretrained``."""
    cfgs = {name: timm.get_pretrained_cfg(name) for name in model_names()}
    with_address = {name: cfg for name, cfg in cfgs.items() if cfg.url}
    assert "vmamba_tiny" in with_address
    assert [name for name, cfg in with_address.items() if not cfg.custom_load] == []


def test_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the model and the address are named; weights in a folder of their authors are pointed to."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise URLError("no network")

    monkeypatch.setattr("timm.models._builder.load_pretrained", fail)
    with pytest.raises(ConnectionError, match=r"weights of 'vmamba_tiny' from https://github.com/.*no network"):
        timm.create_model("vmamba_tiny", pretrained=True)
    with pytest.raises(ValueError, match=r"'mavit_tiny' has no released weights.*huggingface.co/.*`subquad convert`"):
        check_any_model("mavit_tiny", pretrained=True)
    monkeypatch.undo()
    with pytest.raises(
        RuntimeError, match=r"No pretrained weights exist for vig_tiny.*huggingface.co/.*`subquad convert`"
    ):
        timm.create_model("vig_tiny", pretrained=True)

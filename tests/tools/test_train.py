"""``subquad train`` from options to files: accuracy, artefacts, interruption, bad input."""

from __future__ import annotations

import csv
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from subquad.tools import train
from subquad.tools.train import Options, run
from subquad.tools.training import checkpoints, session

COLUMNS = ["epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "seconds", "images_per_second"]
FILES = {"best.safetensors", "last.safetensors", "state.pt", "metrics.csv", "curves.png", "load.txt", "options.json"}


@pytest.fixture(autouse=True, scope="module")
def one_cpu_thread() -> Iterator[None]:
    """Sums depend neither on the number of cores nor on a GPU, so that processes can be compared bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield
    torch.set_num_threads(threads)


def _quick(folder: Path) -> Options:
    """A run of about a second that uses every source of randomness and every piece of state.

    The data: two classes of 20 noisy pictures, one reddish and one bluish.
    """
    generator = torch.Generator().manual_seed(0)
    for name, channel in (("blue", 2), ("red", 0)):
        (folder / "photos" / name).mkdir(parents=True)
        for index in range(20):
            pixels = torch.randint(0, 100, (20, 24, 3), generator=generator)
            pixels[..., channel] += 120
            Image.fromarray(pixels.byte().numpy()).save(folder / "photos" / name / f"{index}.png")
    return Options(
        data=folder / "photos",
        model="test_resnet",
        output=folder / "run",
        epochs=2,
        batch_size=8,
        image_size=32,
        aug="heavy",
        mixup=0.2,
        cutmix=0.2,
        drop_path_rate=0.1,
        label_smoothing=0.1,
        ema=0.9,
        grad_accumulation=3,
        layer_decay=0.9,
        workers=0,
    )


@pytest.fixture
def quick(tmp_path: Path) -> Options:
    return _quick(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a quick run that nothing interrupted."""
    return run(_quick(tmp_path_factory.mktemp("whole"))).output


def _rows(output: Path) -> list[dict[str, str]]:
    with (output / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _load(line: str) -> nn.Module:
    """Run the line that a user is told to run."""
    names: dict[str, Any] = {}
    exec(line, names)
    return names["model"].eval()


def _assert_same_run(output: Path, expected: Path) -> None:
    for name in ("best.safetensors", "last.safetensors"):
        found, wanted = load_file(output / name), load_file(expected / name)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name
    timing = {"seconds", "images_per_second"}
    for row, other in zip(_rows(output), _rows(expected), strict=True):
        assert {key: row[key] for key in row.keys() - timing} == {key: other[key] for key in other.keys() - timing}
    assert {path.name for path in output.iterdir()} == FILES  # no temporary file is left


def test_digits_train_and_load_as_the_printed_line_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "it's a run"
    summary = run(Options(output=output, epochs=3, aug="none"))
    printed = capsys.readouterr().out
    assert summary.load_line in printed.splitlines()
    assert (output / "load.txt").read_text(encoding="utf-8") == summary.load_line + "\n"
    assert "timm.create_model('test_vmamba', num_classes=10," in summary.load_line
    assert summary.best_accuracy > 0.7
    assert {path.name for path in output.iterdir()} == FILES
    rows = _rows(output)
    assert list(rows[0]) == COLUMNS
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[2]["train_loss"]) < float(rows[0]["train_loss"])
    with Image.open(output / "curves.png") as curves:
        curves.verify()

    model = _load(summary.load_line)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    same = timm.create_model("test_vmamba", num_classes=10).eval()
    same.load_state_dict(torch.load(output / "state.pt", weights_only=True)["model"])
    with torch.no_grad():
        assert summary.best_epoch == 3, "the weights of the last state are then the best"
        assert torch.equal(model(images), same(images))


def test_reported_accuracy_is_that_of_the_saved_model(quick: Options) -> None:
    """Counted again with timm's own transform; a broken picture counts neither as right nor as wrong, and is named."""
    data = quick.data
    assert data is not None
    for part, chosen in (("train", range(12)), ("val", range(12, 20))):
        for name in ("blue", "red"):
            (data / part / name).mkdir(parents=True, exist_ok=True)
            for index in chosen:
                (data / name / f"{index}.png").rename(data / part / name / f"{index}.png")
    for broken in (data / "train" / "red" / "3.png", data / "val" / "blue" / "15.png"):
        broken.write_bytes(broken.read_bytes()[:100])
    with pytest.warns(UserWarning, match="skipped a broken image") as caught:
        summary = run(replace(quick, workers=1, aug="light"))
    lines = [str(warning.message) for warning in caught if "skipped a broken image" in str(warning.message)]
    assert len(lines) == 2, "once each, not once an epoch"
    assert any("15.png" in line for line in lines) and any("3.png" in line for line in lines)

    model = _load(summary.load_line)
    config = timm.data.resolve_model_data_config(model) | {"input_size": (3, 32, 32)}
    transform = timm.data.create_transform(**config)
    files = [path for path in sorted((data / "val").glob("*/*.png")) if path.name != "15.png" or "red" in path.parts]
    with torch.no_grad():
        answers = model(torch.stack([transform(Image.open(path).convert("RGB")) for path in files])).argmax(dim=1)
    right = sum(["blue", "red"][int(answer)] == path.parent.name for answer, path in zip(answers, files, strict=True))
    assert len(files) == 15
    assert summary.best_accuracy == pytest.approx(right / 15, abs=1e-6)


def test_killed_run_resumes_to_the_same_result(quick: Options, tmp_path: Path) -> None:
    endless = replace(quick, epochs=8, output=tmp_path / "killed")
    names = "from pathlib import Path, PosixPath, WindowsPath; from subquad.tools.train import Options, run"
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", f"{names}; run({endless!r})"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    state = tmp_path / "killed" / "state.pt"
    deadline = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = len(checkpoints.load_state(state.parent)["metrics"])  # type: ignore[index]
    assert 1 <= done < 8, "killed on its way"

    run(Options(output=tmp_path / "killed", resume=True))
    run(replace(endless, output=tmp_path / "whole"))
    _assert_same_run(tmp_path / "killed", tmp_path / "whole")


class _Crash(BaseException):
    """Nothing catches it, as nothing catches a power cut."""


@pytest.mark.parametrize("writes", [1, 2, 3, 4, 5, 7, 8, 9])
def test_crash_before_a_file_is_in_place(
    quick: Options, whole: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Files in order: options, then each epoch's state, best (if it improves), last, metrics, curves and load line."""
    count = 0
    replace_file = os.replace

    def crash(source: Path, target: Path) -> None:
        nonlocal count
        count += 1
        if count == writes:
            Path(source).write_bytes(Path(source).read_bytes()[:7])
            raise _Crash
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(_Crash):
        run(quick)
    monkeypatch.undo()
    summary = run(replace(quick, resume=writes > 1))  # before there are options there is nothing to resume
    _assert_same_run(summary.output, whole)


def test_finished_run_resumes_to_nothing(quick: Options) -> None:
    before = run(quick)
    weights = (before.output / "last.safetensors").read_bytes()
    assert run(Options(output=quick.output, resume=True, epochs=12)) == before, "a default counts as not given"
    assert (before.output / "last.safetensors").read_bytes() == weights


def _stop_after(epochs: int, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    run_epoch = train._train_epoch

    def interrupted(session: session.Session, epoch: int, *bar: Any) -> tuple[float, float, float]:
        if epoch > epochs:
            raise KeyboardInterrupt
        return run_epoch(session, epoch, *bar)

    with monkeypatch.context() as patch:
        patch.setattr(train, "_train_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(options)


def test_resume_needs_the_checkpoint_only_before_the_first_state(
    quick: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, moved = tmp_path / "start.pth", tmp_path / "moved.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), start)
    monkeypatch.chdir(tmp_path)
    quick = replace(quick, checkpoint=Path("start.pth"))
    whole, killed, early = (replace(quick, output=tmp_path / name) for name in ("whole", "killed", "early"))
    run(whole)
    _stop_after(1, killed, monkeypatch)
    _stop_after(0, early, monkeypatch)

    monkeypatch.chdir(tmp_path / "photos")
    run(Options(output=early.output, resume=True))
    _assert_same_run(tmp_path / "early", tmp_path / "whole")
    start.rename(moved)
    with pytest.raises(ValueError, match=r"checkpoint was .*start\.pth when .* cannot become .*moved\.pth"):
        run(Options(output=killed.output, resume=True, checkpoint=moved))
    run(Options(output=killed.output, resume=True))
    _assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_resume_does_not_load_released_weights_again(quick: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's name has released weights; nothing is downloaded here, as the start is made without them."""
    create_model = timm.create_model
    asked: list[bool] = []

    def offline(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        asked.append(pretrained)
        return create_model(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    _stop_after(0, replace(quick, pretrained=True), monkeypatch)
    _stop_after(1, Options(output=quick.output, resume=True), monkeypatch)
    run(Options(output=quick.output, resume=True))
    assert asked == [True, True, False], "there is a state from the end of the first epoch on"


def test_newest_run_is_resumed_by_default(quick: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no run to resume in 'runs'"):
        run(Options(resume=True))
    summary = run(replace(quick, output=None, epochs=1))
    assert summary.output.parent == Path("runs")
    assert summary.output.name.endswith("_test_resnet")
    assert run(Options(resume=True)) == summary


def test_resume_refuses_other_options_and_damaged_files(quick: Options) -> None:
    run(quick)
    assert quick.output is not None
    with pytest.raises(ValueError, match="already holds a run"):
        run(quick)
    with pytest.raises(ValueError, match=r"epochs was 2 .* cannot become 5"):
        run(replace(quick, resume=True, epochs=5))
    state = quick.output / "state.pt"
    state.write_bytes(state.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="not a readable training state"):
        run(replace(quick, resume=True))
    torch.save({"anything": Path("else")}, state)
    with pytest.raises(ValueError, match="not a readable training state"):
        run(replace(quick, resume=True))
    (quick.output / "options.json").write_text('{"epoch": 3}')
    with pytest.raises(ValueError, match="does not hold the options of a run"):
        run(replace(quick, resume=True))


def test_loss_that_is_not_finite_stops_the_run(quick: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    run_epoch = train._train_epoch

    def poisoned(session: session.Session, epoch: int, *bar: Any) -> tuple[float, float, float]:
        if epoch == 2:
            next(iter(session.net.parameters())).data.fill_(float("nan"))
        return run_epoch(session, epoch, *bar)

    monkeypatch.setattr(train, "_train_epoch", poisoned)
    with pytest.raises(FloatingPointError, match="the loss is nan in epoch 2, step 1"):
        run(quick)
    assert quick.output is not None
    assert len(_rows(quick.output)) == 1
    assert all(value.isfinite().all() for value in load_file(quick.output / "last.safetensors").values())
    monkeypatch.undo()
    assert len(_rows(run(replace(quick, resume=True)).output)) == 2


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_checkpoint_of_other_classes_is_a_start(quick: Options, tmp_path: Path) -> None:
    vmamba = replace(quick, model="test_vmamba", drop_path_rate=None, ema=None, lr=1e-9, epochs=1)
    source = timm.create_model("test_vmamba", num_classes=7)
    torch.save({"model": source.state_dict(), "config": _Payload(tmp_path / "ran")}, tmp_path / "old.pth")
    summary = run(replace(vmamba, checkpoint=tmp_path / "old.pth"))
    assert not (tmp_path / "ran").exists(), "the checkpoint's payload ran"
    found, wanted = load_file(summary.output / "last.safetensors"), source.state_dict()
    head = {
        f"{wanted_name}.{leaf}" for wanted_name in [source.pretrained_cfg["classifier"]] for leaf in ("weight", "bias")
    }
    assert {name for name in wanted if found[name].shape != wanted[name].shape} == head
    # The learning rate is next to nothing: whatever was loaded is still there.
    for name in wanted.keys() - head:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-5)

    (tmp_path / "wrong.pth").write_bytes(pickle.dumps([_Payload(tmp_path / "ran")]))
    with pytest.raises(ValueError, match=r"wrong\.pth"):
        run(replace(vmamba, checkpoint=tmp_path / "wrong.pth", output=tmp_path / "other"))
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match="missing"):
        run(replace(vmamba, checkpoint=tmp_path / "wrong.pth", output=tmp_path / "other"))
    assert not (tmp_path / "ran").exists() and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"epochs": -3}, "epochs must be at least 1, got -3"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"grad_accumulation": 0}, "grad_accumulation must be at least 1"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"warmup_epochs": 2.0}, "warmup_epochs must be less than the 2 epochs"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
        ({"val_fraction": 1.0}, "val_fraction must be between 0 and 1"),
        ({"ema": 1.5}, "ema must be between 0 and 1"),
        ({"layer_decay": 2.0}, r"layer_decay must be in \(0, 1\]"),
        ({"opt": "magic"}, "opt must be one of adamw, .* got 'magic'"),
        ({"aug": "some"}, "aug must be one of none, light, heavy, got 'some'"),
        ({"model": "test_vmaamba"}, "unknown model 'test_vmaamba'; did you mean .*test_vmamba"),
        ({"model": "test_vmamba", "drop_path_rate": None, "image_size": 8}, "image_size 8 is too small"),
        ({"model": "test_vmamba", "pretrained": True}, "'test_vmamba' has no released weights"),
        ({"pretrained": True, "checkpoint": Path("x.pth")}, "exclude each other"),
    ],
    ids=str,
)
def test_bad_options_are_refused_before_anything_is_written(
    quick: Options, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(replace(quick, **changes))
    assert quick.output is not None and not quick.output.exists()


def test_missing_files_are_refused(quick: Options, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data folder .* does not exist"):
        run(replace(quick, data=tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"checkpoint .*x\.pth' does not exist"):
        run(replace(quick, checkpoint=tmp_path / "x.pth"))
    with pytest.raises(FileNotFoundError, match=r"no run to resume in .*it has no options\.json"):
        run(replace(quick, resume=True))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not a folder"):
        run(replace(quick, output=tmp_path / "file"))
    assert quick.output is not None and not quick.output.exists()


def test_data_without_a_readable_picture_is_an_error(quick: Options) -> None:
    assert quick.data is not None
    for path in quick.data.glob("*/*.png"):
        path.write_bytes(b"broken")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match="none of the training images"):
        run(quick)


@pytest.mark.slow
def test_two_processes_train_one_model(quick: Options, tmp_path: Path) -> None:
    """Each validation image counts once, and one process writes."""
    assert quick.data is not None
    command = [sys.executable, "-P", "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    options = [
        "--data",
        str(quick.data),
        "--model",
        "test_resnet",
        "--image-size",
        "32",
        "--output",
        str(tmp_path / "run"),
    ]
    options += ["--epochs", "2", "--batch-size", "4", "--workers", "0", "--val-fraction", "0.25"]
    process = subprocess.run([*command, "-m", "subquad", "train", *options], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("load it with") == 1
    rows = _rows(tmp_path / "run")
    assert len(rows) == 2
    assert (float(rows[-1]["val_accuracy"]) * 10) % 1 == pytest.approx(0, abs=1e-4)
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES


def test_main_job_is_accurate_and_quick(tmp_path: Path) -> None:
    """`subquad train` as it is: 95 % on held-out digits within five minutes on two cores.

    The time is that of the processor, which other work on the machine does not lengthen: the run has one thread and no
    worker processes, so that it takes as long on an idle machine.
    """
    start = time.process_time()
    summary = run(Options(output=tmp_path / "run"))
    assert time.process_time() - start < 300
    assert summary.best_accuracy >= 0.95


@pytest.mark.gpu
def test_gpu_trains_in_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: accelerate keeps the device of the first run in a process."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    command = [sys.executable, "-P", "-m", "subquad", "train", "--output", str(tmp_path / "run")]
    options = ["--epochs", "4", "--amp", "fp16", "--ema", "0.9", "--workers", "2", "--aug", "none"]
    process = subprocess.run([*command, *options], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "test_vmamba on cuda" in process.stdout
    assert float(_rows(tmp_path / "run")[-1]["val_accuracy"]) > 0.8
    state = checkpoints.load_state(tmp_path / "run")
    assert state is not None and state["scaler"]["scale"] > 0

    state["metrics"], state["best_epoch"] = state["metrics"][:2], 1  # as if the last two epochs were still to come
    checkpoints.save_state(tmp_path / "run", state)
    process = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert len(_rows(tmp_path / "run")) == 4

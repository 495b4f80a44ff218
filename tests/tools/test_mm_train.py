"""``subquad mm_train`` from config to files: detectors and segmentors of five kinds, resumed, used, and refused."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmdet", reason='needs mmdet and mmseg: pip install "subquad[mm]"')
pytest.importorskip("albumentations", reason='needs albumentations: pip install "subquad[mm]"')

from subquad import configs
from subquad.tools import mm_run, mm_train
from subquad.tools.mm_train import Options
from subquad.tools.openmmlab import smoke

CHANNELS = [16, 24, 32, 48]

# Parts of each library that make a whole config, besides the runtime; the neck or heads that see the backbone's maps.
KINDS = {
    "mask-rcnn": ("mmdet", ["models/mask-rcnn_fpn", "datasets/coco_albu", "schedules/adamw_1x"]),
    "retinanet": ("mmdet", ["models/retinanet_fpn", "datasets/coco_boxes", "schedules/adamw_1x_retinanet"]),
    "cascade": ("mmdet", ["models/cascade-mask-rcnn_fpn", "datasets/coco_multi-scale", "schedules/adamw_3x"]),
    "upernet": ("mmseg", ["models/upernet", "datasets/ade20k_albu", "schedules/adamw_160k"]),
    "semantic-fpn": ("mmseg", ["models/semantic-fpn", "datasets/ade20k", "schedules/adamw_80k_semantic-fpn"]),
}
FITTING = {
    "retinanet": f"neck=dict(in_channels={CHANNELS[1:]})",
    "upernet": f"decode_head=dict(in_channels={CHANNELS}), auxiliary_head=dict(in_channels={CHANNELS[2]})",
}
# Heads that make a checkpoint of some megabytes instead of one gigabyte.
NARROW = {
    "mask-rcnn": ("model.roi_head.bbox_head.fc_out_channels=32",),
    "cascade": tuple(f"model.roi_head.bbox_head.{i}.fc_out_channels=32" for i in range(3)),
    "upernet": ("model.decode_head.channels=32",),
}


@pytest.fixture(autouse=True, scope="module")
def in_little_time() -> Iterator[None]:
    """One thread; and configs are dumped as they are, because yapf takes longer to format one than a run takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("yapf.yapflib.yapf_api.FormatCode", lambda text, **_: (text, True))
        yield
    torch.set_num_threads(threads)


def _write_config(folder: Path, kind: str, more: str = "") -> Path:
    library, parts = KINDS[kind]
    bases = [str(configs.path(f"{library}/_base_/{part}")) for part in (*parts, "runtime")]
    fitting = FITTING.get(kind, f"neck=dict(in_channels={CHANNELS})")
    path = folder / f"{kind}.py"
    path.write_text(f"_base_ = {bases}\nmodel = dict(backbone=dict(model_name='test_vmamba'), {fitting})\n{more}")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, mm_train.Summary]]:
    """Config and outcome of two iterations and a validation of a kind, in the folder ``run`` beside the config."""

    @cache
    def train(kind: str) -> tuple[Path, mm_train.Summary]:
        config = _write_config(tmp_path_factory.mktemp(kind), kind)
        return config, mm_train.run(_options(kind, config))

    return train


def _options(kind: str, config: Path, **options: Any) -> Options:
    narrow = NARROW.get(kind, ())
    return Options(str(config), work_dir=config.parent / "run", smoke=True, cfg_options=narrow, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_trains_validates_resumes_and_infers(
    kind: str, trained: Callable[[str], tuple[Path, mm_train.Summary]]
) -> None:
    config, first = trained(kind)
    run = config.parent / "run"
    assert len(first.losses) == 2 and all(np.isfinite(first.losses))
    expected = {"mIoU", "aAcc", "mAcc"} if KINDS[kind][0] == "mmseg" else {"coco/bbox_mAP"}
    expected |= {"coco/segm_mAP"} if kind in ("mask-rcnn", "cascade") else set()
    assert expected <= set(first.metrics)
    assert list((run).rglob("events.out.tfevents*"))

    before = torch.load(run / "iter_2.pth", weights_only=False)
    resumed = mm_train.run(_options(kind, config, iterations=3, resume=True))
    assert len(resumed.losses) == 3 and resumed.losses[:2] == first.losses
    after = torch.load(run / "iter_3.pth", weights_only=False)
    assert after["optimizer"]["state"][0]["step"] == before["optimizer"]["state"][0]["step"] + 1 == 3
    moved = [k for k, v in after["state_dict"].items() if not torch.equal(v, before["state_dict"][k])]
    assert any(name.startswith("backbone.net.stem") for name in moved)
    if KINDS[kind][0] == "mmdet":
        _infer_boxes(run, masks=kind != "retinanet")
    else:
        _infer_labels(run)


def _infer_boxes(run: Path, masks: bool) -> None:
    from mmdet.apis import DetInferencer

    inferencer = DetInferencer(str(next(run.glob("*.py"))), str(run / "iter_3.pth"), "cpu", show_progress=False)
    image = next((run / "smoke").glob("*/val/images/0000.png"))
    result = inferencer(str(image), pred_score_thr=0.0, out_dir=str(run / "out"), no_save_pred=False)["predictions"][0]
    assert len(result["bboxes"]) == len(result["scores"]) == len(result["labels"]) > 0
    assert ("masks" in result) == masks
    width, height = Image.open(image).size
    boxes = np.array(result["bboxes"])
    slack = 1e-3  # float32 at another scale
    assert boxes.min() >= 0 and boxes[:, 2].max() <= width + slack and boxes[:, 3].max() <= height + slack
    assert (run / "out" / "vis").is_dir() and (run / "out" / "preds").is_dir()


def _infer_labels(run: Path) -> None:
    from mmseg.apis import MMSegInferencer

    inferencer = MMSegInferencer(str(next(run.glob("*.py"))), str(run / "iter_3.pth"), device="cpu")
    image = next((run / "smoke").glob("*/val/images/0000.jpg"))
    labels = inferencer(str(image))["predictions"]
    assert labels.shape == Image.open(image).size[::-1]
    assert labels.min() >= 0 and labels.max() < 150


def test_shipped_config_by_name(tmp_path: Path) -> None:
    """A user's first try: two words and the names of a smaller model; then the result is tested."""
    small = (
        "model.backbone.model_name=test_vmamba",
        *NARROW["upernet"],
        f"model.decode_head.in_channels={','.join(map(str, CHANNELS))}",
        "model.auxiliary_head.in_channels=32",
    )
    name = "mmseg/vmamba/upernet_vmamba-tiny_160k_ade20k-512.py"
    common: dict[str, Any] = {"smoke": True, "iterations": 1, "cfg_options": small}
    summary = mm_train.run(Options(name, work_dir=tmp_path / "run", **common))
    tested = mm_train.run(
        Options(name, work_dir=tmp_path / "test", test=str(tmp_path / "run" / "iter_1.pth"), **common)
    )
    assert tested.metrics["mIoU"] == pytest.approx(summary.metrics["mIoU"])
    record = json.loads((tmp_path / "run" / "smoke.json").read_text())
    assert record["losses"] == summary.losses


def test_flexible_runner(tmp_path: Path) -> None:
    """mmengine's runner of strategies, which FSDP needs."""
    config = _write_config(tmp_path, "semantic-fpn", "runner_type = 'FlexibleRunner'\n")
    strategy = ("strategy.type=SingleDeviceStrategy",)
    summary = mm_train.run(Options(str(config), work_dir=tmp_path, smoke=True, iterations=1, cfg_options=strategy))
    assert len(summary.losses) == 1 and "mIoU" in summary.metrics


def test_smoke_data_is_made_once(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        folder.mkdir()
        (tmp_path / "data").mkdir(exist_ok=True)  # by another process, in the meantime
        (tmp_path / "data" / "theirs").touch()

    smoke._once(tmp_path / "data", make)
    smoke._once(tmp_path / "data", make)
    assert len(made) == 1 and [path.name for path in tmp_path.rglob("*")] == ["data", "theirs"]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("retinanet", "model['bbox_head'] = dict(num_classes=1)"),
        ("semantic-fpn", "model['decode_head'] = dict(num_classes=2)"),
        ("semantic-fpn", "model['decode_head'] = dict(num_classes=1, out_channels=1, threshold=0.3)"),
    ],
)
def test_smoke_of_few_classes(kind: str, change: str, tmp_path: Path) -> None:
    """And of several data sets."""
    wrapper = "train_dataloader = dict(dataset=dict(_delete_=True, type='ConcatDataset', datasets=[{{_base_.%s}}]))"
    change += "\n" + wrapper % "train_dataloader.dataset"
    config = _write_config(tmp_path, kind, change)
    losses = mm_train.run(Options(str(config), work_dir=tmp_path, smoke=True, iterations=1)).losses
    assert len(losses) == 1 and np.isfinite(losses).all()


def test_smoke_needs_data_to_replace(tmp_path: Path) -> None:
    config = tmp_path / "own.py"
    config.write_text("default_scope = 'mmpose'\nmodel = dict()")
    with pytest.raises(ValueError, match="default_scope mmdet or mmseg, got 'mmpose'"):
        mm_train.run(Options(str(config), smoke=True))
    config.write_text("default_scope = 'mmdet'\nmodel = dict()\ntrain_dataloader = dict(dataset=dict(pipeline=[]))")
    with pytest.raises(ValueError, match="no val_dataloader, test_dataloader"):
        mm_train.run(Options(str(config), smoke=True))


def test_options_change_the_config(tmp_path: Path) -> None:
    config = _write_config(tmp_path, "mask-rcnn", "custom_hooks = [dict(type='EMAHook')]")
    cfg = mm_train.load(Options(str(config), cfg_options=("train_dataloader.batch_size=7",), resume=True))
    assert cfg.train_dataloader.batch_size == 7
    assert [hook["type"] for hook in cfg.custom_hooks] == ["EMAHook", "SubquadChecks"]
    assert cfg.resume and cfg.work_dir == "work_dirs/mask-rcnn"
    assert mm_train.load(Options(str(config), smoke=True)).work_dir == "work_dirs/mask-rcnn-smoke"
    assert not cfg.model.backbone.pretrained and mm_train.load(Options(str(config))).model.backbone.pretrained
    cfg = mm_train.load(Options(str(config), amp="bf16", strategy="fsdp", load_from="w.pth"))
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.dtype, cfg.load_from) == ("AmpOptimWrapper", "bfloat16", "w.pth")
    assert cfg.optim_wrapper.optimizer.lr == 1e-4
    assert (cfg.runner_type, cfg.strategy.type) == ("FlexibleRunner", "SubquadFSDPStrategy")
    url = "https://example.com/a/b.pth"
    mm_train._check(Options(str(config), load_from=url))
    assert mm_train.load(Options(str(config), load_from=url)).load_from == url


# Bad input


def _broken_model(**changes: Any) -> Callable[[Path], Options]:
    def options(folder: Path) -> Options:
        config = _write_config(folder, "mask-rcnn")
        changed = tuple(f"{name.replace('__', '.')}={value}" for name, value in changes.items())
        return Options(str(config), work_dir=folder / "run", smoke=True, cfg_options=changed)

    return options


def _broken_data(change: Callable[[Path], None], more: str = "") -> Callable[[Path], Options]:
    """Train on made data that ``change(folder)`` has spoilt; ``more`` goes into the config."""

    def options(folder: Path) -> Options:
        from mmdet.datasets import CocoDataset

        annotations = smoke.make_coco(folder, (64, 48), CocoDataset.METAINFO["classes"], images=2)
        loader = f"dict(num_workers=0, persistent_workers=False, dataset=dict(data_root='{folder}', "
        loader += "ann_file='annotations.json', data_prefix=dict(img='images')))"
        lines = [f"{mode}_dataloader = {loader}" for mode in ("train", "val", "test")]
        lines += [f"{mode}_evaluator = dict(ann_file='{annotations}')" for mode in ("val", "test")]
        lines += ["model['backbone']['pretrained'] = False", more]
        change(folder)
        return Options(str(_write_config(folder, "mask-rcnn", "\n".join(lines))), work_dir=folder / "run")

    return options


def _empty_list(folder: Path, name: str = "annotations.json") -> None:
    content = json.loads((folder / "annotations.json").read_text())
    (folder / name).write_text(json.dumps(content | {"annotations": []}))


BAD = {
    "unknown model": (
        _broken_model(model__backbone__model_name="vmamba_tinny"),
        ValueError,
        "did you mean vmamba_tiny",
    ),
    "out_indices": (
        _broken_model(model__backbone__out_indices="0,1,2,4"),
        ValueError,
        "out_indices must rise within 0",
    ),
    "neck": (_broken_model(model__neck__in_channels="96,192,384,768"), ValueError, r"neck \(FPN\) takes \[96, 192"),
    "no image": (_broken_data(lambda f: (f / "images/0001.png").unlink()), FileNotFoundError, r"missing: .*0001\.png"),
    "no file": (_broken_data(lambda f: (f / "annotations.json").unlink()), FileNotFoundError, r"annotations\.json"),
    "empty file": (_broken_data(lambda f: (f / "annotations.json").write_text("") and None), ValueError, "is empty"),
    "half a file": (
        _broken_data(lambda f: (f / "annotations.json").write_text('{"a": ') and None),
        ValueError,
        "not JSON",
    ),
    "no annotations": (_broken_data(_empty_list), ValueError, r"no images with annotations .*annotations\.json"),
    "no annotations, unfiltered": (
        _broken_data(_empty_list, "train_dataloader['dataset']['filter_cfg'] = None"),
        ValueError,
        r"no images with annotations .*annotations\.json",
    ),
    "no annotations to validate with": (
        _broken_data(lambda f: _empty_list(f, "val.json"), "val_dataloader['dataset']['ann_file'] = 'val.json'"),
        ValueError,
        r"no images with annotations .*val\.json",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_fails_before_the_first_iteration(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, error, message = BAD[what]
    from mmengine.runner import BaseLoop

    monkeypatch.setattr(BaseLoop, "run", lambda self: pytest.fail("the loop started"), raising=False)
    with pytest.raises(error, match=message):
        mm_train.run(options(tmp_path))


def test_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    """A whole detector with another backbone, to start from and to test."""
    torch.save({"state_dict": {"backbone.layer1.0.conv1.weight": torch.zeros(4, 4, 1, 1)}}, tmp_path / "c.pth")
    config = str(_write_config(tmp_path, "retinanet"))
    for how in ("load_from", "test"):
        options: dict[str, Any] = {how: str(tmp_path / "c.pth")}
        with pytest.raises(ValueError, match=r"under 'backbone\.' do not fit test_vmamba:\nmissing"):
            mm_train.run(Options(config, work_dir=tmp_path / how, smoke=True, **options))


@pytest.fixture
def sharded_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Options for FSDP in one process, by gloo; mmengine itself starts it on GPUs only."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    load = mm_train.load

    def load_for_cpu(options: Options) -> Any:
        cfg = load(options)
        if options.strategy == "fsdp":
            cfg.strategy.model_wrapper.device_id = "cpu"
        return cfg

    monkeypatch.setattr(mm_train, "load", load_for_cpu)
    backend = ("env_cfg.dist_cfg.backend=gloo",)
    yield {"strategy": "fsdp", "launcher": "pytorch", "smoke": True, "iterations": 1, "cfg_options": backend}
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process that sees a GPU shards on it")
def test_checkpoints_of_sharded_runs(
    trained: Callable[[str], tuple[Path, mm_train.Summary]], sharded_on_cpu: dict[str, Any], tmp_path: Path
) -> None:
    """They are loaded as those of others, and as they were trained; and refused, where FSDP would take what fits."""
    config, summary = trained("retinanet")
    weights = config.parent / "run" / "iter_2.pth"
    options: dict[str, Any] = {"work_dir": tmp_path, **sharded_on_cpu}
    tested = mm_train.run(Options(str(config), test=str(weights), **options))
    for name, value in summary.metrics.items():
        assert tested.metrics[name] == pytest.approx(value), name
    started = mm_train.run(Options(str(config), load_from=str(weights), **options))
    assert np.isfinite(started.losses).all()
    resumed = mm_train.run(Options(str(config), resume=True, **options | {"iterations": 2}))
    assert np.isfinite(resumed.losses).all()
    state = torch.load(tmp_path / "iter_2.pth", map_location="cpu", weights_only=False)["optimizer"]["state"]
    assert {float(entry["step"]) for entry in state.values()} == {2.0}  # one step of each run

    torch.save({"state_dict": {"backbone.layer1.0.conv1.weight": torch.zeros(4, 4, 1, 1)}}, tmp_path / "iter_1.pth")
    how: dict[str, Any]
    for how in ({"load_from": str(tmp_path / "iter_1.pth")}, {"test": str(tmp_path / "iter_1.pth")}, {"resume": True}):
        (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_1.pth"))
        with pytest.raises(ValueError, match=r"under 'backbone\.' do not fit test_vmamba:\nmissing"):
            mm_train.run(Options(str(config), **options | how))
    options["cfg_options"] += ("model.neck.in_channels=96,192,384",)
    with pytest.raises(ValueError, match=r"neck \(FPN\) takes \[96, 192, 384\]"):
        mm_train.run(Options(str(config), **options))


def test_bad_options(tmp_path: Path) -> None:
    config = str(_write_config(tmp_path, "mask-rcnn"))
    with pytest.raises(FileNotFoundError, match=r"no config 'mmdet/vmamba/mask-rcnn_tiny'; did you mean mmdet/"):
        mm_train.run(Options("mmdet/vmamba/mask-rcnn_tiny"))
    with pytest.raises(FileNotFoundError, match=r"checkpoint 'absent\.pth' does not exist"):
        mm_train.run(Options(config, test="absent.pth"))
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        mm_train.run(Options(config, smoke=True, iterations=0))
    with pytest.raises(ValueError, match="resume, load_from and test exclude each other"):
        mm_train.run(Options(config, resume=True, load_from=config))
    with pytest.raises(ValueError, match="full_size and iterations go with smoke"):
        mm_train.run(Options(config, iterations=50))
    with pytest.raises(FileNotFoundError, match="nothing to resume in"):
        mm_train.run(Options(config, work_dir=tmp_path, resume=True))
    with pytest.raises(ValueError, match="cfg_options must be KEY=VALUE, got 'seed'"):
        mm_train.run(Options(config, cfg_options=("a.b=1", "seed")))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="amp fp16 needs a GPU"):
            mm_train.run(Options(config, amp="fp16"))


# Scripts of the libraries


def test_scripts_of_the_libraries_run_through_the_launcher(
    trained: Callable[[str], tuple[Path, mm_train.Summary]], tmp_path: Path
) -> None:
    """mmdet's test script imports its models before it reads the config."""
    config, summary = trained("mask-rcnn")
    run = config.parent / "run"
    command = [sys.executable, "-W", "ignore", "-m", "subquad.tools.mm_run", "mmdet/tools/test.py"]
    command += [str(run / config.name), str(run / "iter_2.pth"), "--work-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"coco/bbox_mAP: ([\d.]+)", done.stdout + done.stderr)
    assert float(found[-1]) == pytest.approx(summary.metrics["coco/bbox_mAP"], abs=1e-4)  # printed with four digits


def test_scripts_find_what_lies_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside_the_script.py").write_text("value = 7")
    (tmp_path / "own.py").write_text(
        "from pathlib import Path\nimport beside_the_script\nPath(__file__).with_name('out').write_text('7')"
    )
    monkeypatch.setattr(sys, "argv", ["mm_run"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    mm_run.run([str(tmp_path / "own.py")])
    assert (tmp_path / "out").is_file()


def test_launcher_finds_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mm_run.find("mmseg/tools/train.py").is_file()
    own = tmp_path / "own.py"
    own.write_text("import sys; result = sys.argv[1:]")
    seen: list[Any] = []
    monkeypatch.setattr(runpy, "run_path", lambda path, run_name: seen.append((path, run_name, sys.argv)))
    monkeypatch.setattr(sys, "argv", ["mm_run"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    mm_run.run([str(own), "--work-dir", "w"])
    assert seen == [(str(own), "__main__", [str(own), "--work-dir", "w"])]
    with pytest.raises(FileNotFoundError, match=r"no script 'mmdet/tools/absent\.py'"):
        mm_run.find("mmdet/tools/absent.py")

"""What fails before the first iteration: necks and heads of other channels or strides, data that is not there."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

pytest.importorskip("mmdet", reason='needs mmdet: pip install "subquad[mm]"')

from mmengine.config import Config
from mmengine.registry import DATASETS, HOOKS, init_default_scope

from subquad import configs
from subquad.heads.openmmlab.checks import SubquadChecks, check_dataset, check_model
from subquad.tools.mm_index import build
from subquad.tools.openmmlab import smoke

CHANNELS = [16, 24, 32, 48]
TINY = {"model.backbone.model_name": "test_vmamba"}


def _model(part: str, **changes: Any) -> nn.Module:
    cfg = Config.fromfile(configs.path(part))
    cfg.default_scope = part.split("/")[0]
    cfg.model.backbone.pretrained = False
    cfg.merge_from_dict(TINY | {name.replace("__", "."): value for name, value in changes.items()})
    return build(cfg)


MASK_RCNN = "mmdet/_base_/models/mask-rcnn_fpn"
RETINANET = "mmdet/_base_/models/retinanet_fpn"
UPERNET = "mmseg/_base_/models/upernet"
SEMANTIC_FPN = "mmseg/_base_/models/semantic-fpn"
# A neck that reads its maps, and gives them, from the last to the first.
REVERSED: dict[str, Any] = {
    "model__neck": {
        "_delete_": True,
        "type": "YOLOV3Neck",
        "num_scales": 3,
        "in_channels": CHANNELS[:0:-1],
        "out_channels": [8, 8, 8],
    },
    "model__bbox_head__anchor_generator__strides": [32, 16, 8],
}
HEADS = {"model__decode_head__in_channels": CHANNELS, "model__auxiliary_head__in_channels": 32}


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        (MASK_RCNN, {"model__neck__in_channels": CHANNELS}),
        (RETINANET, {"model__neck__in_channels": CHANNELS[1:]}),
        (
            RETINANET,
            {
                "model__backbone__out_indices": (0, 1, 2, 3),
                "model__neck__in_channels": CHANNELS,
                "model__neck__start_level": 1,
            },
        ),
        (UPERNET, HEADS),
        (SEMANTIC_FPN, {"model__neck__in_channels": CHANNELS}),
        (RETINANET, REVERSED),
    ],
)
def test_parts_that_fit(part: str, changes: dict[str, Any]) -> None:
    check_model(_model(part, **changes))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (
            MASK_RCNN,
            {"model__neck__in_channels": [96, 192, 384, 768]},
            r"neck \(FPN\) takes \[96, 192, 384, 768\] channels, test_vmamba with out_indices \(0, 1, 2, 3\) gives "
            r"\[16, 24, 32, 48\]: set neck.in_channels",
        ),
        (MASK_RCNN, {"model__neck__in_channels": CHANNELS[:3]}, r"takes \[16, 24, 32\] channels"),
        (
            RETINANET,
            {"model__backbone__out_indices": (0, 1, 2), "model__neck__in_channels": CHANNELS[:3]},
            r"bbox_head.anchor_generator expects maps of strides \[8, 16, 32, 64, 128\].* gives \[4, 8, 16",
        ),
        (
            RETINANET,
            REVERSED | {"model__neck": REVERSED["model__neck"] | {"in_channels": CHANNELS[1:]}},
            r"neck \(YOLOV3Neck\) takes \[24, 32, 48\]",
        ),
        (
            RETINANET,
            {
                "model__neck": {
                    "_delete_": True,
                    "type": "ChannelMapper",
                    "in_channels": [24, 32, 64],
                    "out_channels": 8,
                }
            },
            r"neck \(ChannelMapper\) takes other channels, .* gives \[24, 32, 48\]",
        ),
        (UPERNET, HEADS | {"model__auxiliary_head__in_channels": 48}, r"auxiliary_head \(FCNHead\) takes \[48\]"),
        (UPERNET, HEADS | {"model__decode_head__in_channels": CHANNELS[::-1]}, r"decode_head \(UPerHead\) takes"),
        (UPERNET, HEADS | {"model__backbone__out_indices": (0, 1, 2)}, r"in_index \[0, 1, 2, 3\] of decode_head"),
        (
            SEMANTIC_FPN,
            {"model__neck__in_channels": CHANNELS, "model__decode_head__feature_strides": [8, 16, 32, 64]},
            r"decode_head expects maps of strides \[8, 16, 32, 64\]",
        ),
    ],
)
def test_parts_that_do_not_fit(part: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_model(_model(part, **changes))


def test_pyramid_of_an_isotropic_model() -> None:
    """Its strides are those of the scaled map: 8 gives 2, 4, 8, 16 and 32, which is not what the head wants."""
    options = {"model__backbone": {"model_name": "test_isotropic", "out_indices": (2,)}}
    neck = {"_delete_": True, "type": "SimpleFeaturePyramid", "in_channels": 16}
    with pytest.raises(ValueError, match=r"expects maps of strides \[4, 8, 16, 32, 64\].* gives \[2, 4, 8, 16, 32"):
        check_model(_model(MASK_RCNN, model__neck=neck, **options))
    strides = [2, 4, 8, 16, 32]
    fitting = {
        "model__rpn_head__anchor_generator__strides": strides,
        "model__roi_head__bbox_roi_extractor__featmap_strides": strides[:4],
        "model__roi_head__mask_roi_extractor__featmap_strides": strides[:4],
    }
    check_model(_model(MASK_RCNN, model__neck=neck, **options, **fitting))


def test_checks_of_the_model_can_be_left_out() -> None:
    model = _model(MASK_RCNN, model__neck__in_channels=[96, 192, 384, 768])
    runner = SimpleNamespace(model=model, _train_loop=None, _val_loop=None, _test_loop=None)
    HOOKS.build({"type": "SubquadChecks", "model": False}).before_run(runner)
    with pytest.raises(ValueError, match=r"set neck\.in_channels"):
        HOOKS.build({"type": "SubquadChecks"}).before_run(runner)


def test_other_backbones_are_left_alone() -> None:
    model = nn.Module()
    model.backbone = nn.Identity()
    check_model(model)


# Data


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    init_default_scope("mmdet")
    from mmdet.datasets import CocoDataset

    smoke.make_coco(tmp_path, (64, 48), CocoDataset.METAINFO["classes"], images=3)
    return tmp_path


def _cfg(folder: Path, with_mask: bool = True) -> dict[str, Any]:
    pipeline = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_mask": with_mask}]
    prefix = {"img": str(folder / "images")}
    return {
        "type": "CocoDataset",
        "ann_file": str(folder / "annotations.json"),
        "data_prefix": prefix,
        "pipeline": pipeline,
    }


def _coco(folder: Path, with_mask: bool = True, **options: Any) -> Any:
    return DATASETS.build(_cfg(folder, with_mask) | options)


def _edit(folder: Path, change: Any) -> None:
    path = folder / "annotations.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_made_data_passes(coco: Path) -> None:
    check_dataset(_coco(coco))
    both = {"type": "ConcatDataset", "datasets": [_cfg(coco), _cfg(coco)]}
    check_dataset(DATASETS.build({"type": "RepeatDataset", "times": 2, "dataset": both}))


def test_missing_image(coco: Path) -> None:
    (coco / "images" / "0001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"annotations\.json' are missing: .*0001\.png"):
        check_dataset(_coco(coco))


def test_empty_image(coco: Path) -> None:
    (coco / "images" / "0001.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"annotations\.json' are empty: .*0001\.png"):
        check_dataset(_coco(coco))


def test_empty_annotations(coco: Path) -> None:
    _edit(coco, lambda content: content.update(annotations=[]))
    with pytest.raises(ValueError, match=r"no images with annotations in '.*annotations\.json'"):
        check_dataset(_coco(coco, serialize_data=False, filter_cfg={"filter_empty_gt": True}))


@pytest.mark.parametrize("options", [{"test_mode": True}, {"filter_cfg": None}], ids=str)
def test_images_without_any_object(options: dict[str, Any], coco: Path) -> None:
    """They are all kept in validation, and in training without a filter."""
    _edit(coco, lambda content: content.update(annotations=content["annotations"][:1]))
    check_dataset(_coco(coco, **options))
    _edit(coco, lambda content: content.update(annotations=[]))
    with pytest.raises(ValueError, match=r"no images with annotations in '.*annotations\.json'"):
        check_dataset(_coco(coco, **options))
    check_dataset(_coco(coco, **options), annotated=False)


@pytest.mark.parametrize("format_only", [False, True])
def test_test_that_only_writes_predictions(format_only: bool, coco: Path) -> None:
    """Images without annotations, as COCO's test-dev."""
    _edit(coco, lambda content: content.update(annotations=[]))
    metric = SimpleNamespace(format_only=format_only)
    dataset = _coco(coco, test_mode=True)
    loop = SimpleNamespace(dataloader=SimpleNamespace(dataset=dataset), evaluator=SimpleNamespace(metrics=[metric]))
    runner = SimpleNamespace(model=nn.Module(), _train_loop=None, _val_loop=None, _test_loop=loop)
    with nullcontext() if format_only else pytest.raises(ValueError, match="no images with annotations"):
        SubquadChecks().before_run(runner)


def test_annotation_without_a_mask(coco: Path) -> None:
    _edit(coco, lambda content: content["annotations"][0].update(segmentation=[]))
    with pytest.raises(ValueError, match=r"annotations\.json' has annotations without a mask: .*0000\.png"):
        check_dataset(_coco(coco))
    check_dataset(_coco(coco, with_mask=False))


def test_missing_label_map(tmp_path: Path) -> None:
    pytest.importorskip("mmseg", reason='needs mmseg: pip install "subquad[mm]"')
    init_default_scope("mmseg")
    import mmseg.datasets  # noqa: F401

    smoke.make_ade(tmp_path, (64, 48), images=2)
    prefix = {"img_path": "images", "seg_map_path": "annotations"}
    cfg = {"type": "ADE20KDataset", "data_root": str(tmp_path), "data_prefix": prefix, "pipeline": []}
    check_dataset(DATASETS.build(cfg))
    (tmp_path / "annotations" / "0001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing: .*annotations/0001\.png"):
        check_dataset(DATASETS.build(cfg))

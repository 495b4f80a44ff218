"""The stand-in for mmcv's compiled operators: values, gradients, what it lacks, and when it is imported."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

pytest.importorskip("mmcv", reason='needs mmcv: pip install "subquad[mm]"')

from subquad.heads.openmmlab import standin_ops

ops = importlib.import_module("mmcv.ops")  # which needs the stand-in

pytestmark = pytest.mark.skipif(
    sys.modules["mmcv._ext"].__spec__.origin != standin_ops.__file__,  # type: ignore[union-attr]
    reason="mmcv has compiled operators, which win",
)


def _boxes(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 40
    size = torch.rand(count, 2, generator=generator) * 30 + 1
    return torch.cat([corner, corner + size], dim=1), torch.rand(count, generator=generator)


def _rois(count: int, batch: int, dtype: torch.dtype) -> Tensor:
    boxes, _ = _boxes(count, seed=1)
    return torch.cat([torch.arange(count)[:, None] % batch, boxes], dim=1).to(dtype)


# Suppression


@pytest.mark.parametrize("offset", [0, 1])
def test_nms_is_that_of_torchvision(offset: int) -> None:
    boxes, scores = _boxes(50)
    dets, kept = ops.nms(boxes, scores, 0.4, offset=offset)
    wider = boxes + torch.tensor([0, 0, offset, offset])
    assert torch.equal(kept, torchvision.ops.nms(wider, scores, 0.4))
    assert 1 < len(kept) < 50
    assert torch.equal(dets, torch.cat([boxes, scores[:, None]], dim=1)[kept])


def test_batched_nms_is_that_of_torchvision() -> None:
    boxes, scores = _boxes(60)
    classes = torch.arange(60) % 3
    _, kept = ops.batched_nms(boxes, scores, classes, {"type": "nms", "iou_threshold": 0.3})
    expected = torchvision.ops.batched_nms(boxes, scores, classes, 0.3)
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nms_without_boxes(dtype: torch.dtype) -> None:
    _, kept = ops.nms(torch.zeros(0, 4, dtype=dtype), torch.zeros(0, dtype=dtype), 0.5)
    assert kept.dtype == torch.int64 and kept.shape == (0,)


def test_naive_soft_nms_is_nms() -> None:
    boxes, scores = _boxes(40)
    dets, kept = ops.soft_nms(boxes, scores, iou_threshold=0.4, method="naive", min_score=1e-6)
    assert torch.equal(kept, torchvision.ops.nms(boxes, scores, 0.4))
    assert torch.equal(dets[:, :4], boxes[kept])


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_is_the_loop_of_the_paper(method: str) -> None:
    """Figure 2 of arXiv 1704.04503, pair by pair."""
    boxes, scores = _boxes(25)
    left, current, expected = list(range(25)), scores.tolist(), []
    while left:
        best = max(left, key=lambda i: current[i])
        left.remove(best)
        expected.append((best, current[best]))
        for i in list(left):
            iou = torchvision.ops.box_iou(boxes[best : best + 1], boxes[i : i + 1]).item()
            if method == "gaussian":
                current[i] *= torch.tensor(-iou * iou / 0.5).exp().item()
            elif iou >= 0.3:
                current[i] *= 1 - iou
            if current[i] < 0.05:
                left.remove(i)
    dets, kept = ops.soft_nms(boxes, scores, iou_threshold=0.3, sigma=0.5, min_score=0.05, method=method)
    assert kept.tolist() == [index for index, _ in expected]
    # products of up to 25 float32 factors, in another order
    torch.testing.assert_close(dets[:, 4], torch.tensor([s for _, s in expected]), rtol=25 * 2**-23, atol=0)
    assert 1 < len(kept) < 25


def test_nms_match_groups_every_box_once() -> None:
    boxes, scores = _boxes(30)
    groups = ops.nms_match(torch.cat([boxes, scores[:, None]], dim=1), 0.4)
    assert [int(group[0]) for group in groups] == torchvision.ops.nms(boxes, scores, 0.4).tolist()
    assert sorted(int(i) for group in groups for i in group) == list(range(30))


# Regions


@pytest.mark.parametrize(("ratio", "aligned"), [(0, True), (2, False)])
def test_roi_align_is_that_of_torchvision(ratio: int, aligned: bool) -> None:
    x = torch.randn(2, 3, 17, 23, dtype=torch.float64)
    rois = _rois(7, 2, torch.float64)
    ours = ops.roi_align(x, rois, (7, 5), 0.25, ratio, "avg", aligned)
    assert torch.equal(ours, torchvision.ops.roi_align(x, rois, (7, 5), 0.25, ratio, aligned))


def test_gradients_of_roi_align_and_roi_pool() -> None:
    x = torch.randn(1, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0.0, 0.5, 1.0, 9.0, 10.5], [0.0, 3.0, 2.0, 11.0, 8.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: ops.roi_align(x, rois, (2, 3), 0.5, 2, "avg", True), x)
    assert torch.autograd.gradcheck(lambda x: ops.roi_pool(x, rois, (2, 3), 0.5), x)


def test_roi_pool_is_that_of_torchvision() -> None:
    x, rois = torch.randn(2, 3, 17, 23), _rois(7, 2, torch.float32)
    assert torch.equal(ops.roi_pool(x, rois, (3, 4), 0.5), torchvision.ops.roi_pool(x, rois, (3, 4), 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_roi_align_in_half_precision_rounds_once(dtype: torch.dtype) -> None:
    """Values and gradients are those of float32, rounded; the gradient of many RoIs is a sum."""
    x = torch.randn(1, 2, 16, 16).to(dtype).requires_grad_()
    wide = x.detach().float().requires_grad_()
    rois = torch.tensor([[0.0, 2.0, 2.0, 60.0, 50.0]]).repeat(200, 1)
    y, y_wide = (ops.roi_align(value, rois, (7, 7), 0.25, 2) for value in (x, wide))
    assert y.dtype == dtype
    assert torch.equal(y, y_wide.to(dtype))
    y.backward(torch.ones_like(y))
    y_wide.backward(torch.ones_like(y_wide))
    assert x.grad is not None and wide.grad is not None and wide.grad.max() > 50
    assert torch.equal(x.grad, wide.grad.to(dtype))


def test_regions_of_a_view_and_no_regions() -> None:
    x = torch.randn(2, 9, 11, 3).permute(0, 3, 1, 2)
    rois = _rois(3, 2, torch.float32)
    expected = torchvision.ops.roi_align(x.contiguous(), rois, (2, 2), 0.2, 2, True)
    assert torch.equal(ops.roi_align(x, rois, (2, 2), 0.2, 2), expected)
    assert ops.roi_align(x, rois[:0], (2, 2), 0.2, 2).shape == (0, 3, 2, 2)
    assert ops.roi_pool(x, rois[:0], (2, 2), 0.2).shape == (0, 3, 2, 2)


# Losses


def test_focal_loss_is_that_of_torchvision_and_of_mmdet() -> None:
    from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss

    logits = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, 4, 4, 0, 3, 4])  # 4 is background
    positive = torch.nn.functional.one_hot(target, 5)[:, :4].double()
    # one rounding a factor
    close = {"rtol": 1e-14, "atol": 1e-16}
    ours = ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "none")
    theirs = torchvision.ops.sigmoid_focal_loss(logits, positive, 0.25, 2.0)
    torch.testing.assert_close(ours, theirs, **close)
    torch.testing.assert_close(ours, py_sigmoid_focal_loss(logits, positive, reduction="none"), **close)
    assert torch.autograd.gradcheck(lambda x: ops.sigmoid_focal_loss(x, target, 2.0, 0.25, None, "none"), logits)


def test_losses_of_mmdet_use_it() -> None:
    from mmdet.models.losses import FocalLoss

    logits, target = torch.randn(6, 3), torch.tensor([0, 3, 1, 2, 3, 3])
    positive = torch.nn.functional.one_hot(target, 4)[:, :3].float()
    expected = torchvision.ops.sigmoid_focal_loss(logits, positive, 0.25, 2.0).sum() / 5
    torch.testing.assert_close(FocalLoss()(logits, target, avg_factor=5), expected)


# What is not there, and when it comes


def test_absent_operator_names_itself_and_the_remedy() -> None:
    with pytest.raises(NotImplementedError, match="carafe_forward") as caught:
        sys.modules["mmcv._ext"].carafe_forward()  # type: ignore[attr-defined]
    assert standin_ops.COMPILE in str(caught.value)
    remedy = re.escape(standin_ops.COMPILE)
    with pytest.raises(NotImplementedError, match=f"'max'.*{remedy}"):
        ops.roi_align(torch.randn(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 3, 3]]), (2, 2), 1.0, 0, "max")
    with pytest.raises(NotImplementedError, match=f"class weights.*{remedy}"):
        ops.sigmoid_focal_loss(torch.randn(2, 3), torch.tensor([0, 1]), 2.0, 0.25, torch.ones(3), "none")
    extras = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert shlex.split(standin_ops.COMPILE)[-1] in extras["mm"]


def test_mmcv_finds_its_operators() -> None:
    from mmcv.utils import collect_env
    from mmengine.utils.dl_utils.misc import mmcv_full_available

    assert mmcv_full_available()  # asked at every construction of an optimizer
    assert "torchvision" in collect_env()["MMCV Compiler"]


def test_import_order_does_not_matter_and_compiled_operators_win() -> None:
    program = """
        import importlib.util, pathlib, sys, tempfile
        import mmcv

        try:
            import mmdet.models
        except ModuleNotFoundError:
            pass  # for want of the operators; half of its modules stay behind
        else:
            sys.exit("mmdet.models needs no operators any more")
        from mmdet.structures.mask import structures
        from mmseg.models.losses import focal_loss

        import subquad.heads.openmmlab
        import mmdet.models, mmcv.ops, torch
        from mmdet.models.layers import bbox_nms
        from mmdet.models.losses.focal_loss import sigmoid_focal_loss, py_sigmoid_focal_loss

        assert structures.roi_align is mmcv.ops.roi_align
        assert bbox_nms.batched_nms is mmcv.ops.batched_nms
        assert focal_loss._sigmoid_focal_loss is mmcv.ops.sigmoid_focal_loss
        assert sigmoid_focal_loss is not mmcv.ops.sigmoid_focal_loss  # mmdet's own
        boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4.1]])
        dets, labels = bbox_nms.multiclass_nms(boxes, torch.rand(2, 3), 0.0, dict(type="nms", iou_threshold=0.5))
        assert len(dets) == 2

        # a compiled extension beside mmcv is found before the stand-in
        folder = pathlib.Path(tempfile.mkdtemp())
        (folder / "_ext.py").write_text("")
        mmcv.__path__.append(str(folder))
        del sys.modules["mmcv._ext"]
        assert importlib.util.find_spec("mmcv._ext").origin == str(folder / "_ext.py")
        """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_without_mmengine_the_error_names_the_extra() -> None:
    program = """
        import sys
        sys.modules["mmengine"] = None
        from subquad import cli
        try:
            import subquad.heads.openmmlab
        except ImportError as error:
            print(error)
        sys.exit(cli.main(["mm_train", "mmdet/vmamba/mask-rcnn_vmamba-tiny_fpn_1x_coco.py", "--smoke"]))
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    for text in (done.stdout, done.stderr):
        assert text.strip().endswith('pip install "subquad[mm]"')

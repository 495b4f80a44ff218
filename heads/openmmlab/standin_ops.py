"""The operators of ``mmcv._ext`` that R-CNN and RetinaNet detectors call, by torchvision, on a CPU or GPU.

Names and arguments are those with which mmcv's Python side calls its compiled operators; where it hands over tensors
for results, they are written in place. Half precision is computed in float32, because sums of many RoIs in float16
lose more than the rounding of the result.
"""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import Tensor

__all__ = [
    "get_compiler_version",
    "get_compiling_cuda_version",
    "nms",
    "nms_match",
    "roi_align_backward",
    "roi_align_forward",
    "roi_pool_backward",
    "roi_pool_forward",
    "sigmoid_focal_loss_backward",
    "sigmoid_focal_loss_forward",
    "softnms",
]

COMPILE = "pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation 'onedl-mmcv>=2.3.6,<2.4'"
"""Builds mmcv's own operators, with a C++ compiler (and CUDA's for a GPU), of a release that the extra ``mm`` takes."""

_SOFT_NMS_METHODS = ("naive", "linear", "gaussian")


def absence(operator: str) -> NotImplementedError:
    """The error of a call that only mmcv's own operators can answer."""
    return NotImplementedError(
        f"{operator} of mmcv is not compiled and has no stand-in in subquad; compile mmcv with `{COMPILE}`"
    )


def get_compiler_version() -> str:
    """For mmcv's report of the environment."""
    return "none (operators by torchvision)"


def get_compiling_cuda_version() -> str:
    """For mmcv's report of the environment."""
    return "none (operators by torchvision)"


# Suppression ---------------------------------------------------------------------------------------------------


def nms(boxes: Tensor, scores: Tensor, *, iou_threshold: float, offset: int) -> Tensor:
    """Indices (int64) of the boxes (N, 4) that stay, by falling score; ``offset`` 1 counts x2 and y2 as inside."""
    return torchvision.ops.nms(_with_offset(_wide(boxes), offset), _wide(scores), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    *,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (arXiv 1704.04503): lowers the scores of boxes that overlap a better one instead of dropping them.

    Writes box and score (N', 5) to the head of ``dets`` in the order of selection, and returns their indices (int64).
    ``method`` is 0 naive (plain NMS), 1 linear or 2 gaussian.
    """
    scores = scores.clone()
    corners = _with_offset(boxes, offset)
    left = torch.arange(len(boxes))
    kept: list[int] = []
    while len(left) > 0:
        best = int(left[scores[left].argmax()])
        dets[len(kept), :4], dets[len(kept), 4] = boxes[best], scores[best]
        kept.append(best)
        left = left[left != best]
        iou = torchvision.ops.box_iou(corners[best : best + 1], corners[left])[0]
        scores[left] *= _soft_nms_weight(iou, _SOFT_NMS_METHODS[method], iou_threshold, sigma)
        left = left[scores[left] >= min_score]
    return torch.tensor(kept, dtype=torch.int64)


def _soft_nms_weight(iou: Tensor, method: str, threshold: float, sigma: float) -> Tensor:
    if method == "gaussian":
        return torch.exp(-(iou**2) / sigma)
    lowered = 1 - iou if method == "linear" else torch.zeros_like(iou)
    return torch.where(iou >= threshold, lowered, 1.0)


def nms_match(dets: Tensor, *, iou_threshold: float) -> list[list[int]]:
    """For each box of ``dets`` (N, 5) that NMS keeps, by falling score: its index, then those that it suppresses."""
    boxes, scores = _wide(dets[:, :4]), dets[:, 4]
    iou = torchvision.ops.box_iou(boxes, boxes)
    left = scores.argsort(descending=True)
    groups = []
    while len(left) > 0:
        best, rest = left[0], left[1:]
        suppressed = iou[best, rest] >= iou_threshold
        groups.append([int(best), *rest[suppressed].tolist()])
        left = rest[~suppressed]
    return groups


def _with_offset(boxes: Tensor, offset: int) -> Tensor:
    return torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)


# Regions -------------------------------------------------------------------------------------------------------


def roi_align_forward(
    input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor, **options: Any
) -> None:
    """Mean of bilinear samples in each bin of the rois (K, 5): writes ``output`` (K, C, h, w)."""
    _check_average(options)
    if len(rois) > 0:
        scale, height, width, ratio, aligned = _roi_align_options(options)
        pooled = torch.ops.torchvision.roi_align(
            _wide(input).contiguous(), _wide(rois, input), scale, height, width, ratio, aligned
        )
        output.copy_(pooled)


def roi_align_backward(
    grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor, **options: Any
) -> None:
    """Gradient of ``roi_align_forward``: writes ``grad_input`` (B, C, H, W)."""
    _check_average(options)
    if len(rois) > 0:
        scale, height, width, ratio, aligned = _roi_align_options(options)
        grad = torch.ops.torchvision._roi_align_backward(
            _wide(grad_output).contiguous(),
            _wide(rois, grad_output),
            scale,
            height,
            width,
            *grad_input.shape,
            ratio,
            aligned,
        )
        grad_input.copy_(grad)


def _check_average(options: dict[str, Any]) -> None:
    if options["pool_mode"] != 1:
        raise absence("roi_align with pool_mode 'max'")


def _roi_align_options(options: dict[str, Any]) -> tuple[float, int, int, int, bool]:
    names = ("spatial_scale", "aligned_height", "aligned_width", "sampling_ratio", "aligned")
    scale, height, width, ratio, aligned = (options[name] for name in names)
    return scale, height, width, ratio, aligned


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    *,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Largest pixel in each bin of the rois (K, 5): writes ``output`` (K, C, h, w) and its place, ``argmax``."""
    if len(rois) > 0:
        pooled, places = torch.ops.torchvision.roi_pool(
            _wide(input).contiguous(), _wide(rois, input), spatial_scale, pooled_height, pooled_width
        )
        output.copy_(pooled)
        argmax.copy_(places)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    *,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Gradient of ``roi_pool_forward``: writes ``grad_input`` (B, C, H, W)."""
    if len(rois) > 0:
        grad = torch.ops.torchvision._roi_pool_backward(
            _wide(grad_output).contiguous(),
            _wide(rois, grad_output),
            argmax,
            spatial_scale,
            pooled_height,
            pooled_width,
            *grad_input.shape,
        )
        grad_input.copy_(grad)


# Losses --------------------------------------------------------------------------------------------------------


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, *, gamma: float, alpha: float
) -> None:
    """Focal loss of logits (N, C), not reduced, written to ``output``; class C in ``target`` (N,) is background."""
    output.copy_(_focal_loss(_wide(input), target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, *, gamma: float, alpha: float
) -> None:
    """Derivative of each entry of ``sigmoid_focal_loss_forward`` by its logit, written to ``grad_input`` (N, C)."""
    with torch.enable_grad():
        logits = _wide(input).detach().requires_grad_()
        loss = _focal_loss(logits, target, weight, gamma, alpha).sum()
    grad_input.copy_(torch.autograd.grad(loss, logits)[0])


def _focal_loss(logits: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    if weight.numel() > 0:
        raise absence("sigmoid_focal_loss with class weights")
    positive = target[:, None] == torch.arange(logits.shape[1], device=target.device)
    return torchvision.ops.sigmoid_focal_loss(logits, positive.to(logits.dtype), alpha, gamma)


def _wide(x: Tensor, like: Tensor | None = None) -> Tensor:
    """At least float32; with ``like``, in the precision that ``like`` is computed in."""
    dtype = x.dtype if like is None else like.dtype
    return x.to(torch.float64 if dtype == torch.float64 else torch.float32)

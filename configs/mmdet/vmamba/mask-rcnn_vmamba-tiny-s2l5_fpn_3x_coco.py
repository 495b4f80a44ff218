# VMamba-T[s2l5], Mask R-CNN 3x multi-scale: box AP 48.9, mask AP 43.7.
# Settings: the authors' config; result: the README of github.com/MzeroMiko/VMamba.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_multi-scale.py",
    "../_base_/schedules/adamw_3x.py",
    "../_base_/runtime.py",
]
published = dict(box_ap=48.9, mask_ap=43.7)
model = dict(
    backbone=dict(model_name="vmamba_tiny_s2l5", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

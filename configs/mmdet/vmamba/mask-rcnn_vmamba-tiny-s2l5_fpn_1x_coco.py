# VMamba-T[s2l5], Mask R-CNN 1x: box AP 47.4, mask AP 42.7.
# Settings: the authors' config; result: the README of github.com/MzeroMiko/VMamba.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco.py",
    "../_base_/schedules/adamw_1x.py",
    "../_base_/runtime.py",
]
published = dict(box_ap=47.4, mask_ap=42.7)
model = dict(
    backbone=dict(model_name="vmamba_tiny_s2l5", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

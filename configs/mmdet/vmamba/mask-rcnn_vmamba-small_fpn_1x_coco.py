# VMamba-S[s2l15], Mask R-CNN 1x: box AP 48.7, mask AP 43.7.
# Settings: the authors' config; result: the README of github.com/MzeroMiko/VMamba.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco.py",
    "../_base_/schedules/adamw_1x.py",
    "../_base_/runtime.py",
]
published = dict(box_ap=48.7, mask_ap=43.7)
model = dict(
    backbone=dict(model_name="vmamba_small", drop_path_rate=0.3),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

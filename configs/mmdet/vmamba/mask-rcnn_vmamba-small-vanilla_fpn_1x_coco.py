# VMamba-S (first version), Mask R-CNN 1x: box AP 48.2, mask AP 43.0.
# Settings: the authors' config; result: the README of github.com/MzeroMiko/VMamba.
# Their config inherits this rate of stochastic depth from that of Swin-T.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco.py",
    "../_base_/schedules/adamw_1x.py",
    "../_base_/runtime.py",
]
published = dict(box_ap=48.2, mask_ap=43.0)
model = dict(
    backbone=dict(model_name="vmamba_small_vanilla", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

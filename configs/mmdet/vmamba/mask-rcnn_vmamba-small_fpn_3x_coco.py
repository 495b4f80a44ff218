# VMamba-S[s2l15], Mask R-CNN 3x multi-scale: box AP 49.9, mask AP 44.2.
# Settings: the authors' config; result: the README of github.com/MzeroMiko/VMamba.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_multi-scale.py",
    "../_base_/schedules/adamw_3x.py",
    "../_base_/runtime.py",
]
published = dict(box_ap=49.9, mask_ap=44.2)
model = dict(
    backbone=dict(model_name="vmamba_small", drop_path_rate=0.3),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

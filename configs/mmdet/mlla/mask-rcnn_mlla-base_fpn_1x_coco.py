# MLLA-B, Mask R-CNN 1x multi-scale: box AP 50.5, mask AP 45.0.
# Settings: the authors' config; result: the README of github.com/LeapLabTHU/MLLA.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_multi-scale.py",
    "../_base_/schedules/adamw_1x_500.py",
    "../_base_/runtime.py",
]
published = dict(box_ap=50.5, mask_ap=45.0)
model = dict(
    backbone=dict(model_name="mlla_base", drop_path_rate=0.1),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

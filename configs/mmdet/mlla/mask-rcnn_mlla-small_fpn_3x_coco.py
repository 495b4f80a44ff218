# MLLA-S, Mask R-CNN 3x multi-scale: box AP 50.5, mask AP 44.9.
# Settings: the authors' config; result: the README of github.com/LeapLabTHU/MLLA.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_multi-scale.py",
    "../_base_/schedules/adamw_3x_500.py",
    "../_base_/runtime.py",
]
published = dict(box_ap=50.5, mask_ap=44.9)
model = dict(
    backbone=dict(model_name="mlla_small", drop_path_rate=0.3),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

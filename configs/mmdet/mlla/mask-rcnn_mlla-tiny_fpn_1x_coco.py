# MLLA-T, Mask R-CNN 1x multi-scale: box AP 46.8, mask AP 42.1.
# Settings: the authors' config; result: the README of github.com/LeapLabTHU/MLLA.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_multi-scale.py",
    "../_base_/schedules/adamw_1x_500.py",
    "../_base_/runtime.py",
]
published = dict(box_ap=46.8, mask_ap=42.1)
model = dict(
    backbone=dict(model_name="mlla_tiny", drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

# VMamba-B[s2l15], Mask R-CNN 1x: box AP 49.2, mask AP 44.1.
# Settings: the authors' config; result: the README of github.com/MzeroMiko/VMamba.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco.py",
    "../_base_/schedules/adamw_1x.py",
    "../_base_/runtime.py",
]
published = dict(box_ap=49.2, mask_ap=44.1)
model = dict(
    backbone=dict(model_name="vmamba_base", drop_path_rate=0.6),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)

# RAVLT-S, Mask R-CNN 1x: box AP 49.8, mask AP 44.6.
# Settings: the authors' config; result: the README of github.com/qhfan/RALA.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco.py",
    "../_base_/schedules/adamw_1x_500.py",
    "../_base_/runtime.py",
]
published = dict(box_ap=49.8, mask_ap=44.6)
sync_bn = "torch"
model = dict(
    backbone=dict(model_name="ravlt_small", drop_path_rate=0.15, out_norm_eps=1e-6),
    neck=dict(in_channels=[64, 128, 320, 512]),
)

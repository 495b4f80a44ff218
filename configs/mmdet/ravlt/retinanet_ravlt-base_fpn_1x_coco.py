# RAVLT-B, RetinaNet 1x: box AP 49.8.
# Settings: the authors' config; result: the README of github.com/qhfan/RALA.
_base_ = [
    "../_base_/models/retinanet_fpn.py",
    "../_base_/datasets/coco_boxes.py",
    "../_base_/schedules/adamw_1x_retinanet.py",
    "../_base_/runtime.py",
]
published = dict(box_ap=49.8)
sync_bn = "torch"
model = dict(
    backbone=dict(model_name="ravlt_base", drop_path_rate=0.4, out_norm_eps=1e-6),
    neck=dict(in_channels=[192, 384, 512]),
)

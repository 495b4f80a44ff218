# RAVLT-S, Mask R-CNN 3x multi-scale: box AP 51.4, mask AP 45.5.
# Settings: the authors' config; result: the README of github.com/qhfan/RALA.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_multi-scale.py",
    "../_base_/schedules/adamw_3x_500.py",
    "../_base_/runtime.py",
]
published = dict(box_ap=51.4, mask_ap=45.5)
sync_bn = "torch"
model = dict(
    backbone=dict(model_name="ravlt_small", drop_path_rate=0.15, out_norm_eps=1e-6),
    neck=dict(in_channels=[64, 128, 320, 512]),
)

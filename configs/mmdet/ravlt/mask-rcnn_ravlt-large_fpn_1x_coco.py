# RAVLT-L, Mask R-CNN 1x: box AP 52.3, mask AP 46.4.
# Settings: the authors' config; result: the README of github.com/qhfan/RALA.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco.py",
    "../_base_/schedules/adamw_1x_500.py",
    "../_base_/runtime.py",
]
published = dict(box_ap=52.3, mask_ap=46.4)
sync_bn = "torch"
model = dict(
    backbone=dict(model_name="ravlt_large", drop_path_rate=0.55, out_norm_eps=1e-6),
    neck=dict(in_channels=[96, 192, 448, 640]),
)

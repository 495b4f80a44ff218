# RAVLT-L, Mask R-CNN 3x multi-scale: box AP 53.6, mask AP 47.3.
# Settings: the authors' config; result: the README of github.com/qhfan/RALA.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_multi-scale_8.py",
    "../_base_/schedules/adamw_3x_500.py",
    "../_base_/runtime.py",
]
published = dict(box_ap=53.6, mask_ap=47.3)
sync_bn = "torch"
model = dict(
    backbone=dict(model_name="ravlt_large", drop_path_rate=0.55, out_norm_eps=1e-6),
    neck=dict(in_channels=[96, 192, 448, 640]),
)

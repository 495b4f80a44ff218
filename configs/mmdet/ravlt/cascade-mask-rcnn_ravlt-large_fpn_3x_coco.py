# RAVLT-L, Cascade Mask R-CNN 3x multi-scale: box AP 55.6, mask AP 48.0.
# Settings: the authors' config; result: the README of github.com/qhfan/RALA.
_base_ = [
    "../_base_/models/cascade-mask-rcnn_fpn.py",
    "../_base_/datasets/coco_multi-scale_8.py",
    "../_base_/schedules/adamw_3x_500.py",
    "../_base_/runtime.py",
]
published = dict(box_ap=55.6, mask_ap=48.0)
sync_bn = "torch"
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
model = dict(
    backbone=dict(model_name="ravlt_large", drop_path_rate=0.55, out_norm_eps=1e-6),
    neck=dict(in_channels=[96, 192, 448, 640]),
)

# RAVLT-B, Cascade Mask R-CNN 3x multi-scale: box AP 55.3, mask AP 47.7.
# Settings: the authors' config; result: the README of github.com/qhfan/RALA.
_base_ = [
    "../_base_/models/cascade-mask-rcnn_fpn.py",
    "../_base_/datasets/coco_multi-scale.py",
    "../_base_/schedules/adamw_3x_500.py",
    "../_base_/runtime.py",
]
published = dict(box_ap=55.3, mask_ap=47.7)
sync_bn = "torch"
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
model = dict(
    backbone=dict(model_name="ravlt_base", drop_path_rate=0.4, out_norm_eps=1e-6),
    neck=dict(in_channels=[96, 192, 384, 512]),
)

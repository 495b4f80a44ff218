# Mask R-CNN 3x multi-scale as NAT, DiNAT and DiNAT_s are trained.
_base_ = [
    "../models/mask-rcnn_fpn.py",
    "../datasets/coco_multi-scale.py",
    "../schedules/adamw_3x_rpb.py",
    "../runtime.py",
]

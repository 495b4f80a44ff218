# MSVMamba-Micro, Mask R-CNN 1x: box AP 43.8, mask AP 39.9.
# Settings: the authors' config, which inherits Swin's; result: arXiv 2405.14174, github.com/YuHengsss/MSVMamba.
# Its ImageNet weights lie in a folder of the authors': name the file as `model.backbone.checkpoint`.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco.py",
    "../_base_/schedules/adamw_1x.py",
    "../_base_/runtime.py",
]
published = dict(box_ap=43.8, mask_ap=39.9)
model = dict(
    backbone=dict(model_name="msvmamba_micro", pretrained=False, drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

# MSVMamba-Tiny, Mask R-CNN 1x: box AP 46.9, mask AP 42.2.
# Settings: the authors' config, which inherits Swin's; result: arXiv 2405.14174, github.com/YuHengsss/MSVMamba.
# Its ImageNet weights lie in a folder of the authors': name the file as `model.backbone.checkpoint`.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco.py",
    "../_base_/schedules/adamw_1x.py",
    "../_base_/runtime.py",
]
published = dict(box_ap=46.9, mask_ap=42.2)
model = dict(
    backbone=dict(model_name="msvmamba_tiny", pretrained=False, drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

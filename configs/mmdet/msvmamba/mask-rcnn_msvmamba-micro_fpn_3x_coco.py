# MSVMamba-Micro, Mask R-CNN 3x multi-scale: box AP 46.3, mask AP 41.8.
# Settings: the authors' config, which inherits Swin's; result: arXiv 2405.14174, github.com/YuHengsss/MSVMamba.
# Its ImageNet weights lie in a folder of the authors': name the file as `model.backbone.checkpoint`.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_multi-scale.py",
    "../_base_/schedules/adamw_3x.py",
    "../_base_/runtime.py",
]
published = dict(box_ap=46.3, mask_ap=41.8)
model = dict(
    backbone=dict(model_name="msvmamba_micro", pretrained=False, drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

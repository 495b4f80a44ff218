# MSVMamba-Micro, UperNet 160k: mIoU 45.1, multi-scale 45.4.
# Settings: the authors' config, which inherits Swin's; result: arXiv 2405.14174, github.com/YuHengsss/MSVMamba.
# Its ImageNet weights lie in a folder of the authors': name the file as `model.backbone.checkpoint`.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/adamw_160k.py",
    "../_base_/runtime.py",
]
published = dict(miou=45.1, miou_multi_scale=45.4)
model = dict(
    backbone=dict(model_name="msvmamba_micro", pretrained=False, drop_path_rate=0.3),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)

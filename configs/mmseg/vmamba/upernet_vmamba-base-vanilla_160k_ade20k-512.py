# VMamba-B (first version), UperNet 160k: mIoU 50.0, multi-scale 51.3.
# Settings: the authors' config; result: the README of github.com/MzeroMiko/VMamba.
# Their config inherits this rate of stochastic depth from that of Swin-T.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/adamw_160k.py",
    "../_base_/runtime.py",
]
published = dict(miou=50.0, miou_multi_scale=51.3)
model = dict(
    backbone=dict(model_name="vmamba_base_vanilla", drop_path_rate=0.3),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)

# VMamba-B[s2l15], UperNet 160k: mIoU 51.0, multi-scale 51.6.
# Settings: the authors' config; result: the README of github.com/MzeroMiko/VMamba.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/adamw_160k.py",
    "../_base_/runtime.py",
]
published = dict(miou=51.0, miou_multi_scale=51.6)
model = dict(
    backbone=dict(model_name="vmamba_base", drop_path_rate=0.6),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)

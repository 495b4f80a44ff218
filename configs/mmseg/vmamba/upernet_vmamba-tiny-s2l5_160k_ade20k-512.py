# VMamba-T[s2l5], UperNet 160k: mIoU 48.3, multi-scale 48.6.
# Settings: the authors' config; result: the README of github.com/MzeroMiko/VMamba.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/adamw_160k.py",
    "../_base_/runtime.py",
]
published = dict(miou=48.3, miou_multi_scale=48.6)
model = dict(
    backbone=dict(model_name="vmamba_tiny_s2l5", drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

# VMamba-S (first version), UperNet 160k: mIoU 49.5, multi-scale 50.5.
# Settings: the authors' config; result: the README of github.com/MzeroMiko/VMamba.
# Their config inherits this rate of stochastic depth from that of Swin-T.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/adamw_160k.py",
    "../_base_/runtime.py",
]
published = dict(miou=49.5, miou_multi_scale=50.5)
model = dict(
    backbone=dict(model_name="vmamba_small_vanilla", drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

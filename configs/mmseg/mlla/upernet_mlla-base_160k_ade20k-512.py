# MLLA-B, UperNet 160k: mIoU 51.9, multi-scale 52.5.
# Settings: the authors' config; result: the README of github.com/LeapLabTHU/MLLA.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/adamw_160k.py",
    "../_base_/runtime.py",
]
published = dict(miou=51.9, miou_multi_scale=52.5)
model = dict(
    backbone=dict(model_name="mlla_base", drop_path_rate=0.5),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

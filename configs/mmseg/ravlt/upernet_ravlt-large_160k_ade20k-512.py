# RAVLT-L, UperNet 160k: mIoU 53.2.
# Settings: the authors' config; result: the README of github.com/qhfan/RALA.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/adamw_160k.py",
    "../_base_/runtime.py",
]
published = dict(miou=53.2)
sync_bn = "torch"
model = dict(
    backbone=dict(model_name="ravlt_large", drop_path_rate=0.55, out_norm_eps=1e-6),
    decode_head=dict(in_channels=[96, 192, 448, 640]),
    auxiliary_head=dict(in_channels=448),
)

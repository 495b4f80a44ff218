# RAVLT-B, Semantic FPN 80k: mIoU 51.9.
# Settings: the authors' config; result: the README of github.com/qhfan/RALA.
_base_ = [
    "../_base_/models/semantic-fpn.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/adamw_80k_semantic-fpn_ravlt.py",
    "../_base_/runtime.py",
]
published = dict(miou=51.9)
sync_bn = "torch"
model = dict(
    backbone=dict(model_name="ravlt_base", drop_path_rate=0.4, out_norm_eps=1e-6),
    neck=dict(in_channels=[96, 192, 384, 512]),
)

# NAT-Small, UperNet 160k: mIoU 48.0, multi-scale 49.5.
# Settings: the authors' config; result: the README of github.com/SHI-Labs/Neighborhood-Attention-Transformer.
_base_ = "../_base_/nat/upernet_160k.py"
published = dict(miou=48.0, miou_multi_scale=49.5)
model = dict(
    backbone=dict(model_name="nat_small", drop_path_rate=0.5),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

# NAT-Base, UperNet 160k: mIoU 48.5, multi-scale 49.7.
# Settings: the authors' config; result: the README of github.com/SHI-Labs/Neighborhood-Attention-Transformer.
_base_ = "../_base_/nat/upernet_160k.py"
published = dict(miou=48.5, miou_multi_scale=49.7)
model = dict(
    backbone=dict(model_name="nat_base", drop_path_rate=0.5),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)

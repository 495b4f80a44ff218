# NAT-Tiny, UperNet 160k: mIoU 47.1, multi-scale 48.4.
# Settings: the authors' config; result: the README of github.com/SHI-Labs/Neighborhood-Attention-Transformer.
_base_ = "../_base_/nat/upernet_160k.py"
published = dict(miou=47.1, miou_multi_scale=48.4)
model = dict(
    backbone=dict(model_name="nat_tiny", drop_path_rate=0.3),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)

# NAT-Mini, UperNet 160k: mIoU 45.1, multi-scale 46.4.
# Settings: the authors' config; result: the README of github.com/SHI-Labs/Neighborhood-Attention-Transformer.
_base_ = "../_base_/nat/upernet_160k.py"
published = dict(miou=45.1, miou_multi_scale=46.4)
model = dict(
    backbone=dict(model_name="nat_mini", drop_path_rate=0.2),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)

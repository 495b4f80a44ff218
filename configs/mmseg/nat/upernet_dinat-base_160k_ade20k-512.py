# DiNAT-Base, UperNet 160k: mIoU 49.6, multi-scale 50.4.
# Settings: the authors' config; result: the README of github.com/SHI-Labs/Neighborhood-Attention-Transformer.
_base_ = "../_base_/nat/upernet_160k.py"
published = dict(miou=49.6, miou_multi_scale=50.4)
model = dict(
    backbone=dict(
        model_name="dinat_base",
        drop_path_rate=0.5,
        model_args=dict(dilations=[[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4] * 3, [1, 2, 1, 2, 1]]),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)

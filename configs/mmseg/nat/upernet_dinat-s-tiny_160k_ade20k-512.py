# DiNAT_s-Tiny, UperNet 160k: mIoU 46.0, multi-scale 47.4.
# Settings: the authors' config; result: the README of github.com/SHI-Labs/Neighborhood-Attention-Transformer.
_base_ = "../_base_/nat/upernet_160k.py"
published = dict(miou=46.0, miou_multi_scale=47.4)
model = dict(
    backbone=dict(
        model_name="dinat_s_tiny",
        drop_path_rate=0.3,
        model_args=dict(dilations=[[1, 16], [1, 8], [1, 2, 1, 3, 1, 4], [1, 2]]),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

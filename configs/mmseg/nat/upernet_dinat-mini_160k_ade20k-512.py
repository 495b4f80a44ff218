# DiNAT-Mini, UperNet 160k: mIoU 45.8, multi-scale 47.2.
# Settings: the authors' config; result: the README of github.com/SHI-Labs/Neighborhood-Attention-Transformer.
_base_ = "../_base_/nat/upernet_160k.py"
published = dict(miou=45.8, miou_multi_scale=47.2)
model = dict(
    backbone=dict(
        model_name="dinat_mini",
        drop_path_rate=0.2,
        model_args=dict(dilations=[[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4], [1, 2, 1, 2, 1]]),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)

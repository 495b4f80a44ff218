# DiNAT_s-Large, UperNet 160k at 640 px: mIoU 53.4, multi-scale 54.6.
# Settings: the authors' config; result: the README of github.com/SHI-Labs/Neighborhood-Attention-Transformer.
# It starts from weights of ImageNet-22K: name the authors' file as `model.backbone.checkpoint`.
_base_ = "../_base_/nat/upernet_160k-640.py"
published = dict(miou=53.4, miou_multi_scale=54.6)
model = dict(
    backbone=dict(
        model_name="dinat_s_large",
        pretrained=False,
        drop_path_rate=0.3,
        model_args=dict(dilations=[[1, 20], [1, 10], [1, 2, 1, 3, 1, 4, 1, 5] * 2 + [1, 5], [1, 2]]),
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)

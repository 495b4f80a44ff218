# DiNAT-Small, Mask R-CNN 3x multi-scale: box AP 49.3, mask AP 44.0.
# Settings: the authors' config; result: the README of github.com/SHI-Labs/Neighborhood-Attention-Transformer.
_base_ = "../_base_/nat/mask-rcnn_3x.py"
published = dict(box_ap=49.3, mask_ap=44.0)
model = dict(
    backbone=dict(
        model_name="dinat_small",
        drop_path_rate=0.35,
        model_args=dict(dilations=[[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3, 1, 3, 1]]),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

# DiNAT-Small, Cascade Mask R-CNN 3x multi-scale: box AP 52.9, mask AP 45.8.
# Settings: the authors' config; result: the README of github.com/SHI-Labs/Neighborhood-Attention-Transformer.
_base_ = "../_base_/nat/cascade-mask-rcnn_3x.py"
published = dict(box_ap=52.9, mask_ap=45.8)
model = dict(
    backbone=dict(
        model_name="dinat_small",
        drop_path_rate=0.5,
        model_args=dict(dilations=[[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3, 1, 3, 1]]),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

# DiNAT_s-Tiny, Cascade Mask R-CNN 3x multi-scale: box AP 51.0, mask AP 44.1.
# Settings: the authors' config; result: the README of github.com/SHI-Labs/Neighborhood-Attention-Transformer.
_base_ = "../_base_/nat/cascade-mask-rcnn_3x.py"
published = dict(box_ap=51.0, mask_ap=44.1)
model = dict(
    backbone=dict(
        model_name="dinat_s_tiny",
        drop_path_rate=0.3,
        model_args=dict(dilations=[[1, 28], [1, 14], [1, 3, 1, 5, 1, 7], [1, 3]]),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

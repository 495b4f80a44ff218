# DiNAT-Mini, Cascade Mask R-CNN 3x multi-scale: box AP 51.2, mask AP 44.4.
# Settings: the authors' config; result: the README of github.com/SHI-Labs/Neighborhood-Attention-Transformer.
_base_ = "../_base_/nat/cascade-mask-rcnn_3x.py"
published = dict(box_ap=51.2, mask_ap=44.4)
model = dict(
    backbone=dict(
        model_name="dinat_mini",
        drop_path_rate=0.2,
        model_args=dict(dilations=[[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]]),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

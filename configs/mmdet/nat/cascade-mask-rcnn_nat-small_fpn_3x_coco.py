# NAT-Small, Cascade Mask R-CNN 3x multi-scale: box AP 52.0, mask AP 44.9.
# Settings: the authors' config; result: the README of github.com/SHI-Labs/Neighborhood-Attention-Transformer.
_base_ = "../_base_/nat/cascade-mask-rcnn_3x.py"
published = dict(box_ap=52.0, mask_ap=44.9)
model = dict(
    backbone=dict(model_name="nat_small", drop_path_rate=0.3),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

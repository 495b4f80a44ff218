# NAT-Small, Mask R-CNN 3x multi-scale: box AP 48.4, mask AP 43.2.
# Settings: the authors' config; result: the README of github.com/SHI-Labs/Neighborhood-Attention-Transformer.
_base_ = "../_base_/nat/mask-rcnn_3x.py"
published = dict(box_ap=48.4, mask_ap=43.2)
model = dict(
    backbone=dict(model_name="nat_small", drop_path_rate=0.35),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

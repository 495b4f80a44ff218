# NAT-Tiny, Mask R-CNN 3x multi-scale: box AP 47.7, mask AP 42.6.
# Settings: the authors' config; result: the README of github.com/SHI-Labs/Neighborhood-Attention-Transformer.
_base_ = "../_base_/nat/mask-rcnn_3x.py"
published = dict(box_ap=47.7, mask_ap=42.6)
model = dict(
    backbone=dict(model_name="nat_tiny", drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

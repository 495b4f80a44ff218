# NAT-Mini, Mask R-CNN 3x multi-scale: box AP 46.5, mask AP 41.7.
# Settings: the authors' config; result: the README of github.com/SHI-Labs/Neighborhood-Attention-Transformer.
_base_ = "../_base_/nat/mask-rcnn_3x.py"
published = dict(box_ap=46.5, mask_ap=41.7)
model = dict(
    backbone=dict(model_name="nat_mini", drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

# NAT-Base, Cascade Mask R-CNN 3x multi-scale: box AP 52.3, mask AP 45.1.
# Settings: the authors' config; result: the README of github.com/SHI-Labs/Neighborhood-Attention-Transformer.
_base_ = "../_base_/nat/cascade-mask-rcnn_3x.py"
published = dict(box_ap=52.3, mask_ap=45.1)
model = dict(
    backbone=dict(model_name="nat_base", drop_path_rate=0.5),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)

# NAT-Mini, Cascade Mask R-CNN 3x multi-scale: box AP 50.3, mask AP 43.6.
# Settings: the authors' config; result: the README of github.com/SHI-Labs/Neighborhood-Attention-Transformer.
_base_ = "../_base_/nat/cascade-mask-rcnn_3x.py"
published = dict(box_ap=50.3, mask_ap=43.6)
model = dict(
    backbone=dict(model_name="nat_mini", drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

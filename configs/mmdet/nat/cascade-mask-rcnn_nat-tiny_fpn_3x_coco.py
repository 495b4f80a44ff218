# NAT-Tiny, Cascade Mask R-CNN 3x multi-scale: box AP 51.4, mask AP 44.5.
# Settings: the authors' config; result: the README of github.com/SHI-Labs/Neighborhood-Attention-Transformer.
_base_ = "../_base_/nat/cascade-mask-rcnn_3x.py"
published = dict(box_ap=51.4, mask_ap=44.5)
model = dict(
    backbone=dict(model_name="nat_tiny", drop_path_rate=0.3),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

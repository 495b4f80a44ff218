# DiNAT_s-Base, Cascade Mask R-CNN 3x multi-scale: box AP 52.6, mask AP 45.3.
# Settings: the authors' config; result: the README of github.com/SHI-Labs/Neighborhood-Attention-Transformer.
_base_ = "../_base_/nat/cascade-mask-rcnn_3x.py"
published = dict(box_ap=52.6, mask_ap=45.3)
model = dict(
    backbone=dict(
        model_name="dinat_s_base",
        drop_path_rate=0.6,
        model_args=dict(dilations=[[1, 28], [1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3]]),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(optimizer=dict(lr=7.5e-5))

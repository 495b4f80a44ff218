# DiNAT-Large, Cascade Mask R-CNN 3x multi-scale: box AP 55.3, mask AP 47.8.
# Settings: the authors' config; result: the README of github.com/SHI-Labs/Neighborhood-Attention-Transformer.
# It starts from weights of ImageNet-22K: name the authors' file as `model.backbone.checkpoint`.
_base_ = "../_base_/nat/cascade-mask-rcnn_3x.py"
published = dict(box_ap=55.3, mask_ap=47.8)
model = dict(
    backbone=dict(
        model_name="dinat_large",
        pretrained=False,
        drop_path_rate=0.6,
        model_args=dict(dilations=[[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3, 1, 3, 1]]),
    ),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
optim_wrapper = dict(optimizer=dict(lr=7.5e-5))

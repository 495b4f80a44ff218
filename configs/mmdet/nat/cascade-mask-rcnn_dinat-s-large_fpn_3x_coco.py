# DiNAT_s-Large, Cascade Mask R-CNN 3x multi-scale: box AP 54.8, mask AP 47.2.
# Settings: the authors' config; result: the README of github.com/SHI-Labs/Neighborhood-Attention-Transformer.
# It starts from weights of ImageNet-22K: name the authors' file as `model.backbone.checkpoint`.
_base_ = "../_base_/nat/cascade-mask-rcnn_3x.py"
published = dict(box_ap=54.8, mask_ap=47.2)
model = dict(
    backbone=dict(
        model_name="dinat_s_large",
        pretrained=False,
        drop_path_rate=0.6,
        model_args=dict(dilations=[[1, 28], [1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3]]),
    ),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
optim_wrapper = dict(optimizer=dict(lr=5e-5))

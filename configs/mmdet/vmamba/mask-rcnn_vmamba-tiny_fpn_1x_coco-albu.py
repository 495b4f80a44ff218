# VMamba-T[s1l8], Mask R-CNN 1x with transforms of albumentations, as an example without a published result.
# Other settings: the authors' config of github.com/MzeroMiko/VMamba.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_albu.py",
    "../_base_/schedules/adamw_1x.py",
    "../_base_/runtime.py",
]
published: dict[str, float] = {}
model = dict(
    backbone=dict(model_name="vmamba_tiny", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

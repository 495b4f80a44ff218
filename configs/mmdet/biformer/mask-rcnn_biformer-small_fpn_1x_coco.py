# BiFormer-S, Mask R-CNN 1x: box AP 47.8, mask AP 43.2.
# Settings and result: github.com/rayleizhu/BiFormer, whose links to weights are broken: set backbone.checkpoint.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco.py",
    "../_base_/schedules/adamw_1x_warmup-500.py",
    "../_base_/runtime.py",
]
published = dict(box_ap=47.8, mask_ap=43.2)
model = dict(
    backbone=dict(
        model_name="biformer_small", pretrained=False, norm_eval=True, drop_path_rate=0.2, model_args=dict(n_win=16)
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

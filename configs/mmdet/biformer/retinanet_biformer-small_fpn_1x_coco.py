# BiFormer-S, RetinaNet 1x: box AP 45.9.
# Settings and result: github.com/rayleizhu/BiFormer, whose links to weights are broken: set backbone.checkpoint.
_base_ = [
    "../_base_/models/retinanet_fpn.py",
    "../_base_/datasets/coco_boxes.py",
    "../_base_/schedules/adamw_1x_retinanet.py",
    "../_base_/runtime.py",
]
published = dict(box_ap=45.9)
model = dict(
    backbone=dict(
        model_name="biformer_small", pretrained=False, norm_eval=True, drop_path_rate=0.2, model_args=dict(n_win=16)
    ),
    neck=dict(in_channels=[128, 256, 512]),
)

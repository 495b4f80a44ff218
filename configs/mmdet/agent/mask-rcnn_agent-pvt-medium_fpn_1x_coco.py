# Agent-PVT-M, Mask R-CNN 1x: box AP 45.9, mask AP 42.0.
# Settings: the authors' config; result: the README of github.com/LeapLabTHU/Agent-Attention.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco.py",
    "../_base_/schedules/adamw_1x_pvt.py",
    "../_base_/runtime.py",
]
published = dict(box_ap=45.9, mask_ap=42.0)
options = dict(mixer_options=[dict(agents=a, pooled_agents=b) for a, b in ((9, 144), (16, 256), (49, 784), (49, 784))])
model = dict(
    backbone=dict(model_name="agent_pvt_medium", drop_path_rate=0.1, out_norm=False, model_args=options),
    neck=dict(in_channels=[64, 128, 320, 512]),
)

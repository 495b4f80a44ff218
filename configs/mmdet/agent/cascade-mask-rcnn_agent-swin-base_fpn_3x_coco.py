# Agent-Swin-B, Cascade Mask R-CNN 3x multi-scale: box AP 52.6, mask AP 45.3.
# Settings: the authors' config; result: the README of github.com/LeapLabTHU/Agent-Attention.
_base_ = [
    "../_base_/models/cascade-mask-rcnn_fpn.py",
    "../_base_/datasets/coco_multi-scale.py",
    "../_base_/schedules/adamw_3x_agent.py",
    "../_base_/runtime.py",
]
published = dict(box_ap=52.6, mask_ap=45.3)
options = dict(mixer_options=[dict(agents=a, pooled_agents=b) for a, b in ((9, 81), (16, 144), (49, 196), (49, 49))])
model = dict(
    backbone=dict(model_name="agent_swin_base", drop_path_rate=0.4, model_args=options),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)

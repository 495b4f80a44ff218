# Agent-PVT-M, Semantic FPN 40k: mIoU 44.30.
# Settings: the authors' config; result: the README of github.com/LeapLabTHU/Agent-Attention.
_base_ = [
    "../_base_/models/semantic-fpn.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/adamw_40k_semantic-fpn.py",
    "../_base_/runtime.py",
]
published = dict(miou=44.30)
options = dict(mixer_options=[dict(agents=a, pooled_agents=b) for a, b in ((9, 144), (16, 256), (49, 784), (49, 784))])
model = dict(
    backbone=dict(model_name="agent_pvt_medium", drop_path_rate=0.2, out_norm=False, model_args=options),
    neck=dict(in_channels=[64, 128, 320, 512]),
)

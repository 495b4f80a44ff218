# Agent-Swin-S, UperNet 160k: mIoU 48.08.
# Settings: the authors' config; result: the README of github.com/LeapLabTHU/Agent-Attention.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/adamw_160k_agent.py",
    "../_base_/runtime.py",
]
published = dict(miou=48.08)
options = dict(mixer_options=[dict(agents=a, pooled_agents=b) for a, b in ((9, 81), (16, 144), (49, 196), (49, 49))])
model = dict(
    backbone=dict(model_name="agent_swin_small", drop_path_rate=0.3, model_args=options),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

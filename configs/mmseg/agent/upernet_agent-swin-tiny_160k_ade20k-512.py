# Agent-Swin-T, UperNet 160k: mIoU 46.68.
# Settings: the authors' config; result: the README of github.com/LeapLabTHU/Agent-Attention.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/adamw_160k_agent.py",
    "../_base_/runtime.py",
]
published = dict(miou=46.68)
options = dict(mixer_options=[dict(agents=a, pooled_agents=b) for a, b in ((9, 81), (16, 144), (49, 196), (49, 49))])
model = dict(
    backbone=dict(model_name="agent_swin_tiny", drop_path_rate=0.3, model_args=options),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

# BiFormer-S, Semantic FPN 80k: mIoU 48.9.
# Settings and result: github.com/rayleizhu/BiFormer, whose links to weights are broken: set backbone.checkpoint.
_base_ = [
    "../_base_/models/semantic-fpn.py",
    "../_base_/datasets/ade20k_batch-32.py",
    "../_base_/schedules/adamw_80k_cosine.py",
    "../_base_/runtime.py",
]
published = dict(miou=48.9)
model = dict(
    backbone=dict(
        model_name="biformer_small", pretrained=False, norm_eval=True, drop_path_rate=0.15, model_args=dict(n_win=8)
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

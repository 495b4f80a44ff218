# BiFormer-B, UperNet 160k: mIoU 51.0, multi-scale 51.7.
# Settings and result: github.com/rayleizhu/BiFormer, whose links to weights are broken: set backbone.checkpoint.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/adamw_160k.py",
    "../_base_/runtime.py",
]
published = dict(miou=51.0, miou_multi_scale=51.7)
model = dict(
    backbone=dict(
        model_name="biformer_base", pretrained=False, norm_eval=True, drop_path_rate=0.4, model_args={"n_win": 8}
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

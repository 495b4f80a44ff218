# BiFormer-S, UperNet 160k: mIoU 49.8, multi-scale 50.8.
# Settings and result: github.com/rayleizhu/BiFormer, whose links to weights are broken: set backbone.checkpoint.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/adamw_160k.py",
    "../_base_/runtime.py",
]
published = dict(miou=49.8, miou_multi_scale=50.8)
model = dict(
    backbone=dict(
        model_name="biformer_small", pretrained=False, norm_eval=True, drop_path_rate=0.3, model_args={"n_win": 8}
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)

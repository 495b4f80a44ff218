# VMamba-T[s1l8], UperNet 160k with transforms of albumentations, as an example without a published result.
# Other settings: the authors' config of github.com/MzeroMiko/VMamba.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_albu.py",
    "../_base_/schedules/adamw_160k.py",
    "../_base_/runtime.py",
]
published: dict[str, float] = {}
model = dict(
    backbone=dict(model_name="vmamba_tiny", drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

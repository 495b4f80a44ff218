# AdamW for 80,000 iterations of Semantic FPN as BiFormer (arXiv 2303.08810) trains, for 32 images a step.
_base_ = "./adamw_80k_semantic-fpn.py"
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=1000),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=False, begin=1000, end=80000),
]
optim_wrapper = dict(optimizer=dict(lr=2e-4))

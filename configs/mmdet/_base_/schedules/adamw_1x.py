# AdamW for 12 epochs as papers of hierarchical backbones train since Swin (arXiv 2103.14030), for 16 images a step.
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=12, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="SubquadParamGroups",
    # Parts of names: norms are not decayed, biases and parameters of scans are.
    paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}),
)

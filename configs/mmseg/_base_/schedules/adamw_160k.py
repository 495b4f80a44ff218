# AdamW for 160,000 iterations as papers of hierarchical backbones train UperNet since Swin (arXiv 2103.14030), for 16
# images a step.
train_cfg = dict(type="IterBasedTrainLoop", max_iters=160000, val_interval=16000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=160000, by_epoch=False),
]
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    constructor="SubquadParamGroups",
    # Parts of names: norms are not decayed, biases and parameters of scans are.
    paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}),
)

# Half as many iterations at twice the learning rate, as agent attention (arXiv 2312.08874) trains.
_base_ = "./adamw_80k_semantic-fpn.py"
train_cfg = dict(max_iters=40000, val_interval=4000)
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=40000, by_epoch=False)]
optim_wrapper = dict(optimizer=dict(lr=2e-4))

# The same with a learning rate that does not fall to zero, as RAVLT (arXiv 2411.07635) trains.
_base_ = "./adamw_80k_semantic-fpn.py"
param_scheduler = [dict(type="PolyLR", eta_min=1e-6, power=0.9, begin=0, end=80000, by_epoch=False)]

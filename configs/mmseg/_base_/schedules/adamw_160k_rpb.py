# The same for NAT: tables of relative positions are not decayed.
_base_ = "./adamw_160k.py"
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0)}))

# AdamW for 12 epochs of RetinaNet as papers train since PVT (arXiv 2102.12122): everything decays, and less.
_base_ = "./adamw_1x_500.py"
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4), paramwise_cfg=dict(_delete_=True))

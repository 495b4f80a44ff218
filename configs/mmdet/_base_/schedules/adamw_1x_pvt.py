# The same at twice the learning rate, for two-stage detectors as papers train them since PVT.
_base_ = "./adamw_1x_retinanet.py"
optim_wrapper = dict(optimizer=dict(lr=2e-4))

# The same at 640 px, as the large models are trained.
_base_ = [
    "../models/upernet.py",
    "../datasets/ade20k-640.py",
    "../schedules/adamw_160k_rpb.py",
    "../runtime.py",
]
model = dict(data_preprocessor=dict(size=(640, 640)))

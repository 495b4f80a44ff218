# UperNet 160k as NAT, DiNAT and DiNAT_s are trained.
_base_ = [
    "../models/upernet.py",
    "../datasets/ade20k.py",
    "../schedules/adamw_160k_rpb.py",
    "../runtime.py",
]

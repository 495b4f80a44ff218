# ADE20K with 32 images a step: 4 on each of 8 GPUs.
_base_ = "./ade20k.py"
train_dataloader = dict(batch_size=4)
auto_scale_lr = dict(base_batch_size=32)

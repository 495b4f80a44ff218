# The same with 8 GPUs x 1 image.
_base_ = "./coco_multi-scale.py"
train_dataloader = dict(batch_size=1)
auto_scale_lr = dict(base_batch_size=8)

# ADE20K with transforms of albumentations, as an example: label maps go through them.
_base_ = "./ade20k.py"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomResize", scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(512, 512), cat_max_ratio=0.75),
    dict(
        type="Albu",
        transforms=[
            dict(type="HorizontalFlip", p=0.5),
            dict(type="RandomBrightnessContrast", brightness_limit=0.2, contrast_limit=0.2, p=0.5),
        ],
        keymap=dict(img="image", gt_seg_map="mask"),
    ),
    dict(type="PackSegInputs", meta_keys=("img_path", "ori_shape", "img_shape", "scale_factor", "reduce_zero_label")),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

# The same for agent attention, whose tables of biases are not decayed.
_base_ = "./adamw_160k.py"
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            "relative_position_bias_table": dict(decay_mult=0.0),
            **{f"{name}_bias": dict(decay_mult=0.0) for name in ("an", "na", "ah", "aw", "ha", "wa")},
        }
    )
)

"""Arithmetic of the library: functions of tensors that know nothing of models.

Every op runs on any device through PyTorch and on GPUs through Triton. ``explain`` says which implementation a call
would use and why the others were passed over; ``use_backend`` (or the environment variable ``SUBQUAD_BACKEND``) picks
one.
"""

from subquad.ops._dispatch import Explanation, explain, use_backend
from subquad.ops.depthwise_conv import causal_conv1d, depthwise_conv2d
from subquad.ops.gated_linear_attention import gated_linear_attention
from subquad.ops.layer_norm import add_layer_norm, layer_norm
from subquad.ops.linear_attention import linear_attention
from subquad.ops.neighborhood_attention import na1d, na2d, na3d
from subquad.ops.neighborhood_attention.modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)
from subquad.ops.neighborhood_attention.split import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk
from subquad.ops.region_attention import region_attention, route_regions
from subquad.ops.selective_scan import selective_scan
from subquad.ops.window_attention import window_attention, window_attention_packed

__all__ = [
    "Explanation",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "add_layer_norm",
    "causal_conv1d",
    "depthwise_conv2d",
    "explain",
    "gated_linear_attention",
    "layer_norm",
    "linear_attention",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "region_attention",
    "route_regions",
    "selective_scan",
    "use_backend",
    "window_attention",
    "window_attention_packed",
]

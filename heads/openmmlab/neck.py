"""``SimpleFeaturePyramid``: four or five maps for a detector out of the one map of an isotropic backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor, nn

_SCALES = (4.0, 2.0, 1.0, 0.5)


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """The simple feature pyramid of ViTDet (arXiv 2203.16527, section 3).

    Takes the last of the maps that it is given, (B, in_channels, H, W), to maps of 4, 2, 1 and 1/2 times its height and
    width by transposed convolutions and pooling, each followed by a 1x1 and a 3x3 convolution with norms.

    Args:
        in_channels: of the map; a list of one number is taken as well.
        out_channels: of the results.
        num_outs: number of results, 4 or 5: the fifth is every second pixel of the fourth, as an RPN wants it.

    Attributes:
        scales: size of each of the first four results relative to the input.

    Raises:
        ValueError: for another ``num_outs``, or several ``in_channels``.
    """

    scales = _SCALES

    def __init__(self, in_channels: int | Sequence[int], out_channels: int = 256, num_outs: int = 5) -> None:
        super().__init__()
        if num_outs not in (4, 5):
            raise ValueError(f"num_outs must be 4 or 5, got {num_outs}")
        channels = [in_channels] if isinstance(in_channels, int) else list(in_channels)
        if len(channels) != 1:
            raise ValueError(f"SimpleFeaturePyramid takes one map, got in_channels={channels}")
        self.in_channels = channels
        self.num_outs = num_outs
        self.levels = nn.ModuleList(_level(channels[0], out_channels, scale) for scale in _SCALES)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps of the backbone to ``num_outs`` maps (B, out_channels, H', W'), the largest first."""
        outs = [level(inputs[-1]) for level in self.levels]
        if self.num_outs == 5:
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return tuple(out.contiguous() for out in outs)


def _level(dim: int, out_dim: int, scale: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    if scale == 4.0:
        layers += [nn.ConvTranspose2d(dim, dim // 2, 2, stride=2), LayerNorm2d(dim // 2), nn.GELU()]
        layers += [nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2)]
        dim = dim // 4
    elif scale == 2.0:
        layers += [nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)]
        dim = dim // 2
    elif scale == 0.5:
        layers += [nn.MaxPool2d(2)]
    layers += [nn.Conv2d(dim, out_dim, 1, bias=False), LayerNorm2d(out_dim)]
    layers += [nn.Conv2d(out_dim, out_dim, 3, padding=1, bias=False), LayerNorm2d(out_dim)]
    return nn.Sequential(*layers)

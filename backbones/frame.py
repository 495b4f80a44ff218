"""VMamba's frame, which MSVMamba and the hierarchical ViG share: stems, stages, names and shapes of official files."""

# Annotations are not postponed here: TorchScript reads those of the methods.

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from subquad.backbones.base import Factory, StageSpec
from subquad.backbones.images import check_image_size
from subquad.backbones.layers import ConvDownsample, MapConv2d
from subquad.backbones.norms import LayerNorm, StreamNorm


class PatchStem(nn.Module):
    """Images (B, C, H, W) to (B, H / 4, W / 4, dim) by one convolution; pixels beyond a multiple of 4 are dropped.

    Raises:
        ValueError: for images of less than 4 pixels along an axis.
    """

    def __init__(self, in_chans: int, dim: int, norm: bool, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim, 4, stride=4, **dd)
        self.norm1 = StreamNorm(dim, **dd) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        check_image_size(x, 4)
        return self.norm1(self.conv1(x).permute(0, 2, 3, 1))


class ConvStem(nn.Module):
    """Images (B, C, H, W) to (B, ceil(ceil(H / 2) / 2), likewise W, dim) by two convolutions."""

    def __init__(self, in_chans: int, dim: int, norm: bool, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = StreamNorm(dim // 2, **dd) if norm else nn.Identity()
        self.act = nn.GELU()
        self.conv2 = MapConv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm2 = StreamNorm(dim, **dd) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x).permute(0, 2, 3, 1)))
        return self.norm2(self.conv2(x))


STEMS = {"conv": ConvStem, "patch": PatchStem}
"""Upstream's patch embeddings v2 and v1."""

DOWNSAMPLES: dict[str, Factory] = {
    "conv": ConvDownsample,
    "patch": partial(ConvDownsample, kernel_size=2),
    "merge": partial(PatchMerging, norm_layer=LayerNorm),
}
"""Upstream's v3, v2 and v1."""


def frame(
    depths: Sequence[int],
    dims: Sequence[int],
    blocks: Sequence[Factory],
    stem: str,
    downsample: str,
    patch_norm: bool,
    in_chans: int,
    device: Any,
    dtype: Any,
) -> dict[str, Any]:
    """Arguments of ``Pyramid`` for a model in VMamba's frame: stages of 4, 8, 16, ... pixels behind a stem.

    Args:
        depths, dims, blocks: number of blocks, channels and block factory of each stage.
        stem: one of ``STEMS``; ``patch_norm`` says whether it has norms.
        downsample: one of ``DOWNSAMPLES``.

    Raises:
        ValueError: for an unknown stem or downsampling, or no input channels.
    """
    if stem not in STEMS:
        raise ValueError(f"unknown stem {stem!r}, expected one of {list(STEMS)}")
    if downsample not in DOWNSAMPLES:
        raise ValueError(f"unknown downsample {downsample!r}, expected one of {list(DOWNSAMPLES)}")
    if in_chans < 1:
        raise ValueError(f"in_chans must be at least 1, got {in_chans}")
    stages = [
        StageSpec(dim, depth, 4 * 2**i, block, DOWNSAMPLES[downsample] if i else None)
        for i, (dim, depth, block) in enumerate(zip(dims, depths, blocks, strict=True))
    ]
    return {
        "stem": STEMS[stem](in_chans, dims[0], patch_norm, device=device, dtype=dtype),
        "stages": stages,
        "norm": StreamNorm,
        "in_chans": in_chans,
        "device": device,
        "dtype": dtype,
    }


# Upstream's names of a model in VMamba's frame to those of ``Pyramid``, in order; blocks keep upstream's ``op``.
FRAME_NAMES: list[tuple[str, str | None]] = [
    # names of January 2024
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    # norms of detection backbones
    (r"^outnorm\d+\.", None),
    (r"^patch_embed\.0\.", "stem.conv1."),
    (r"^patch_embed\.2\.", "stem.norm1."),
    (r"^patch_embed\.5\.", "stem.conv2."),
    (r"^patch_embed\.7\.", "stem.norm2."),
    # upstream downsamples at the end of a stage
    *((rf"^layers\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(3)),
    (r"\.downsample\.1\.", ".downsample.conv."),
    (r"\.downsample\.3\.", ".downsample.norm."),
    (r"^layers\.", "stages."),
    (r"(\.blocks\.\d+)\.norm\.", r"\1.norm1."),
    (r"(\.blocks\.\d+)\.op\.", r"\1.mixer."),
    (r"\.mixer\.conv2d\.", ".mixer.conv."),
    (r"\.mixer\.dt_projs_", ".mixer.dt_"),
    (r"\.mixer\.A_logs$", ".mixer.A_log"),
    (r"\.mixer\.Ds$", ".mixer.D"),
    (r"^classifier\.", ""),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def fit_scan_weights(state_dict: dict[str, Tensor], expected: dict[str, Tensor], sets: int) -> dict[str, Tensor]:
    """Weights of a model in VMamba's frame in our shapes; what does not fit is left for the loader to report.

    1x1 convolutions become matrices, (K * E, ...) becomes (K, E, ...) for ``A_log`` and ``D``, and an input projection
    of twice the width expected splits into ``in_proj`` and ``gate_proj``.
    """
    ours: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        gate = name.replace(".in_proj.", ".gate_proj.")
        if value.dim() == 4 and value.shape[2:] == (1, 1) and expected.get(name, value).dim() == 2:
            value = value.flatten(1)  # trained channels first
        if name.endswith((".A_log", ".D")) and expected.get(name, value).dim() == value.dim() + 1:
            value = value.unflatten(0, (sets, -1)) if len(value) % sets == 0 else value
        if gate != name and gate in expected and value.shape[0] == 2 * expected[name].shape[0]:
            value, ours[gate] = value.chunk(2)
        ours[name] = value
    return ours

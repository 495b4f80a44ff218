"""MSVMamba (arXiv 2405.14174): VMamba's frame with one scan at full and three at half resolution.

Official code and weights: https://github.com/YuHengsss/MSVMamba. Of every block's channels, rows are scanned at full
resolution; a map of half the size is scanned along three more routes, one after the other with one state handed on.
Version 2 of the models differs in how the two are merged and where the feed-forward part is normalised.
"""

# Annotations are not postponed here: TorchScript reads those of local variables.

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from subquad.backbones import weights
from subquad.backbones.base import Pyramid
from subquad.backbones.frame import FRAME_NAMES, fit_scan_weights, frame
from subquad.backbones.layers import (
    DepthwiseConv,
    MapConv2d,
    ScanParameters,
    check_scan_sizes,
    scan_rank,
    scan_routes,
    stage_dims,
)
from subquad.backbones.norms import LayerNorm
from subquad.backbones.registry import default_cfg, register_variants
from subquad.ops.selective_scan import ROUTES

__all__ = ["ConvFFN", "MSVMamba", "MSVMambaBlock", "MultiScaleSS2D"]


class SqueezeExcite(nn.Module):
    """Weights for the channels of (B, H, W, dim) from their means; timm's layer for this layout cannot be scripted."""

    def __init__(self, dim: int, hidden: int, **dd: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=False, **dd)
        self.fc2 = nn.Linear(hidden, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((1, 2), keepdim=True)))))


class MultiScaleSS2D(ScanParameters):
    """Token mixer: two depthwise convolutions, of stride 1 and 2, each with SiLU and scans; squeeze-and-excitation.

    Maps (B, H, W, dim) to itself. The full map is scanned along its rows with the first set of parameters, the half map
    along rows reversed, columns and columns reversed with the second: as one sequence, so each starts from the state
    with which the one before ended.

    Args:
        dim: channels of the map.
        d_state: states per scanned channel, N.
        ssm_ratio: scanned channels E / dim.
        dt_rank: rank R of the step size, ``"auto"`` for ceil(dim / 16).
        gated: multiply the result with SiLU of a second projection.
        merge: ``"normed"`` normalises every scan, resizes the half map bilinearly and adds; ``"raw"`` adds the nearest
            pixel of the half map and normalises the sum.
    """

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 1,
        ssm_ratio: float = 2.0,
        dt_rank: int | Literal["auto"] = "auto",
        gated: bool = True,
        merge: Literal["normed", "raw"] = "normed",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        inner = int(ssm_ratio * dim)
        super().__init__(2, inner, scan_rank(dim, dt_rank), d_state, **dd)
        self.full_route = [ROUTES["row"]]
        self.half_routes = [[ROUTES[route]] for route in ("row_reversed", "column", "column_reversed")]
        self.norm_scans = merge == "normed"
        self.in_proj = nn.Linear(dim, inner, bias=False, **dd)
        self.gate_proj = nn.Linear(dim, inner, bias=False, **dd) if gated else None
        self.conv = DepthwiseConv(inner, 3, activation="silu", **dd)
        self.half_conv = MapConv2d(inner, inner, 7, stride=2, padding=3, groups=inner, **dd)
        self.out_norm = LayerNorm(inner, result="input", **dd)
        self.se = SqueezeExcite(inner, max(1, inner // 8), **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor | None = None
        if self.gate_proj is not None:
            gate = F.silu(self.gate_proj(x))
        x = self.in_proj(x)
        y = self.scan_full(self.conv(x))
        half = self.scan_half(F.silu(self.half_conv(x)).contiguous()).permute(0, 3, 1, 2)
        size = [x.shape[1], x.shape[2]]
        if self.norm_scans:
            y = y + F.interpolate(half, size=size, mode="bilinear").permute(0, 2, 3, 1)
        else:
            y = self.out_norm(y + F.interpolate(half, size=size, mode="nearest").permute(0, 2, 3, 1))
        y = self.se(y.type_as(x))
        if gate is not None:
            y = y * gate
        return self.out_proj(y)

    def scan_full(self, x: Tensor) -> Tensor:
        """Rows of (B, H, W, E) with the first set of parameters; float32 for float16."""
        dt, B, C = self.project(x, 0, 1)
        y, _ = scan_routes(
            x, dt, self.A_log[:1], B, C, self.D[:1], self.dt_weight[:1], self.dt_bias[:1], self.full_route
        )
        return self.out_norm(y) if self.norm_scans else y

    def scan_half(self, x: Tensor) -> Tensor:
        """Sum of three routes through (B, H', W', E) with the second set of parameters; float32 for float16."""
        dt, B, C = self.project(x, 1, 2)
        A_log, D, dt_weight, dt_bias = self.A_log[1:], self.D[1:], self.dt_weight[1:], self.dt_bias[1:]
        total: Tensor | None = None
        state: Tensor | None = None
        for route in self.half_routes:
            y, state = scan_routes(x, dt, A_log, B, C, D, dt_weight, dt_bias, route, state)
            if self.norm_scans:
                y = self.out_norm(y)
            total = y if total is None else total + y
        assert total is not None
        return total


class ConvFFN(nn.Module):
    """Two linear layers with a depthwise convolution between, added before the activation: (B, H, W, dim) to itself."""

    def __init__(self, dim: int, hidden: int, **dd: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.conv = DepthwiseConv(hidden, 3, activation="gelu", residual=True, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.conv(self.fc1(x)))


class MSVMambaBlock(nn.Module):
    """Residual block on (B, H, W, dim): normed mixer, then ConvFFN, normed in front or behind; ``ssm`` to the mixer."""

    def __init__(
        self,
        dim: int,
        *,
        ffn_ratio: float = 2.0,
        post_norm: bool = False,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **ssm: Any,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.post_norm = post_norm
        self.norm1 = LayerNorm(dim, **dd)
        self.mixer = MultiScaleSS2D(dim, **ssm, **dd)
        self.norm2 = LayerNorm(dim, result="stream" if post_norm else "projection", **dd)
        self.ffn = ConvFFN(dim, int(dim * ffn_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        y = self.norm2(self.ffn(x)) if self.post_norm else self.ffn(self.norm2(x))
        return x + self.drop_path(y)


class MSVMamba(Pyramid):
    """MSVMamba; the defaults of the options are those of version 1.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage, or of the first one (doubling from stage to stage).
        d_state, ssm_ratio, dt_rank, gated, merge: see ``MultiScaleSS2D``.
        ffn_ratio: hidden size of the ConvFFN over the channels.
        post_norm: normalise behind the ConvFFN instead of in front of it.
        stem: ``"conv"``, two 3x3 convolutions, or ``"patch"``, one 4x4.
        downsample: ``"conv"``, 3x3, ``"patch"``, 2x2, or ``"merge"``, PatchMerging.
        patch_norm: norms in the stem.
        in_chans, device, dtype, pyramid: arguments of ``Pyramid``.

    Raises:
        ValueError: for a size or option that cannot be built, naming it.
        TypeError: for an unknown argument.
    """

    def __init__(
        self,
        depths: Sequence[int] = (1, 2, 9, 2),
        dims: int | Sequence[int] = 96,
        *,
        d_state: int = 1,
        ssm_ratio: float = 2.0,
        dt_rank: int | Literal["auto"] = "auto",
        gated: bool = True,
        merge: Literal["normed", "raw"] = "normed",
        ffn_ratio: float = 2.0,
        post_norm: bool = False,
        stem: Literal["conv", "patch"] = "patch",
        downsample: Literal["conv", "patch", "merge"] = "merge",
        patch_norm: bool = True,
        in_chans: int = 3,
        device: Any = None,
        dtype: Any = None,
        **pyramid: Any,
    ) -> None:
        dims = stage_dims(depths, dims)
        check_scan_sizes(min(dims), d_state, ssm_ratio, dt_rank)
        if merge not in ("normed", "raw"):
            raise ValueError(f"unknown merge {merge!r}, expected 'normed' or 'raw'")
        if int(min(dims) * ffn_ratio) < 1:
            raise ValueError(f"ffn_ratio must be positive, got {ffn_ratio}")
        block = partial(
            MSVMambaBlock,
            d_state=d_state,
            ssm_ratio=ssm_ratio,
            dt_rank=dt_rank,
            gated=gated,
            merge=merge,
            ffn_ratio=ffn_ratio,
            post_norm=post_norm,
        )
        super().__init__(
            **frame(depths, dims, [block] * len(dims), stem, downsample, patch_norm, in_chans, device, dtype),
            **pyramid,
        )
        # Version 1 keeps the parameters of the half map first.
        self.official_half_first = merge == "normed"

    def no_weight_decay(self) -> set[str]:
        """The skip weights, which the official training kept as a vector; it decayed ``A_log`` and ``dt_bias``."""
        return {name for name, _ in self.named_parameters() if name.endswith(".D")}


# Weights ---------------------------------------------------------------------------------------------------------

_NAMES: list[tuple[str, str | None]] = [
    *FRAME_NAMES,
    (r"\.convFFN\.linear", ".ffn.fc"),
    (r"\.convFFN\.dwc\.", ".ffn.conv."),
    (r"\.mixer\.conv2d_b1\.", ".mixer.half_conv."),
    (r"\.mixer\.se\.fc\.0\.", ".mixer.se.fc1."),
    (r"\.mixer\.se\.fc\.2\.", ".mixer.se.fc2."),
]
_BY_SET = (".x_proj_weight", ".dt_weight", ".dt_bias", ".A_log", ".D")


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
    """An official checkpoint under our names and in our shapes; ours pass unchanged.

    Raises:
        ValueError: if there are no tensors in it (see ``weights.unwrap``).
    """
    official = weights.unwrap(state_dict)
    ours = fit_scan_weights(weights.rename(official, _NAMES), model.state_dict(), 2)
    if model.official_half_first and any(name.startswith("layers.") for name in official):
        ours = {name: value.flip(0) if name.endswith(_BY_SET) else value for name, value in ours.items()}
    return ours


_NO_LICENSE = "The authors state no licence, neither for the code nor for the weights."
_cfg = partial(
    default_cfg,
    folder="https://huggingface.co/YuhengSSS/MSVMamba/resolve/main/",
    first_conv="stem.conv1",
    license="unknown",
    notes=(_NO_LICENSE,),
    origin_url="https://github.com/YuHengsss/MSVMamba",
    paper_name="Multi-Scale VMamba: Hierarchy in Hierarchy Visual State Space Model",
    paper_ids="arXiv:2405.14174",
)


def _on_drive(folder: str) -> dict[str, Any]:
    """A cfg whose file lies where no program can fetch it."""
    place = f"https://drive.google.com/drive/folders/{folder}"
    return _cfg(notes=(f"The authors' file is in {place}; `subquad convert` reads it.", _NO_LICENSE))


default_cfgs = generate_default_cfgs(
    {
        "msvmamba_nano.in1k": _on_drive("1J41w3ApitQhp2O3wHmJoOs4U032uqebK"),
        "msvmamba_micro.in1k": _on_drive("1jfl2GmuKcUB8sPwRlyHK_wT0MjqgljYk"),
        "msvmamba_tiny.in1k": _on_drive("1ddNWk89ohcxxMuVEaJ2Y5A6xeBKgA7lU"),
        "msvmamba_tiny_v2.in1k": _cfg("msvmambav3_tiny_224.pth"),
        "msvmamba_small_v2.in1k": _cfg("msvmambav3_small_224.pth"),
        "msvmamba_base_v2.in1k": _cfg("msvmambav3_base_224.pth"),
        "test_msvmamba.untrained": _cfg(size=96),
    }
)

_V2: dict[str, Any] = {
    "ssm_ratio": 1.0,
    "gated": False,
    "merge": "raw",
    "ffn_ratio": 4.0,
    "post_norm": True,
    "stem": "conv",
    "downsample": "conv",
}

# The authors' second version calls itself msvmambav3.
VARIANTS: dict[str, dict[str, Any]] = {
    "msvmamba_nano": {"depths": (1, 2, 5, 2), "dims": 48, "drop_path_rate": 0.2},
    "msvmamba_micro": {"depths": (1, 2, 5, 2), "dims": 64, "drop_path_rate": 0.2},
    "msvmamba_tiny": {"depths": (1, 2, 9, 2), "dims": 96, "drop_path_rate": 0.2},
    "msvmamba_tiny_v2": _V2 | {"depths": (2, 2, 9, 2), "dims": 96, "drop_path_rate": 0.2},
    "msvmamba_small_v2": _V2 | {"depths": (2, 3, 20, 2), "dims": 96, "drop_path_rate": 0.4},
    "msvmamba_base_v2": _V2 | {"depths": (2, 4, 18, 2), "dims": 128, "drop_path_rate": 0.5, "gated": True},
    "test_msvmamba": {"depths": (1, 1, 1, 1), "dims": (8, 16, 20, 28)},
}

register_variants(__name__, MSVMamba, VARIANTS, checkpoint_filter_fn)

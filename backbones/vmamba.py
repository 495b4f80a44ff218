"""VMamba (arXiv 2401.10166): a pyramid whose tokens are mixed by selective scans along four routes.

Official code and weights: https://github.com/MzeroMiko/VMamba. The released models of version 2 have one state per
channel, no gate and an MLP behind every scan; the ``vanilla`` ones have 16 states, a gate and no MLP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from subquad.backbones import weights
from subquad.backbones.base import Pyramid
from subquad.backbones.frame import FRAME_NAMES, fit_scan_weights, frame
from subquad.backbones.layers import DepthwiseConv, ScanParameters, check_scan_sizes, scan_rank, scan_routes, stage_dims
from subquad.backbones.norms import AddLayerNorm, LayerNorm
from subquad.backbones.registry import default_cfg, register_variants
from subquad.ops.selective_scan import CROSS, ROUTES

__all__ = ["SS2D", "VMamba", "VMambaBlock"]


class SS2D(ScanParameters):
    """Token mixer: projection, depthwise convolution and SiLU, selective scan along four routes, norm, projection.

    Maps (B, H, W, dim) to itself. ``E = int(ssm_ratio * dim)`` channels are scanned.

    Args:
        dim: channels of the map.
        d_state: states per scanned channel, N.
        ssm_ratio: E / dim.
        dt_rank: rank R of the step size, ``"auto"`` for ceil(dim / 16).
        kernel_size, conv_bias: of the depthwise convolution.
        gated: multiply the normalised scan with SiLU of a second projection.
        out_act: GELU behind the norm.
    """

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 1,
        ssm_ratio: float = 2.0,
        dt_rank: int | Literal["auto"] = "auto",
        kernel_size: int = 3,
        conv_bias: bool = False,
        gated: bool = False,
        out_act: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        inner = int(ssm_ratio * dim)
        super().__init__(len(CROSS), inner, scan_rank(dim, dt_rank), d_state, **dd)
        self.routes = [ROUTES[route] for route in CROSS]
        self.in_proj = nn.Linear(dim, inner, bias=False, **dd)
        self.gate_proj = nn.Linear(dim, inner, bias=False, **dd) if gated else None
        self.conv = DepthwiseConv(inner, kernel_size, bias=conv_bias, activation="silu", **dd)
        self.out_norm = LayerNorm(inner, result="input", **dd)
        self.out_act = nn.GELU() if out_act else nn.Identity()
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor | None = None
        if self.gate_proj is not None:
            gate = F.silu(self.gate_proj(x))
        x = self.in_proj(x)
        x = self.conv(x)
        dt, B, C = self.project(x, 0, len(self.routes))
        y, _ = scan_routes(x, dt, self.A_log, B, C, self.D, self.dt_weight, self.dt_bias, self.routes)
        y = self.out_act(self.out_norm(y).type_as(x))
        if gate is not None:
            y = y * gate
        return self.out_proj(y)


class VMambaBlock(nn.Module):
    """Pre-norm residual block on (B, H, W, dim): SS2D, then an MLP if ``mlp_ratio`` is not 0; ``ssm`` goes to SS2D."""

    def __init__(
        self,
        dim: int,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **ssm: Any,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, **dd)
        self.mixer = SS2D(dim, **ssm, **dd)
        self.norm2 = AddLayerNorm(dim, **dd) if mlp_ratio > 0 else None
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd) if mlp_ratio > 0 else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop_path(self.mixer(self.norm1(x)))
        if self.norm2 is not None and self.mlp is not None:
            x, y = self.norm2(x, y)
            y = self.drop_path(self.mlp(y))
        return x + y


class VMamba(Pyramid):
    """VMamba; the defaults of the options are those of the released version 2, T[s2l5].

    Args:
        depths: blocks of each stage.
        dims: channels of each stage, or of the first one (doubling from stage to stage).
        d_state, ssm_ratio, dt_rank, kernel_size, conv_bias, gated, out_act: see ``SS2D``.
        mlp_ratio: hidden size of the MLP over the channels, 0 for no MLP.
        stem: ``"conv"``, two 3x3 convolutions (upstream's patch embedding v2), or ``"patch"``, one 4x4 (v1).
        downsample: ``"conv"``, 3x3 (upstream's v3), ``"patch"``, 2x2 (v2), or ``"merge"``, PatchMerging (v1).
        patch_norm: norms in the stem.
        in_chans, device, dtype, pyramid: arguments of ``Pyramid``.

    Raises:
        ValueError: for a size or option that cannot be built, naming it.
        TypeError: for an unknown argument.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 5, 2),
        dims: int | Sequence[int] = 96,
        *,
        d_state: int = 1,
        ssm_ratio: float = 2.0,
        dt_rank: int | Literal["auto"] = "auto",
        kernel_size: int = 3,
        conv_bias: bool = False,
        gated: bool = False,
        out_act: bool = False,
        mlp_ratio: float = 4.0,
        stem: Literal["conv", "patch"] = "conv",
        downsample: Literal["conv", "patch", "merge"] = "conv",
        patch_norm: bool = True,
        in_chans: int = 3,
        device: Any = None,
        dtype: Any = None,
        **pyramid: Any,
    ) -> None:
        dims = stage_dims(depths, dims)
        check_scan_sizes(min(dims), d_state, ssm_ratio, dt_rank)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if mlp_ratio < 0:
            raise ValueError(f"mlp_ratio must not be negative, got {mlp_ratio}")
        block = partial(
            VMambaBlock,
            mlp_ratio=mlp_ratio,
            d_state=d_state,
            ssm_ratio=ssm_ratio,
            dt_rank=dt_rank,
            kernel_size=kernel_size,
            conv_bias=conv_bias,
            gated=gated,
            out_act=out_act,
        )
        super().__init__(
            **frame(depths, dims, [block] * len(dims), stem, downsample, patch_norm, in_chans, device, dtype),
            **pyramid,
        )

    def no_weight_decay(self) -> set[str]:
        """The skip weights, which the official training kept as a vector; it decayed ``A_log`` and ``dt_bias``."""
        return {name for name, _ in self.named_parameters() if name.endswith(".D")}


# Weights ---------------------------------------------------------------------------------------------------------


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """An official checkpoint, current or of January 2024, under our names and in our shapes; ours pass unchanged.

    Raises:
        ValueError: if there are no tensors in it (see ``weights.unwrap``).
    """
    return fit_scan_weights(weights.rename(weights.unwrap(state_dict), FRAME_NAMES), model.state_dict(), len(CROSS))


_cfg = partial(
    default_cfg,
    folder="https://github.com/MzeroMiko/VMamba/releases/download/",
    first_conv="stem.conv1",
    license="mit",
    notes=("MIT is the licence of the official code; none is stated for the weights.",),
    origin_url="https://github.com/MzeroMiko/VMamba",
    paper_name="VMamba: Visual State Space Model",
    paper_ids="arXiv:2401.10166",
)

default_cfgs = generate_default_cfgs(
    {
        "vmamba_tiny.in1k": _cfg("%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth"),
        "vmamba_tiny_s2l5.in1k": _cfg("%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth"),
        "vmamba_small.in1k": _cfg("%23v2cls/vssm_small_0229_ckpt_epoch_222.pth"),
        "vmamba_small_s1l20.in1k": _cfg("%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth"),
        "vmamba_base.in1k": _cfg("%23v2cls/vssm_base_0229_ckpt_epoch_237.pth"),
        "vmamba_base_s1l20.in1k": _cfg("%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth"),
        "vmamba_tiny_vanilla.in1k": _cfg("%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth"),
        "vmamba_small_vanilla.in1k": _cfg("%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth"),
        "vmamba_base_vanilla.in1k": _cfg("%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth"),
        "test_vmamba.untrained": _cfg(size=96),
        "test_vmamba_vanilla.untrained": _cfg(size=96),
    }
)

_S1 = {"ssm_ratio": 1.0}
_S2 = {"ssm_ratio": 2.0}
_VANILLA = {"d_state": 16, "conv_bias": True, "gated": True, "mlp_ratio": 0.0, "stem": "patch", "downsample": "merge"}

# "s" is the ssm_ratio, "l" the depth of the third stage. The names without them are the authors' main models.
VARIANTS: dict[str, dict[str, Any]] = {
    "vmamba_tiny": dict(depths=(2, 2, 8, 2), dims=96, drop_path_rate=0.2, **_S1),
    "vmamba_tiny_s2l5": dict(depths=(2, 2, 5, 2), dims=96, drop_path_rate=0.2, **_S2),
    "vmamba_small": dict(depths=(2, 2, 15, 2), dims=96, drop_path_rate=0.3, **_S2),
    "vmamba_small_s1l20": dict(depths=(2, 2, 20, 2), dims=96, drop_path_rate=0.3, **_S1),
    "vmamba_base": dict(depths=(2, 2, 15, 2), dims=128, drop_path_rate=0.6, **_S2),
    "vmamba_base_s1l20": dict(depths=(2, 2, 20, 2), dims=128, drop_path_rate=0.5, **_S1),
    "vmamba_tiny_vanilla": dict(depths=(2, 2, 9, 2), dims=96, drop_path_rate=0.2, **_VANILLA),
    "vmamba_small_vanilla": dict(depths=(2, 2, 27, 2), dims=96, drop_path_rate=0.3, **_VANILLA),
    "vmamba_base_vanilla": dict(depths=(2, 2, 27, 2), dims=128, drop_path_rate=0.6, **_VANILLA),
    "test_vmamba": dict(depths=(1, 1, 2, 1), dims=(16, 24, 32, 48), **_S1),
    "test_vmamba_vanilla": dict(depths=(1, 1, 1, 1), dims=(8, 16, 20, 24), **_VANILLA),
}

register_variants(__name__, VMamba, VARIANTS, checkpoint_filter_fn)

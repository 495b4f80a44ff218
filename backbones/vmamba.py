"""VMamba (arXiv 2401.10166): a pyramid whose tokens are mixed by selective scans along four routes.

Official code and weights: https://github.com/MzeroMiko/VMamba. The released models of version 2 have one state per
channel, no gate and an MLP behind every scan; the ``vanilla`` ones have 16 states, a gate and no MLP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models import generate_default_cfgs, register_notrace_function
from torch import Tensor, nn

from subquad.backbones import weights
from subquad.backbones.base import Factory, Pyramid, StageSpec
from subquad.backbones.layers import PatchMerging
from subquad.backbones.registry import register_variants
from subquad.ops import selective_scan
from subquad.ops.selective_scan import CROSS

__all__ = ["SS2D", "VMamba", "VMambaBlock"]


def _wide(x: Tensor) -> Tensor:
    """At least float32, the precision of decays and states."""
    return x if x.dtype == torch.float64 else x.float()


@register_notrace_function
def scan_cross(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_weight: Tensor, dt_bias: Tensor
) -> Tensor:
    """Scan along the four routes, summed in float32, with A = -exp(A_log); other arguments as in ``selective_scan``."""
    out_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    A = -torch.exp(_wide(A_log))
    if torch.jit.is_scripting():
        # The operator itself with CROSS as codes, because TorchScript cannot compile the checks of the public function.
        B, C = B.unsqueeze(-2), C.unsqueeze(-2)
        y, _ = torch.ops.subquad.selective_scan(
            x, dt, A, B, C, _wide(D), _wide(dt_weight), _wide(dt_bias), None, None, [0, 1, 2, 3], True, out_dtype
        )
    else:
        y = selective_scan(x, dt, A, B, C, D, dt_weight=dt_weight, dt_bias=dt_bias, routes=CROSS, out_dtype=out_dtype)
    return y


class _WideLayerNorm(nn.LayerNorm):
    """LayerNorm in the dtype of its input, which may be wider than that of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class SS2D(nn.Module):
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
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner = int(ssm_ratio * dim)
        rank = math.ceil(dim / 16) if dt_rank == "auto" else dt_rank
        routes = len(CROSS)
        self.sizes = [rank, d_state, d_state]

        self.in_proj = nn.Linear(dim, inner, bias=False, **dd)
        self.gate_proj = nn.Linear(dim, inner, bias=False, **dd) if gated else None
        self.conv = nn.Conv2d(inner, inner, kernel_size, padding=kernel_size // 2, groups=inner, bias=conv_bias, **dd)
        self.x_proj_weight = nn.Parameter(torch.empty(routes, rank + 2 * d_state, inner, **dd))
        self.dt_weight = nn.Parameter(torch.empty(routes, inner, rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(routes, inner, **dd))
        self.A_log = nn.Parameter(torch.empty(routes, inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(routes, inner, **dd))
        self.out_norm = _WideLayerNorm(inner, eps=1e-5, **dd)
        self.out_act = nn.GELU() if out_act else nn.Identity()
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Mamba's start: A = -(1, ..., N), D = 1, steps log-uniform in [0.001, 0.1]."""
        rank, d_state, _ = self.sizes
        for weight in self.x_proj_weight:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        nn.init.uniform_(self.dt_weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            step = torch.rand_like(self.dt_bias, dtype=torch.float32) * math.log(100) + math.log(0.001)
            step = step.exp().clamp(min=1e-4)
            self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus
            states = torch.arange(1, d_state + 1, dtype=torch.float32, device=self.A_log.device)
            self.A_log.copy_(states.log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor | None = None
        if self.gate_proj is not None:
            gate = F.silu(self.gate_proj(x))
        x = self.in_proj(x)
        # The convolution sees the same memory as a channels-last (B, E, H, W), and mostly answers in that format.
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = F.silu(x).contiguous()
        # (B, H, W, K, R + 2 N): projections commute with routes, so that the map is projected once, in place
        projected = F.linear(x, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (-1, sum(self.sizes)))
        dt, B, C = projected.split(self.sizes, dim=-1)
        y = scan_cross(x, dt, self.A_log, B, C, self.D, self.dt_weight, self.dt_bias)
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
        self.norm1 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mixer = SS2D(dim, **ssm, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, **dd) if mlp_ratio > 0 else None
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd) if mlp_ratio > 0 else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        if self.norm2 is not None and self.mlp is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class PatchStem(nn.Module):
    """Images (B, C, H, W) to (B, H / 4, W / 4, dim) by one convolution; pixels beyond a multiple of 4 are dropped."""

    def __init__(self, in_chans: int, dim: int, norm: bool, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim, 4, stride=4, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=1e-5, **dd) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm1(self.conv1(x).permute(0, 2, 3, 1))


class ConvStem(nn.Module):
    """Images (B, C, H, W) to (B, ceil(ceil(H / 2) / 2), likewise W, dim) by two convolutions."""

    def __init__(self, in_chans: int, dim: int, norm: bool, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = nn.LayerNorm(dim // 2, eps=1e-5, **dd) if norm else nn.Identity()
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, **dd) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x).permute(0, 2, 3, 1)))
        return self.norm2(self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class ConvDownsample(nn.Module):
    """Convolution of stride 2, norm: (B, H, W, in_dim) to (B, ceil(H / 2), ceil(W / 2), dim); kernel size 2: floor."""

    def __init__(self, in_dim: int, dim: int, kernel_size: int, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, kernel_size, stride=2, padding=(kernel_size - 1) // 2, **dd)
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


STEMS = {"conv": ConvStem, "patch": PatchStem}
DOWNSAMPLES: dict[str, Factory] = {
    "conv": partial(ConvDownsample, kernel_size=3),
    "patch": partial(ConvDownsample, kernel_size=2),
    "merge": PatchMerging,
}


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
        dims = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        _check_sizes(depths, dims, d_state, ssm_ratio, dt_rank, kernel_size, mlp_ratio, in_chans)
        if stem not in STEMS:
            raise ValueError(f"unknown stem {stem!r}, expected one of {list(STEMS)}")
        if downsample not in DOWNSAMPLES:
            raise ValueError(f"unknown downsample {downsample!r}, expected one of {list(DOWNSAMPLES)}")
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
            stem=STEMS[stem](in_chans, dims[0], patch_norm, device=device, dtype=dtype),
            stages=[
                StageSpec(
                    dim, depth, reduction=4 * 2**i, block=block, downsample=DOWNSAMPLES[downsample] if i else None
                )
                for i, (dim, depth) in enumerate(zip(dims, depths, strict=True))
            ],
            norm=partial(nn.LayerNorm, eps=1e-5),
            in_chans=in_chans,
            device=device,
            dtype=dtype,
            **pyramid,
        )

    def no_weight_decay(self) -> set[str]:
        """The skip weights, which the official training kept as a vector; it decayed ``A_log`` and ``dt_bias``."""
        return {name for name, _ in self.named_parameters() if name.endswith(".D")}


def _check_sizes(
    depths: Sequence[int],
    dims: Sequence[int],
    d_state: int,
    ssm_ratio: float,
    dt_rank: int | str,
    kernel_size: int,
    mlp_ratio: float,
    in_chans: int,
) -> None:
    if len(dims) != len(depths) or not depths or min(depths) < 1 or min(dims) < 2:
        raise ValueError(f"depths and dims must be positive and of one length, got depths={depths}, dims={dims}")
    if d_state < 1 or in_chans < 1:
        raise ValueError(f"d_state and in_chans must be at least 1, got d_state={d_state}, in_chans={in_chans}")
    if int(ssm_ratio * min(dims)) < 1 or mlp_ratio < 0:
        raise ValueError(f"ssm_ratio must be positive and mlp_ratio not negative, got {ssm_ratio} and {mlp_ratio}")
    if dt_rank != "auto" and not (isinstance(dt_rank, int) and dt_rank >= 1):
        raise ValueError(f"dt_rank must be 'auto' or at least 1, got {dt_rank!r}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")


# Weights ---------------------------------------------------------------------------------------------------------

# Official names to ours, in order; the first rules bring the names of January 2024 to the later ones.
_NAMES: list[tuple[str, str | None]] = [
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
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


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """An official checkpoint, current or of January 2024, under our names and in our shapes; ours pass unchanged.

    Raises:
        ValueError: if there are no tensors in it (see ``weights.unwrap``).
    """
    ours: dict[str, Tensor] = {}
    expected = model.state_dict()
    for name, value in weights.rename(weights.unwrap(state_dict), _NAMES).items():
        gate = name.replace(".in_proj.", ".gate_proj.")
        if value.dim() == 4 and value.shape[2:] == (1, 1) and expected.get(name, value).dim() == 2:
            value = value.flatten(1)  # trained channels first
        if name.endswith((".A_log", ".D")) and expected.get(name, value).dim() == value.dim() + 1:
            # (K * E, ...) to (K, E, ...); what does not divide is left for the loader to report
            value = value.unflatten(0, (len(CROSS), -1)) if len(value) % len(CROSS) == 0 else value
        if gate != name and gate in expected and value.shape[0] == 2 * expected[name].shape[0]:
            value, ours[gate] = value.chunk(2)
        ours[name] = value
    return ours


_RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download/"


def _cfg(file: str = "", **kwargs: Any) -> dict[str, Any]:
    source = {"url": _RELEASES + file, "custom_load": True} if file else {}
    return (
        dict(
            **source,
            num_classes=1000,
            input_size=(3, 224, 224),
            pool_size=(7, 7),
            crop_pct=0.875,
            interpolation="bicubic",
            first_conv="stem.conv1",
            classifier="head.fc",
            license="mit",
            notes=("MIT is the licence of the official code; none is stated for the weights.",),
            origin_url="https://github.com/MzeroMiko/VMamba",
            paper_name="VMamba: Visual State Space Model",
            paper_ids="arXiv:2401.10166",
        )
        | kwargs
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
        "test_vmamba.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
        "test_vmamba_vanilla.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
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

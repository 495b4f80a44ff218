"""Parts that several families share and timm lacks."""

# Annotations are not postponed here: TorchScript reads those of the functions and methods.

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn

from subquad.backbones.base import Factory, resample_position
from subquad.backbones.images import check_map_size
from subquad.backbones.norms import StreamNorm
from subquad.ops import depthwise_conv2d, linear_attention, selective_scan
from subquad.ops.maps import Kept, crop, is_compiling
from subquad.ops.selective_scan import ROUTES


def position_map(positions: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """Position embedding, (1, N, C) of an official file or a map, as a map (1, height, width, C), resampled if need be.

    N positions of a square are taken for that square's, as official files have them, even if the map has as many. Those
    of no square must be as many as the map's; others are left for the loader to report.
    """
    if positions.dim() == 3:
        side = math.isqrt(positions.shape[1])
        if side * side == positions.shape[1]:
            positions = positions.unflatten(1, (side, side))
        elif positions.shape[1] == height * width:
            positions = positions.unflatten(1, (height, width))
    return resample_position(positions, height, width, mode) if positions.dim() == 4 else positions


# Scans -----------------------------------------------------------------------------------------------------------


class ScanParameters(nn.Module):
    """What a mixer needs for selective scans with K sets of Mamba's parameters, one for each route or branch.

    Args:
        sets: K.
        inner: channels that are scanned, E.
        rank: of the step size, R.
        d_state: states per channel, N.
    """

    def __init__(self, sets: int, inner: int, rank: int, d_state: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.sets = sets
        self.sizes = [rank, d_state, d_state]
        self.x_proj_weight = nn.Parameter(torch.empty(sets, rank + 2 * d_state, inner, **dd))
        self.dt_weight = nn.Parameter(torch.empty(sets, inner, rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(sets, inner, **dd))
        self.A_log = nn.Parameter(torch.empty(sets, inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(sets, inner, **dd))

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

    def project(self, x: Tensor, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes (*, k, R), B and C (*, k, N) of the sets ``first`` to ``last - 1`` for x (*, E).

        Projections commute with routes: a map is projected once, in place, whatever the number of routes through it.
        """
        weight: Tensor = self.x_proj_weight
        if last - first < self.sets:  # the gradient of a slice is a launch more
            weight = weight[first:last]
        return self.project_by(weight, x)

    def project_by(self, weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``project`` with the sets whose weights (k, R + 2 N, E) are given."""
        projected = F.linear(x, weight.flatten(0, 1)).unflatten(-1, (-1, sum(self.sizes)))
        dt, B, C = projected.split(self.sizes, dim=-1)
        return dt, B, C


_ROUTE_NAMES = {code: name for name, code in ROUTES.items()}


@register_notrace_function
def scan_routes(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    routes: list[int],
    initial_state: Tensor | None = None,
    z: Tensor | None = None,
    addend: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``selective_scan`` with A = -exp(A_log) and routes as codes (``ROUTES``): the sum, and the last states.

    The sum is in x's dtype, but without a gate in float32 for float16, whose range sums of states may leave.
    """
    out_dtype = torch.float32 if x.dtype == torch.float16 and z is None else x.dtype
    A = -torch.exp(_wide(A_log))
    if torch.jit.is_scripting():
        # The operator itself, because TorchScript cannot compile the checks of the public function.
        B, C = B.unsqueeze(-2), C.unsqueeze(-2)
        shape = x.shape
        if x.dim() == 3:
            x, dt, B, C = x.unsqueeze(1), dt.unsqueeze(1), B.unsqueeze(1), C.unsqueeze(1)
            z = None if z is None else z.unsqueeze(1)
            addend = None if addend is None else addend.unsqueeze(1)
        keep = z is not None and torch.is_grad_enabled()
        y, states, _ = torch.ops.subquad.selective_scan(
            x, dt, A, B, C, _wide(D), _wide(dt_weight), _wide(dt_bias), initial_state, z, addend, None,
            routes, True, out_dtype, scale, keep,
        )  # fmt: skip
        y, state = y.reshape(shape), states[:, :, -1]
    else:
        y, state = selective_scan(
            x,
            dt,
            A,
            B,
            C,
            D,
            dt_weight=dt_weight,
            dt_bias=dt_bias,
            z=z,
            addend=addend,
            scale=scale,
            initial_state=initial_state,
            routes=[_ROUTE_NAMES[code] for code in routes],
            out_dtype=out_dtype,
            return_last_state=True,
        )
    return y, state


def _wide(x: Tensor) -> Tensor:
    """At least float32, the precision of decays and states."""
    return x if x.dtype == torch.float64 else x.float()


def scan_rank(dim: int, dt_rank: int | Literal["auto"]) -> int:
    """Rank of the step size: Mamba's ceil(dim / 16) for ``"auto"``."""
    return math.ceil(dim / 16) if dt_rank == "auto" else dt_rank


def check_scan_sizes(dim: int, d_state: int, ssm_ratio: float, dt_rank: int | str) -> None:
    """Raises ValueError, naming the option, if a scan of ``ssm_ratio * dim`` channels cannot be built."""
    if not isinstance(d_state, int) or d_state < 1:
        raise ValueError(f"d_state must be an integer of at least 1, got {d_state!r}")
    if int(ssm_ratio * dim) < 1:
        raise ValueError(f"ssm_ratio must be positive, got {ssm_ratio}")
    if dt_rank != "auto" and not (isinstance(dt_rank, int) and dt_rank >= 1):
        raise ValueError(f"dt_rank must be 'auto' or at least 1, got {dt_rank!r}")


# Convolutions ----------------------------------------------------------------------------------------------------


class MapConv2d(nn.Conv2d):
    """Convolution of a channels-last map (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size == (1, 1) and self.stride == (1, 1) and self.groups == 1 and self.padding == (0, 0):
            # A projection adds the bias as it multiplies, a convolution in a pass of its own.
            return F.linear(x, self.weight.flatten(1), self.bias)
        # It sees the same memory as a channels-last (B, C, H, W), and mostly answers in that format.
        return self._conv_forward(x.permute(0, 3, 1, 2), self.weight, self.bias).permute(0, 2, 3, 1)


@register_notrace_function
def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none", residual: bool = False
) -> Tensor:
    """``subquad.ops.depthwise_conv2d`` with weight (C, 1, kh, kw): in eager mode, in TorchScript and for torch.fx."""
    weight = weight.squeeze(1)
    if torch.jit.is_scripting():
        # The operator itself, because TorchScript cannot compile the checks of the public function.
        top, left = weight.shape[1] // 2, weight.shape[2] // 2
        y = torch.ops.subquad.depthwise_conv(x, weight, bias, top, left, False, activation, residual)
    else:
        y = depthwise_conv2d(x, weight, bias, activation=activation, residual=residual)
    return y


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of a map (B, H, W, dim) that keeps its size.

    Args:
        dim: channels.
        kernel_size: odd.
        activation: what follows the convolution, one of ``subquad.ops.depthwise_conv.ACTIVATIONS``.
        residual: add the map before the activation.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        *,
        bias: bool = True,
        activation: str = "none",
        residual: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=bias, **dd)
        self.activation = activation
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.bias, self.activation, self.residual)


# Linear attention -----------------------------------------------------------------------------------------------------


@register_notrace_function
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    normalizer: str = "divide",
    feature_map: str = "identity",
    scale: float = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """``subquad.ops.linear_attention`` for modules: in eager mode, in TorchScript and as a leaf of torch.fx."""
    if torch.jit.is_scripting():
        # The operator itself, because TorchScript cannot compile the checks of the public function.
        found = torch.ops.subquad.linear_attention(q, k, v, None, None, cos, sin, normalizer, feature_map, scale, eps)
        o = found[0]
    else:
        rotary = None if cos is None or sin is None else (cos, sin)
        o = linear_attention(
            q, k, v, normalizer=normalizer, feature_map=feature_map, rotary=rotary, scale=scale, eps=eps
        )
    return o


_tables = Kept()


@register_notrace_function
def rotary_by_head(x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rotary tables (cos, sin) for heads of x (B, N, H, D), all alike, each (height * width, 1, D / 2); 4 divides D.

    The first half of the pairs turns with the row, the second with the column; the D / 4 frequencies of each run from 1
    to 1e-4, both included.
    """
    if torch.jit.is_scripting():
        tables = _rotary_by_head(x, x.shape[-1], height, width)
    else:
        tables = _tables.get(_rotary_by_head, x, x.shape[-1], height, width)
    return tables


def _rotary_by_head(x: Tensor, dim: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    count = dim // 4
    cos, sin = _rotary(x, count, max(count - 1, 1), height, width)
    return cos.unsqueeze(1), sin.unsqueeze(1)


@register_notrace_function
def rotary_by_width(x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rotary tables (cos, sin) over all channels of x (B, N, H, D), each (height * width, H, D / 2); 4 divides H D.

    As ``rotary_by_head`` for one head of H D channels, cut into heads afterwards, and without the last frequency: so
    the first heads turn with the row, the last with the column, and each has frequencies of its own.
    """
    if torch.jit.is_scripting():
        tables = _rotary_by_width(x, x.shape[-2], x.shape[-1], height, width)
    else:
        tables = _tables.get(_rotary_by_width, x, x.shape[-2], x.shape[-1], height, width)
    return tables


def _rotary_by_width(x: Tensor, heads: int, dim: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    count = heads * dim // 4
    cos, sin = _rotary(x, count, count, height, width)
    return cos.unflatten(1, (heads, -1)), sin.unflatten(1, (heads, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, N, H, D) in x's dtype; tables as from ``rotary_by_head``."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


def _rotary(x: Tensor, count: int, steps: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles, (height * width, 2 count), with 1e-4 ** (t / steps) as the t-th frequency."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    frequencies = 1e-4 ** (torch.arange(count, dtype=dtype, device=x.device) / steps)
    rows = torch.arange(height, dtype=dtype, device=x.device)[:, None] * frequencies
    columns = torch.arange(width, dtype=dtype, device=x.device)[:, None] * frequencies
    by_row = rows[:, None].expand(-1, width, -1)
    by_column = columns[None].expand(height, -1, -1)
    angles = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)
    return angles.cos(), angles.sin()


# Parts of hosts -------------------------------------------------------------------------------------------------------


def ceil_to(size: int, multiple: int) -> int:
    """The next multiple. In this form, not with a remainder, symbolic sizes of an export stay simple."""
    return (size + multiple - 1) // multiple * multiple


@register_notrace_function
def crop_to(x: Tensor, height: int, width: int) -> Tensor:
    """The first rows and columns of x, (B, H, W, ...)."""
    return crop(x, [height, width])


@register_notrace_function
def pad_to(x: Tensor, height: int, width: int) -> Tensor:
    """Zeros below and on the right of x, (B, H, W, C); x itself if it has that size, where ``F.pad`` would copy it."""
    if is_compiling() or x.shape[1] != height or x.shape[2] != width:
        x = F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))
    return x


class PatchEmbed(nn.Module):
    """Images (B, C, H, W), zeros added to whole patches, to (B, ceil(H / p), ceil(W / p), dim), then a norm.

    With a ``kernel_size`` greater than ``patch_size`` patches overlap: by ``padding`` on the left, else on the right.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int,
        norm: Factory | None,
        kernel_size: int | None = None,
        padding: int = 0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = MapConv2d(in_chans, dim, kernel_size or patch_size, stride=patch_size, padding=padding, **dd)
        self.norm = nn.Identity() if norm is None else norm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        height, width = ceil_to(x.shape[2], self.patch_size), ceil_to(x.shape[3], self.patch_size)
        return self.norm(self.proj(pad_to(x.permute(0, 2, 3, 1), height, width)))


def in_turn(blocks: Sequence[Callable[..., nn.Module]]) -> Callable[..., nn.Module]:
    """A block factory for a stage whose blocks differ: each call goes to the next of ``blocks``."""
    left = iter(blocks)
    return lambda *args, **kwargs: next(left)(*args, **kwargs)


def check_heads(depths: Sequence[int], dims: Sequence[int], num_heads: Sequence[int]) -> None:
    """Raises ValueError unless the stages have blocks and as many heads as divide their channels evenly."""
    sizes = depths, dims, num_heads
    if not all(isinstance(given, Sequence) for given in sizes) or not len(depths) == len(dims) == len(num_heads):
        raise ValueError(f"one entry a stage: got depths={depths}, dims={dims}, num_heads={num_heads}")
    if not depths or min(depths) < 1:
        raise ValueError(f"depths must be positive, got {tuple(depths)}")
    for dim, heads in zip(dims, num_heads, strict=True):
        if heads < 1 or dim < 1 or dim % heads or dim // heads % 2:
            raise ValueError(f"num_heads must cut the channels into even parts, got {heads} heads for {dim} channels")


def check_per_stage(depths: Sequence[int], **options: Sequence[Any]) -> None:
    """Raises ValueError, naming the option, unless each has one entry a stage."""
    for name, values in options.items():
        if not isinstance(values, Sequence) or len(values) != len(depths):
            given = tuple(values) if isinstance(values, Sequence) else values
            raise ValueError(f"{name} must have one entry for each of {len(depths)} stages, got {given}")


def stage_dims(depths: Sequence[int], dims: int | Sequence[int]) -> list[int]:
    """Channels of each stage, doubling from stage to stage if only the first is given.

    Raises:
        ValueError: if depths and channels are not positive or not of one length.
    """
    every = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
    if len(every) != len(depths) or not depths or min(depths) < 1 or min(every) < 2:
        raise ValueError(f"depths and dims must be positive and of one length, got depths={depths}, dims={every}")
    return every


# Downsampling ----------------------------------------------------------------------------------------------------


class ConvDownsample(nn.Module):
    """Convolution of stride 2, norm: (B, H, W, in_dim) to (B, ceil(H / 2), ceil(W / 2), dim); kernel size 2: floor.

    Raises:
        ValueError: for a map that a kernel of size 2 does not fit into, as small images leave.
    """

    def __init__(self, in_dim: int, dim: int, kernel_size: int = 3, norm: Factory = StreamNorm, **dd: Any) -> None:
        super().__init__()
        self.conv = MapConv2d(in_dim, dim, kernel_size, stride=2, padding=(kernel_size - 1) // 2, **dd)
        self.norm = norm(dim, **dd)
        self.smallest = 2 if kernel_size == 2 else 1

    def forward(self, x: Tensor) -> Tensor:
        check_map_size(x, self.smallest)
        return self.norm(self.conv(x))

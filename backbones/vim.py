"""Vim, Vision Mamba (arXiv 2401.09417): tokens with a class token in their middle, scanned forwards and backwards.

Official code and weights: https://github.com/hustvl/Vim. Each direction has its own causal convolution and its own
parameters of the scan; both share the projections in front and behind and one gate. The ``stride8`` models ("+" in the
paper) embed overlapping patches.
"""

# Annotations are not postponed here: TorchScript reads those of the attributes.

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import DropPath, LayerScale, lecun_normal_, trunc_normal_
from timm.models import generate_default_cfgs, register_notrace_function
from torch import Tensor, nn

from subquad.backbones import weights
from subquad.backbones.base import Isotropic
from subquad.backbones.images import check_image_size
from subquad.backbones.layers import ScanParameters, check_scan_sizes, position_map, scan_rank, scan_routes
from subquad.backbones.registry import default_cfg, register_variants
from subquad.ops import causal_conv1d
from subquad.ops.selective_scan import ROUTES

__all__ = ["Vim", "VimBlock", "VimMixer"]


@register_notrace_function
def convolve_tokens(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """``subquad.ops.causal_conv1d`` with SiLU: in eager mode, in TorchScript and as a leaf of torch.fx."""
    if torch.jit.is_scripting():
        # The operator itself, because TorchScript cannot compile the checks of the public function.
        left = 0 if reverse else weight.shape[1] - 1
        y = torch.ops.subquad.depthwise_conv(
            x.unsqueeze(1), weight.unsqueeze(1), bias, 0, left, reverse, "silu", False
        ).squeeze(1)
    else:
        y = causal_conv1d(x, weight, bias, activation="silu", reverse=reverse)
    return y


class VimMixer(ScanParameters):
    """Token mixer: projection; convolution, SiLU and selective scan once in each direction; gate, projection.

    Maps tokens (B, L, dim) to themselves. Parameters with an axis of 2 are those of the two directions.

    Args:
        dim: channels of the tokens.
        d_state: states per scanned channel, N.
        expand: scanned channels E / dim.
        kernel_size: taps of the causal convolutions.
        dt_rank: rank R of the step size, ``"auto"`` for ceil(dim / 16).
        average: halve the sum of the two directions.
    """

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 16,
        expand: int = 2,
        kernel_size: int = 4,
        dt_rank: int | Literal["auto"] = "auto",
        average: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        inner = expand * dim
        super().__init__(2, inner, scan_rank(dim, dt_rank), d_state, **dd)
        self.forwards, self.backwards = [ROUTES["row"]], [ROUTES["row_reversed"]]
        self.scale = 0.5 if average else 1.0
        self.in_proj = nn.Linear(dim, inner, bias=False, **dd)
        self.gate_proj = nn.Linear(dim, inner, bias=False, **dd)
        self.conv_weight = nn.Parameter(torch.empty(2, inner, kernel_size, **dd))
        self.conv_bias = nn.Parameter(torch.empty(2, inner, **dd))
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Mamba's start; but the backward direction's ``dt_bias`` is 0, as in the official code."""
        super().reset_parameters()
        nn.init.zeros_(self.dt_bias[1])
        bound = self.conv_weight.shape[-1] ** -0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.uniform_(self.conv_bias, -bound, bound)

    def reset_projections(self, depth: int) -> None:
        """Start of the linear layers in a network of ``depth`` blocks."""
        for layer in (self.in_proj, self.gate_proj, self.out_proj):
            layer.reset_parameters()
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(depth)

    def forward(self, x: Tensor) -> Tensor:
        z = self.gate_proj(x)
        x = self.in_proj(x)
        # Cut once for both directions: gradients of parts are put together, those of slices padded and added.
        conv_weight, conv_bias = self.conv_weight.unbind(0), self.conv_bias.unbind(0)
        x_proj_weight, A_log, D = self.x_proj_weight.split(1), self.A_log.split(1), self.D.split(1)
        dt_weight, dt_bias = self.dt_weight.split(1), self.dt_bias.split(1)
        scanned: list[Tensor] = []
        for k, routes in enumerate([self.forwards, self.backwards]):
            u = convolve_tokens(x, conv_weight[k], conv_bias[k], k == 1)
            dt, B, C = self.project_by(x_proj_weight[k], u)
            # The second scan gates the sum of both: one gate, as if it were in each, and read once.
            gate, other, scale = (z, scanned[0], self.scale) if k == 1 else (None, None, 1.0)
            y, _ = scan_routes(
                u, dt, A_log[k], B, C, D[k], dt_weight[k], dt_bias[k], routes, z=gate, addend=other, scale=scale
            )
            scanned.append(y)
        return self.out_proj(scanned[1])


class VimBlock(nn.Module):
    """Pre-norm residual block on tokens; ``mixer`` goes to ``VimMixer``.

    The official code hands on a pair, a residual and what is to be added to it: the same sums one block later.
    """

    def __init__(
        self,
        dim: int,
        *,
        norm: Any,
        init_values: float | None = None,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **mixer: Any,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = norm(dim, **dd)
        self.mixer = VimMixer(dim, **mixer, **dd)
        self.layer_scale = nn.Identity() if init_values is None else LayerScale(dim, init_values, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return x + self.drop_path(self.layer_scale(self.mixer(self.norm(x))))


class PatchEmbed(nn.Module):
    """Images (B, C, H, W) to patches (B, H', W', dim), H' = (H - patch_size) // stride + 1; the rest is dropped."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, stride: int, **dd: Any) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.conv = nn.Conv2d(in_chans, dim, patch_size, stride=stride, **dd)

    def forward(self, x: Tensor) -> Tensor:
        check_image_size(x, self.patch_size)
        return self.conv(x).permute(0, 2, 3, 1)


@register_notrace_function
def class_position(patches: int, index: int | None) -> int:
    """Where the class token stands in a sequence of so many patches and itself: at ``index``, or in the middle.

    Raises:
        ValueError: if the sequence is too short for ``index``.
    """
    if index is None:
        return patches // 2
    if index > patches:
        raise ValueError("class_token must be at most {} for {} patches, got {}".format(patches, patches, index))  # noqa: UP032
    return index


class Vim(Isotropic):
    """Vim; the defaults of the options are those of the released models with stride 16.

    Args:
        dim, depth: width and number of blocks.
        img_size: size, or height and width, that the position embedding is made for; others resample it.
        patch_size, stride: of the patch embedding; the patches overlap where the stride is smaller.
        class_token: place of the class token in the sequence, ``"middle"`` or an index; False (or None, which timm's
            ``create_model`` takes for "as usual") for no class token.
        d_state, expand, kernel_size, dt_rank, average: see ``VimMixer``.
        rms_norm: RMSNorm, else LayerNorm.
        init_values: start of a scale for each channel behind the mixer, None for no scale.
        global_pool: ``"token"`` takes the class token, the default if there is one; else see ``Isotropic``.
        in_chans, device, dtype, isotropic: arguments of ``Isotropic``.

    Raises:
        ValueError: for a size or option that cannot be built; for images smaller than a patch, or with fewer patches
            than stand in front of the class token.
        TypeError: for an unknown argument.
    """

    checkpoint_key = "model"  # what the official evaluation reads, though training keeps averaged weights too

    class_index: int | None

    def __init__(
        self,
        dim: int = 192,
        depth: int = 24,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int = 16,
        class_token: Literal["middle", False] | int | None = "middle",
        d_state: int = 16,
        expand: int = 2,
        kernel_size: int = 4,
        dt_rank: int | Literal["auto"] = "auto",
        average: bool = True,
        rms_norm: bool = True,
        init_values: float | None = None,
        global_pool: str | None = None,
        in_chans: int = 3,
        device: Any = None,
        dtype: Any = None,
        **isotropic: Any,
    ) -> None:
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        _check_sizes(
            dim=dim, depth=depth, patch_size=patch_size, stride=stride, expand=expand, kernel_size=kernel_size,
            in_chans=in_chans,
        )  # fmt: skip
        check_scan_sizes(dim, d_state, expand, dt_rank)
        grid = _grid(height, width, patch_size, stride)
        class_token = None if class_token is False else class_token
        _check_class_token(class_token, grid[0] * grid[1])
        norm = partial(nn.RMSNorm if rms_norm else nn.LayerNorm, eps=1e-5)
        block = partial(
            VimBlock,
            norm=norm,
            init_values=init_values,
            d_state=d_state,
            expand=expand,
            kernel_size=kernel_size,
            dt_rank=dt_rank,
            average=average,
        )
        super().__init__(
            PatchEmbed(in_chans, dim, patch_size, stride, device=device, dtype=dtype),
            block,
            dim=dim,
            depth=depth,
            reduction=stride,
            norm=norm,
            pos_grid=grid,
            num_prefix_tokens=0 if class_token is None else 1,
            in_chans=in_chans,
            global_pool=("avg" if class_token is None else "token") if global_pool is None else global_pool,
            device=device,
            dtype=dtype,
            **isotropic,
        )
        self.class_index = None if class_token in ("middle", None) else int(class_token)
        self.pos_embed_prefix = None if self.prefix_tokens is None else nn.Parameter(self.prefix_tokens.clone())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise class token and position embeddings."""
        super().reset_parameters()
        position = self._parameters.get("pos_embed_prefix")  # not there yet while the base class builds itself
        if position is not None:
            trunc_normal_(position, std=0.02)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise every parameter, as after ``to_empty``; ``needs_reset=False`` if the layers are freshly made."""
        super().init_weights(needs_reset)
        for module in self.modules():
            if isinstance(module, VimMixer):
                module.reset_projections(len(self.blocks))
            elif isinstance(module, PatchEmbed):
                lecun_normal_(module.conv.weight)
                nn.init.zeros_(module.conv.bias)  # type: ignore[arg-type]

    def no_weight_decay(self) -> set[str]:
        """As in the official training: tokens, positions, decays and skips, and the biases that are matrices here."""
        exempt = ("A_log", "D", "dt_bias", "conv_bias", "pos_embed_prefix")
        names = {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in exempt}
        return super().no_weight_decay() | names

    def join_tokens(self, x: Tensor) -> Tensor:
        """Map (B, H, W, dim) to tokens, with the class token at its place."""
        x = x.flatten(1, 2)
        if self.prefix_tokens is not None and self.pos_embed_prefix is not None:
            at = class_position(x.shape[1], self.class_index)
            token = (self.prefix_tokens + self.pos_embed_prefix).expand(x.shape[0], -1, -1)
            x = torch.cat([x[:, :at], token, x[:, at:]], dim=1)
        return x

    def split_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens to the class token (B, 1, dim), if there is one, and the map's tokens (B, H W, dim)."""
        if self.prefix_tokens is None:
            return x[:, :0], x
        at = class_position(x.shape[1] - 1, self.class_index)
        return x[:, at : at + 1], torch.cat([x[:, :at], x[:, at + 1 :]], dim=1)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be at least 1, got {size!r}")


def _grid(height: int, width: int, patch_size: int, stride: int) -> tuple[int, int]:
    if min(height, width) < patch_size:
        raise ValueError(f"img_size must be at least patch_size = {patch_size}, got {(height, width)}")
    return (height - patch_size) // stride + 1, (width - patch_size) // stride + 1


def _check_class_token(place: str | int | None, patches: int) -> None:
    index = isinstance(place, int) and not isinstance(place, bool) and 0 <= place <= patches
    if not index and place not in ("middle", None):
        raise ValueError(
            f"class_token must be 'middle', False or from 0 to {patches}, the number of patches, got {place!r}"
        )


# Weights ---------------------------------------------------------------------------------------------------------

# Official names to ours, in order; ".0" and ".1" are the directions, joined below.
_NAMES: list[tuple[str, str | None]] = [
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^norm_f\.", "norm."),
    (r"^layers\.", "blocks."),
    (r"\.mixer\.gamma$", ".layer_scale.gamma"),
    (r"\.A_b_log$", ".A_log_b"),
    (r"\.conv1d(_b)?\.(weight|bias)$", r".conv_\2\1"),
    (r"\.x_proj(_b)?\.weight$", r".x_proj_weight\1"),
    (r"\.dt_proj(_b)?\.(weight|bias)$", r".dt_\2\1"),
    (r"\.mixer\.(conv_weight|conv_bias|x_proj_weight|dt_weight|dt_bias|A_log|D)$", r".mixer.\1.0"),
    (r"\.mixer\.(conv_weight|conv_bias|x_proj_weight|dt_weight|dt_bias|A_log|D)_b$", r".mixer.\1.1"),
]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
    """An official checkpoint, or ours, under our names and in our shapes, positions resampled for the model's grid.

    Official positions are those of the sequence: the class token's is taken out from where the model has its own, or
    from the middle. A class token that the model does not have is dropped.

    Raises:
        ValueError: if there are no tensors in it (see ``weights.unwrap``).
    """
    state = weights.unwrap(state_dict, weights.wrapper_for(model, state_dict))
    if any(name.startswith("layers.") for name in state):
        state = _from_official(state)
        _split_positions(state, model)
    if "pos_embed" in state:
        state["pos_embed"] = position_map(state["pos_embed"], *model.pos_embed.shape[1:3])
    return state


def _from_official(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names; the directions' parameters joined, the input projection and the gate's apart."""
    ours: dict[str, Tensor] = {}
    renamed = weights.rename(official, _NAMES)
    for name, value in renamed.items():
        stem, _, leaf = name.rpartition(".")
        forward, backward = (renamed.get(f"{stem}.{direction}") for direction in "01")
        if leaf in "01" and forward is not None and backward is not None and forward.shape == backward.shape:
            both = torch.stack([forward, backward])
            ours[stem] = both.squeeze(2) if stem.endswith(".conv_weight") and both.dim() == 4 else both
        elif stem.endswith(".in_proj") and len(value) % 2 == 0:
            ours[name], ours[name.replace(".in_proj.", ".gate_proj.")] = value.chunk(2)
        else:
            ours[name] = value
    return ours


def _split_positions(ours: dict[str, Tensor], model: Any) -> None:
    """In place: the class token's position comes out of the sequence of positions (1, N, dim)."""
    positions, token = ours.get("pos_embed"), ours.pop("cls_token", None)
    if positions is None or positions.dim() != 3:
        return
    if token is not None:
        at = class_position(positions.shape[1] - 1, model.class_index)
        if model.prefix_tokens is not None:
            ours["prefix_tokens"], ours["pos_embed_prefix"] = token, positions[:, at : at + 1]
        ours["pos_embed"] = torch.cat([positions[:, :at], positions[:, at + 1 :]], dim=1)


_cfg = partial(
    default_cfg,
    folder="https://huggingface.co/hustvl/",
    stride=None,
    first_conv="stem.conv",
    classifier="head",
    license="apache-2.0",
    notes=("Apache-2.0 is the licence of the official code; the pages of the weights repeat it.",),
    origin_url="https://github.com/hustvl/Vim",
    paper_name="Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
    paper_ids="arXiv:2401.09417",
)

default_cfgs = generate_default_cfgs(
    {
        "vim_tiny.in1k": _cfg("Vim-tiny-midclstok/resolve/main/vim_t_midclstok_76p1acc.pth"),
        "vim_tiny_stride8.in1k": _cfg("Vim-tiny-midclstok/resolve/main/vim_t_midclstok_ft_78p3acc.pth"),
        "vim_small.in1k": _cfg("Vim-small-midclstok/resolve/main/vim_s_midclstok_80p5acc.pth"),
        "vim_small_stride8.in1k": _cfg("Vim-small-midclstok/resolve/main/vim_s_midclstok_ft_81p6acc.pth"),
        "vim_base.in1k": _cfg("Vim-base-midclstok/resolve/main/vim_b_midclstok_81p9acc.pth"),
        "test_vim.untrained": _cfg(size=96),
    }
)

VARIANTS: dict[str, dict[str, Any]] = {
    "vim_tiny": {"dim": 192},
    "vim_tiny_stride8": {"dim": 192, "stride": 8},
    "vim_small": {"dim": 384, "drop_path_rate": 0.05},
    "vim_small_stride8": {"dim": 384, "stride": 8},
    "vim_base": {"dim": 768},
}
TEST_VARIANTS: dict[str, dict[str, Any]] = {"test_vim": {"dim": 24, "depth": 4, "img_size": 96, "d_state": 4}}

register_variants(__name__, Vim, VARIANTS, checkpoint_filter_fn, out_indices=(5, 11, 17, 23))
register_variants(__name__, Vim, TEST_VARIANTS, checkpoint_filter_fn)

"""Isotropic NAT and DiNAT (arXiv 2204.07143, 2209.15001): ViT's shape, to compare neighborhood with full attention.

Official code and weights: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer.
"""

# Annotations are not postponed: torch.fx copies those of forward() into code that TorchScript has to understand.

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_notrace_function
from torch import Tensor, nn

from subquad.backbones.base import Isotropic, resample_position
from subquad.backbones.layers import PatchEmbed, check_heads, in_turn
from subquad.backbones.neighborhood import (
    Block,
    bias_tables,
    cfg,
    check_kernel,
    checkpoint_filter_fn,
    dilated_cfg,
    neighborhood,
)
from subquad.backbones.norms import StreamNorm
from subquad.backbones.registry import register_variants

__all__ = ["IsotropicNAT"]


class FullAttention(nn.Module):
    """Attention of a map (B, H, W, dim) to all of its tokens, with a relative positional bias.

    The bias table (num_heads, 2 grid - 1, 2 grid - 1), at key minus query, is resampled for maps of another size.
    """

    def __init__(self, dim: int, num_heads: int, grid: int, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * grid - 1, 2 * grid - 1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the bias table."""
        nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        bias = relative_bias(self.rpb, height, width)
        qkv = self.qkv(x).flatten(1, 2).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=bias.to(qkv.dtype))
        return self.proj(o.transpose(1, 2).flatten(2)).unflatten(1, (height, width))


@register_notrace_function
def relative_bias(table: Tensor, height: int, width: int) -> Tensor:
    """Entries (heads, N, N) of a table (heads, 2 H - 1, 2 W - 1), once resampled, for each query and key of a map."""
    table = resample_position(table.permute(1, 2, 0).unsqueeze(0), 2 * height - 1, 2 * width - 1)[0]
    y, x = torch.arange(height, device=table.device), torch.arange(width, device=table.device)
    rows = y[None, :] - y[:, None] + height - 1  # (queries, keys)
    columns = x[None, :] - x[:, None] + width - 1
    bias = table[rows[:, None, :, None], columns[None, :, None, :]]  # (H, W, H, W, heads)
    return bias.flatten(2, 3).flatten(0, 1).permute(2, 0, 1)


class TokenBlock(Block):
    """The block of the isotropic models, on tokens (B, H W, dim)."""

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Tokens of a map of that size to such."""
        attended = self.attn(self.norm1(x).unflatten(1, (height, width))).flatten(1, 2)
        x, y = self.norm2(x, self.drop_path(self.ls1(attended)))
        return x + self.drop_path(self.ls2(self.mlp(y)))


class IsotropicNAT(Isotropic):
    """Blocks of one width on patches, with neighborhood attention or, for comparison, full attention.

    Args:
        dim, depth, num_heads: of all blocks.
        kernel_size: side of the windows; None for full attention.
        dilation: of every other block, from the second on.
        img_size: side of the images for whose maps full attention has a bias table.
        patch_size: side of the patches.
        pad_small_maps: see ``neighborhood``.
        mlp_ratio: hidden size of the MLP over the channels.
        in_chans, device, dtype, isotropic: arguments of ``Isotropic``.

    Raises:
        ValueError: for a size that cannot be built, naming it.
        TypeError: for an unknown argument.
    """

    def __init__(
        self,
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        *,
        kernel_size: int | None = 7,
        dilation: int = 1,
        img_size: int = 224,
        patch_size: int = 16,
        pad_small_maps: bool = True,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        device: Any = None,
        dtype: Any = None,
        **isotropic: Any,
    ) -> None:
        check_heads([depth], [dim], [num_heads])
        if kernel_size is not None:
            check_kernel(kernel_size)
        if dilation < 1 or patch_size < 1 or img_size < patch_size:
            sizes = f"dilation={dilation}, patch_size={patch_size}, img_size={img_size}"
            raise ValueError(f"dilation and patch_size must be positive, img_size at least a patch, got {sizes}")

        def block(dim: int, index: int, drop_path: float, **dd: Any) -> nn.Module:
            if kernel_size is None:
                attn: nn.Module = FullAttention(dim, num_heads, img_size // patch_size, **dd)
            else:
                attn = neighborhood(dim, num_heads, kernel_size, dilation if index % 2 else 1, pad_small_maps, **dd)
            return TokenBlock(dim, attn, mlp_ratio, None, drop_path, **dd)

        dd = {"device": device, "dtype": dtype}
        super().__init__(
            PatchEmbed(in_chans, dim, patch_size, StreamNorm, **dd),
            in_turn([partial(block, index=i) for i in range(depth)]),
            dim=dim,
            depth=depth,
            reduction=patch_size,
            norm=StreamNorm,
            in_chans=in_chans,
            **dd,
            **isotropic,
        )

    def no_weight_decay(self) -> set[str]:
        """The bias tables, as in the official training."""
        return super().no_weight_decay() | bias_tables(self)


# Variants --------------------------------------------------------------------------------------------------------

_TOKENS: dict[str, Any] = {"stride": None, "first_conv": "stem.proj", "classifier": "head"}


_cfg = partial(dilated_cfg, folder="https://shi-labs.com/projects/dinat/checkpoints/isotropic/", **_TOKENS)

default_cfgs = generate_default_cfgs(
    {
        "nat_isotropic_small.in1k": _cfg("nat_isotropic_small_in1k_224.pth"),
        "nat_isotropic_base.in1k": _cfg("nat_isotropic_base_in1k_224.pth"),
        "dinat_isotropic_small.in1k": _cfg("dinat_isotropic_small_in1k_224.pth"),
        "dinat_isotropic_base.in1k": _cfg("dinat_isotropic_base_in1k_224.pth"),
        "vitrpb_small.in1k": _cfg("vitrpb_small_in1k_224.pth"),
        "vitrpb_base.in1k": _cfg("vitrpb_base_in1k_224.pth"),
        "test_nat_isotropic.untrained": cfg(size=96, **_TOKENS),
    }
)

_SMALL: dict[str, Any] = {"dim": 384, "num_heads": 12, "drop_path_rate": 0.1}
_BASE: dict[str, Any] = {"dim": 768, "num_heads": 24, "drop_path_rate": 0.4}
VARIANTS: dict[str, dict[str, Any]] = {
    "nat_isotropic_small": _SMALL,
    "nat_isotropic_base": _BASE,
    "dinat_isotropic_small": _SMALL | {"dilation": 2},
    "dinat_isotropic_base": _BASE | {"dilation": 2},
    "vitrpb_small": _SMALL | {"kernel_size": None},
    "vitrpb_base": _BASE | {"kernel_size": None},
}
TEST: dict[str, dict[str, Any]] = {
    "test_nat_isotropic": {"dim": 16, "depth": 4, "num_heads": 2, "kernel_size": 3, "dilation": 2, "mlp_ratio": 2.0},
}

register_variants(__name__, IsotropicNAT, VARIANTS, checkpoint_filter_fn, out_indices=(2, 5, 8, 11))
register_variants(__name__, IsotropicNAT, TEST, checkpoint_filter_fn)

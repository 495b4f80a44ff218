"""Bi-level routing attention (arXiv 2303.08810, section 3): regions choose regions, tokens attend to their tokens."""

# Annotations are not postponed: torch.fx copies those of forward() into code that TorchScript has to understand.

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn

from subquad.backbones.layers import DepthwiseConv, ceil_to, crop_to, pad_to
from subquad.ops import region_attention, route_regions
from subquad.ops.maps import exporting

__all__ = ["BiLevelRoutingAttention"]

_POOLS = ("identity", "avgpool", "maxpool", "ada_avgpool", "ada_maxpool")


@register_notrace_function
def pad_to_regions(x: Tensor, count: int) -> Tensor:
    """A map (B, H, W, C) with zeros below and to the right, its sides multiples of ``count``."""
    return pad_to(x, ceil_to(x.shape[1], count), ceil_to(x.shape[2], count))


@register_notrace_function
def region_size(x: Tensor, count: int) -> list[int]:
    """Height and width of the regions of a map (B, H, W, C), ``count`` of them along a side that is long enough."""
    size = [x.shape[1] // count, x.shape[2] // count]
    if exporting():
        size = [symbolic_max(side, 1) for side in size]
    else:
        size = [max(size[0], 1), max(size[1], 1)]
    return size


@torch.jit.unused
def symbolic_max(a: int, b: int) -> int:
    """``max`` without a branch, which an exported program would keep as it was for the example."""
    larger: Any = torch.sym_max(a, b)
    return larger


@torch.jit.unused
def symbolic_min(a: int, b: int) -> int:
    """``min`` likewise."""
    smaller: Any = torch.sym_min(a, b)
    return smaller


@register_notrace_function
def choose_regions(q: Tensor, k: Tensor, topk: int, size: list[int]) -> Tensor:
    """``subquad.ops.route_regions`` for modules: in eager mode, in TorchScript and as a leaf of torch.fx.

    All regions, where there are fewer than ``topk``.
    """
    regions_of_keys = ((k.shape[1] + size[0] - 1) // size[0]) * ((k.shape[2] + size[1] - 1) // size[1])
    topk = symbolic_min(topk, regions_of_keys) if exporting() else min(topk, regions_of_keys)
    if torch.jit.is_scripting():
        # The operator itself, because TorchScript cannot compile the checks of the public function.
        regions = torch.ops.subquad.region_routing(q.detach(), k.detach(), size, size, topk).unsqueeze(1)
    else:
        regions = route_regions(q, k, topk, size)
    return regions


@register_notrace_function
def attend_regions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: Tensor,
    factors: Tensor | None,
    size: list[int],
    kv_size: list[int],
    scale: float,
) -> Tensor:
    """``subquad.ops.region_attention`` likewise."""
    if torch.jit.is_scripting():
        found = torch.ops.subquad.region_attention(q, k, v, regions, factors, None, None, size, kv_size, scale, False)
        o = found[0]
    else:
        o = region_attention(q, k, v, regions, size, kv_size, weights=factors, scale=scale)
    return o


class Router(nn.Linear):
    """Linear layer that autocast does not round, for few tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-2) * self.weight).sum(-1) + self.bias


class BiLevelRoutingAttention(nn.Module):
    """Attention of the tokens of each region of a map (B, H, W, dim) to those of the ``topk`` regions most like it.

    The map is cut into n_win x n_win regions; one that does not divide evenly is padded with zeros before the
    projection, and the padding, whose keys and values are the projection's bias, is attended.

    Args:
        dim: channels.
        num_heads: heads of the attention; routing sees all channels at once.
        n_win: regions along each side.
        topk: regions that a region attends to.
        qk_dim: channels of queries and keys; dim by default.
        lepe_size: kernel of the depthwise convolution of the values that is added to the output.
        ragged: instead of padding the input, take regions of floor(H / n_win) x floor(W / n_win) tokens, at least one,
            as many as that makes, and pad queries, keys and values with zeros. A map of fewer regions than ``topk`` is
            attended as a whole.
        kv_pool: how keys and values are pooled inside each region: "identity", "avgpool" and "maxpool" by
            ``kv_pool_size``, "ada_avgpool" and "ada_maxpool" to ``kv_pool_size`` a side.
        soft_routing: multiply keys and values by the softmax of the chosen regions' scores.
        diff_routing: let gradients pass to the scores; needs ``soft_routing``.
        param_routing: a projection of both means before they are compared; needs ``diff_routing``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        n_win: int = 7,
        topk: int = 4,
        *,
        qk_dim: int | None = None,
        lepe_size: int = 5,
        ragged: bool = False,
        kv_pool: str = "identity",
        kv_pool_size: int = 1,
        soft_routing: bool = False,
        diff_routing: bool = False,
        param_routing: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.qk_dim = dim if qk_dim is None else qk_dim
        _check_attention(dim, self.qk_dim, num_heads, n_win, topk, kv_pool)
        if (diff_routing and not soft_routing) or (param_routing and not diff_routing):
            raise ValueError("param_routing needs diff_routing and that soft_routing: without, routing has no gradient")
        if ragged and (kv_pool != "identity" or soft_routing):
            raise ValueError("ragged regions have neither kv_pool nor soft_routing")
        self.dim = dim
        self.num_heads = num_heads
        self.n_win = n_win
        self.topk = topk
        self.scale = self.qk_dim**-0.5  # of all heads together, as upstream
        self.ragged = ragged
        self.kv_pool = kv_pool
        self.kv_pool_size = kv_pool_size
        self.soft_routing = soft_routing
        self.diff_routing = diff_routing
        self.qkv = nn.Linear(dim, 2 * self.qk_dim + dim, **dd)
        self.router = Router(self.qk_dim, self.qk_dim, **dd) if param_routing else nn.Identity()
        self.lepe = DepthwiseConv(dim, lepe_size, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        if not self.ragged:
            x = pad_to_regions(x, self.n_win)
        size = region_size(x, self.n_win)
        q, k, v = self.qkv(x).split([self.qk_dim, self.qk_dim, self.dim], dim=-1)
        lepe = self.lepe(v)
        factors: Tensor | None = None
        if self.soft_routing:
            regions, factors = self.score(q, k)
        else:
            regions = choose_regions(self.heads(q), self.heads(k), self.topk, size)
        kv_size = size
        if self.kv_pool != "identity":
            k, v = self.pool(k, size), self.pool(v, size)
            kv_size = [k.shape[1] // self.n_win, k.shape[2] // self.n_win]
        o = attend_regions(self.heads(q), self.heads(k), self.heads(v), regions, factors, size, kv_size, self.scale)
        x = self.proj(o.flatten(3) + lepe)
        return x if self.ragged else crop_to(x, height, width)

    def heads(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, heads, C / heads)."""
        return x.unflatten(-1, (self.num_heads, -1))

    def by_region(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, regions, height, width, C)."""
        x = x.unflatten(2, (self.n_win, -1)).unflatten(1, (self.n_win, -1))
        return x.transpose(2, 3).flatten(1, 2)

    def score(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen regions and the softmax of their scores, each (B, 1, R, topk)."""
        if q.dtype != torch.float64:
            q, k = q.float(), k.float()
        q, k = self.by_region(q).mean((2, 3)), self.by_region(k).mean((2, 3))
        if not self.diff_routing:
            q, k = q.detach(), k.detach()
        q, k = self.router(q), self.router(k)
        # No product that autocast would round, nor is the router one.
        scores = ((q * self.scale).unsqueeze(2) * k.unsqueeze(1)).sum(-1)
        best, regions = scores.topk(self.topk, dim=-1)
        return regions.unsqueeze(1), best.softmax(-1).unsqueeze(1)

    def pool(self, x: Tensor, size: list[int]) -> Tensor:
        """Keys or values, pooled inside their regions: a smaller map of as many regions."""
        x = self.by_region(x).flatten(0, 1).permute(0, 3, 1, 2)  # (B R, C, height, width)
        if self.kv_pool == "avgpool":
            x = F.avg_pool2d(x, self.kv_pool_size)
        elif self.kv_pool == "maxpool":
            x = F.max_pool2d(x, self.kv_pool_size)
        elif self.kv_pool == "ada_avgpool":
            x = F.adaptive_avg_pool2d(x, self.kv_pool_size)
        else:
            x = F.adaptive_max_pool2d(x, self.kv_pool_size)
        x = x.unflatten(0, (-1, self.n_win, self.n_win))  # (B, n, n, C, height, width)
        return x.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)


def _check_attention(dim: int, qk_dim: int, num_heads: int, n_win: int, topk: int, kv_pool: str) -> None:
    if num_heads < 1 or dim % num_heads or qk_dim % num_heads:
        raise ValueError(f"num_heads must divide dim and qk_dim, got {num_heads} for {dim} and {qk_dim}")
    if n_win < 1 or not 1 <= topk <= n_win**2:
        raise ValueError(f"topk must be 1 to the n_win^2 regions, got topk={topk}, n_win={n_win}")
    if kv_pool not in _POOLS:
        raise ValueError(f"unknown kv_pool {kv_pool!r}, expected one of {list(_POOLS)}")

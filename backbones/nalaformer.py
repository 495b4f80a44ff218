"""NaLaFormer (arXiv 2506.21137): linear attention whose features sharpen with the norm of the query.

Official code: https://github.com/ZacharyMeng/NaLaFormer. No weights are released.
"""

# Annotations are not postponed: torch.fx copies those of forward() into code that TorchScript has to understand.

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_notrace_function
from torch import Tensor, nn

from subquad.backbones.layers import DepthwiseConv, attend, rotary_by_head
from subquad.backbones.registry import default_cfg, register_variants
from subquad.backbones.rotary_pyramid import SIZES, TEST_SIZE, RotaryPyramid, read_official, softmax_attend

__all__ = ["NaLaFormer", "NormAwareAttention"]


@register_notrace_function
def norm_aware_features(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Features of queries and keys (B, N, H, d), both (B, N, H, 2 d): a half of positive parts, one of negative parts.

    Queries: direction to the power p = 3 (1/2 + tanh |q|); keys: third power. Computed in float32 (float64), because
    the third power overflows 16 bits at 41.
    """
    q, k = (x if x.dtype == torch.float64 else x.float() for x in (q, k))
    norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    power = 3 * (0.5 + torch.tanh(norm))
    # Upstream divides 0 by 0 where all channels of a query are 0; such a query gets features of 0 here.
    direction = q / norm.clamp(min=1e-20)
    cube = k**3
    queries = torch.cat([direction.relu() ** power, (-direction).relu() ** power], dim=-1)
    return queries, torch.cat([cube.relu(), (-cube).relu()], dim=-1)


class NormAwareAttention(nn.Module):
    """Token mixer on a map (B, H, W, dim): attention and a local branch of the values, norm, gate.

    The features are twice as many as the channels of a head, and each half is rotated with the same angles.

    Args:
        dim, num_heads: heads of dim / num_heads channels, a multiple of 4.
        linear: whether attention is linear or softmax.
    """

    def __init__(self, dim: int, num_heads: int, *, linear: bool, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.linear = linear
        self.qkvg = nn.Linear(dim, 4 * dim, **dd)
        self.lepe = DepthwiseConv(dim, 5, **dd)
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, gate = self.qkvg(x).chunk(4, dim=-1)
        local = self.lepe(v)
        q, k, v = (t.flatten(1, 2).unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))  # (B, N, heads, d)
        cos, sin = rotary_by_head(q, x.shape[1], x.shape[2])
        if self.linear:
            q, k = norm_aware_features(q, k)
            o = attend(q, k, v.to(q.dtype), torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)).to(v.dtype)
        else:
            o = softmax_attend(q, k, v, cos, sin)
        o = o.flatten(2).unflatten(1, x.shape[1:3])
        return self.proj(self.norm(o + local) * F.silu(gate))


class NaLaFormer(RotaryPyramid):
    """NaLaFormer; arguments as in ``RotaryPyramid`` but for the mixer and the second position embedding of a block."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, mixer=NormAwareAttention, second_cpe=True, **kwargs)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Linear layers as PyTorch starts them, but for the classifier, which is a convolution upstream."""
        super().init_weights(needs_reset)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module is not self.head.fc:
                module.reset_parameters()


# In this order, before those that the families share.
_NAMES: list[tuple[str, str | None]] = [(r"\.attn\.ln\.", ".attn.norm."), (r"\.attn\.out_proj\.", ".attn.proj.")]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of the official code under our names and in our shapes; ours pass unchanged."""
    return read_official(state_dict, model, _NAMES)


_cfg = partial(
    default_cfg,
    first_conv="stem.layers.0",
    license="mit",
    notes=("No weights are released.",),
    origin_url="https://github.com/ZacharyMeng/NaLaFormer",
    paper_name="Norm×Direction: Restoring the Missing Query Norm in Vision Linear Attention",  # noqa: RUF001
    paper_ids="arXiv:2506.21137",
)

default_cfgs = generate_default_cfgs(
    {
        "nalaformer_xtiny.untrained": _cfg(),
        "nalaformer_tiny.untrained": _cfg(),
        "nalaformer_small.untrained": _cfg(),
        "nalaformer_base.untrained": _cfg(),
        "nalaformer_large.untrained": _cfg(),
        "test_nalaformer.untrained": _cfg(size=96),
    }
)

# The xtiny of the official code has 6.1 M parameters; the authors' table has 8 M in that row.
VARIANTS: dict[str, dict[str, Any]] = {
    "nalaformer_xtiny": {
        "depths": (2, 2, 2, 2),
        "dims": (32, 64, 128, 384),
        "num_heads": (1, 2, 4, 12),
        "drop_path_rate": 0.1,
    },
    "nalaformer_tiny": {**SIZES["tiny"], "mlp_ratio": 4.0},
    "nalaformer_small": SIZES["small"],
    "nalaformer_base": {**SIZES["base"], "mlp_ratio": 4.0},
    "nalaformer_large": SIZES["large"],
    "test_nalaformer": TEST_SIZE,
}

register_variants(__name__, NaLaFormer, VARIANTS, checkpoint_filter_fn)

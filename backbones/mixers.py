"""Token mixers of linear cost that their authors put into other people's hosts (``backbones/hosts``).

    agent       agent attention, arXiv 2312.08874, https://github.com/LeapLabTHU/Agent-Attention
    flatten     focused linear attention, arXiv 2308.00442, https://github.com/LeapLabTHU/FLatten-Transformer
    inline      injective linear attention, arXiv 2412.06590, https://github.com/LeapLabTHU/InLine
    polaformer  polarity-aware linear attention, arXiv 2501.15061, https://github.com/ZacharyMeng/PolaFormer
    slab        simplified linear attention, arXiv 2405.11582, https://github.com/xinghaochen/SLAB

A mixer is called with tokens (B, N, dim), of a map in row-major order, and the size of that map, as timm's attention of
PVT v2 is. Its tables, made for ``resolution``, are resampled for the map at hand; ``size_bound`` names them, each with
the mode of ``torch.nn.functional.interpolate`` that fits those of a checkpoint to another ``resolution``. Made with
``bare=True``, for a host that has the projections, it is called with queries, keys and values in one, (B, N, 3 dim),
and does not project.
"""

# Annotations are not postponed: torch.fx copies those of forward() into code that TorchScript has to understand.

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import register_notrace_function
from torch import Tensor, nn

from subquad.backbones.base import Factory, resample_position
from subquad.backbones.layers import DepthwiseConv, attend, convolve, position_map


class HeadConv(nn.Conv2d):
    """Depthwise 5x5 convolution of the channels of a head, the same for all heads, on tokens (B, N, heads * dim)."""

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(dim, dim, 5, padding=2, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:  # type: ignore[override]
        heads = x.shape[-1] // self.weight.shape[0]
        bias = self.bias
        if bias is not None:
            bias = bias.repeat(heads)
        x = x.unflatten(1, (feat_size[0], feat_size[1]))
        return convolve(x, self.weight.repeat(heads, 1, 1, 1), bias).flatten(1, 2)


def projections(dim: int, parts: int, bare: bool, **dd: Any) -> tuple[nn.Module, nn.Module]:
    """What is in front of a mixer and behind it: linear layers, or nothing for a bare one."""
    if bare:
        return nn.Identity(), nn.Identity()
    return nn.Linear(dim, parts * dim, **dd), nn.Linear(dim, dim, **dd)


class PositionedMixer(nn.Module):
    """What the mixers of FLatten, PolaFormer and SLAB share: projections, positions of the keys, a local branch.

    Args:
        dim, num_heads: channels and heads.
        resolution: height and width that the position table is made for.
        parts: how many times dim channels are projected: q, k, v and what else the mixer needs.
        bare: without projections.
    """

    size_bound = (("position", "bicubic"),)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        resolution: tuple[int, int],
        parts: int = 3,
        bare: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_mixer(dim, num_heads)
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qkv, self.proj = projections(dim, parts, bare, **dd)
        self.position = nn.Parameter(torch.zeros(1, *resolution, dim, **dd))
        self.conv = HeadConv(dim // num_heads, **dd)

    def reset_parameters(self) -> None:
        """The position table starts at 0."""
        nn.init.zeros_(self.position)

    def key_position(self, feat_size: list[int]) -> Tensor:
        """The position table for a map, (1, N, dim)."""
        return resample_position(self.position, feat_size[0], feat_size[1]).flatten(1, 2)

    def cut(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) to heads (B, N, heads, d)."""
        return x.unflatten(-1, (self.num_heads, -1))


def _wide(x: Tensor) -> Tensor:
    """At least float32: powers of features are beyond 16 bits."""
    return x if x.dtype == torch.float64 else x.float()


@register_notrace_function
def focused_features(q: Tensor, k: Tensor, position: Tensor, scale: Tensor, power: int) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, N, C) to their features: a power of the positive part, with the norm from before.

    The norms are over all channels, not those of a head: the released weights were trained so.
    """
    divisor = F.softplus(_wide(scale))
    queries = (F.relu(_wide(q)) + 1e-6) / divisor
    keys = (F.relu(_wide(k) + _wide(position)) + 1e-6) / divisor
    return _focus(queries, power), _focus(keys, power)


def _focus(x: Tensor, power: int) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    # Over the largest channel, which cancels: the power of an all but empty feature would be 0, and its norm 0 / 0.
    sharp = (x / x.amax(dim=-1, keepdim=True)) ** power
    return sharp * (norm / torch.linalg.vector_norm(sharp, dim=-1, keepdim=True))


class FocusedAttention(PositionedMixer):
    """FLatten's mixer, with features to the third power; arguments as in ``PositionedMixer``."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        resolution: tuple[int, int],
        bare: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(dim, num_heads, resolution, bare=bare, device=device, dtype=dtype)
        self.scale = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Position table and scales start at 0."""
        super().reset_parameters()
        nn.init.zeros_(self.scale)

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = focused_features(q, k, self.key_position(feat_size), self.scale, 3)
        o = attend(self.cut(q), self.cut(k), self.cut(v).to(q.dtype)).flatten(2).to(v.dtype)
        return self.proj(o + self.conv(v, feat_size))


@register_notrace_function
def polar_features(
    q: Tensor, k: Tensor, position: Tensor, scale: Tensor, power: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads (B, N, h, d) to features of twice the width: queries of equal and of opposite sign, and keys.

    Each channel has a power of its own, between 1 and 5.
    """
    divisor = F.softplus(_wide(scale)).view_as(power)
    power = 1 + 4 * torch.sigmoid(_wide(power))
    q, k = _wide(q) / divisor, (_wide(k) + _wide(position)) / divisor
    q_plus, q_minus = F.relu(q) ** power, F.relu(-q) ** power
    keys = torch.cat([F.relu(k) ** power, F.relu(-k) ** power], dim=-1)
    return torch.cat([q_plus, q_minus], dim=-1), torch.cat([q_minus, q_plus], dim=-1), keys


class PolarityAttention(PositionedMixer):
    """PolaFormer's mixer: one half of a head's values for pairs of equal sign, one for opposite signs; then a gate."""

    def __init__(
        self, dim: int, num_heads: int, resolution: tuple[int, int], device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(dim, num_heads, resolution, 4, device=device, dtype=dtype)
        if dim // num_heads % 2:
            raise ValueError(f"heads must have an even number of channels, got {dim} over {num_heads} heads")
        self.scale = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.power = nn.Parameter(torch.zeros(num_heads, dim // num_heads, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Position table, scales and powers start at 0."""
        super().reset_parameters()
        nn.init.zeros_(self.scale)
        nn.init.zeros_(self.power)

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        q, k, v, gate = self.qkv(x).chunk(4, dim=-1)
        position = self.cut(self.key_position(feat_size))
        same, opposite, keys = polar_features(self.cut(q), self.cut(k), position, self.scale, self.power)
        first, second = self.cut(v).to(keys.dtype).chunk(2, dim=-1)
        o = torch.cat([attend(same, keys, first), attend(opposite, keys, second)], dim=-1)
        return self.proj((o.flatten(2).to(v.dtype) + self.conv(v, feat_size)) * gate)


@register_notrace_function
def positive_features(q: Tensor, k: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, N, C) to their positive parts, queries times N.

    So the op's means become the sums that SLAB divides, and its eps is that of the sum of the weights.
    """
    return F.relu(_wide(q)) * k.shape[1], F.relu(_wide(k) + _wide(position))


class SimplifiedAttention(PositionedMixer):
    """SLAB's mixer, with the positive parts as features; arguments as in ``PositionedMixer``."""

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = positive_features(q, k, self.key_position(feat_size))
        o = attend(self.cut(q), self.cut(k), self.cut(v).to(q.dtype), eps=1e-6).flatten(2).to(v.dtype)
        return self.proj(o + self.conv(v, feat_size))


@register_notrace_function
def dynamic_conv(x: Tensor, kernels: Tensor, height: int, width: int) -> Tensor:
    """Depthwise 3x3 convolution of maps (B, height * width, C) with kernels (B, C, 9) of each image.

    Nine products instead of a convolution with B C groups, which no exporter takes for a variable batch.
    """
    padded = F.pad(x.unflatten(1, (height, width)), (0, 0, 1, 1, 1, 1))
    taps = kernels.transpose(1, 2).unsqueeze(2).unsqueeze(2)  # (B, 9, 1, 1, C)
    total = padded[:, :height, :width] * taps[:, 0]
    for tap in range(1, 9):
        row, column = tap // 3, tap % 3
        total = torch.addcmul(total, padded[:, row : row + height, column : column + width], taps[:, tap])
    return total.flatten(1, 2)


class InjectiveAttention(nn.Module):
    """InLine's mixer: weights that sum to 1 without a division, and a 3x3 convolution predicted from the mean token.

    Args:
        dim, num_heads: channels and heads.
        resolution: not used, there are no tables.
        prefix_tokens: tokens in front of the map's; they take part in the attention, not in the convolution.
        bare: without projections; then the mean token has to be given.
    """

    size_bound = ()

    def __init__(
        self,
        dim: int,
        num_heads: int,
        resolution: tuple[int, int],
        prefix_tokens: int = 0,
        bare: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_mixer(dim, num_heads)
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.prefix_tokens = prefix_tokens
        self.scale = (dim // num_heads) ** -0.5
        self.qkv, self.proj = projections(dim, 3, bare, **dd)
        self.predict1 = nn.Conv1d(dim, dim, 1, groups=num_heads, **dd)
        self.predict2 = nn.Conv1d(dim, 9 * dim, 1, groups=num_heads, **dd)

    def forward(self, x: Tensor, feat_size: list[int], mean: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        mean = x.mean(1) if mean is None else mean
        kernels = self.predict2(F.gelu(self.predict1(mean.unsqueeze(-1))))  # (B, 9 C, 1)
        kernels = kernels.squeeze(-1).unflatten(1, (-1, 9))
        local = dynamic_conv(v[:, self.prefix_tokens :], kernels, feat_size[0], feat_size[1])
        local = F.pad(local, (0, 0, self.prefix_tokens, 0))
        q, k, heads = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        o = attend(q, k, heads, normalizer="subtract", scale=self.scale).flatten(2)
        return self.proj(o + local)


@register_notrace_function
def pool_tokens(x: Tensor, height: int, width: int, side: int) -> Tensor:
    """Adaptive average pooling of maps (B, height * width, C) to tokens (B, side ** 2, C), as two matrix products.

    So that an exported program pools maps of any size.
    """
    rows, columns = _pooling(x, height, side), _pooling(x, width, side)
    x = torch.einsum("ih,bhwc->biwc", rows, x.unflatten(1, (height, width)))
    return torch.einsum("jw,biwc->bijc", columns, x).flatten(1, 2)


def _pooling(x: Tensor, size: int, bins: int) -> Tensor:
    """Weights (bins, size) of bins from floor(i size / bins) to ceil((i + 1) size / bins)."""
    i, pixel = torch.arange(bins, device=x.device)[:, None], torch.arange(size, device=x.device)
    inside = (pixel >= i * size // bins) & (pixel < ((i + 1) * size + bins - 1) // bins)
    weights = inside.to(x.dtype)
    return weights / weights.sum(1, keepdim=True)


def _side_of(name: str, number: int) -> int:
    side = int(max(number, 0) ** 0.5)
    if side < 1 or side**2 != number:
        raise ValueError(f"{name} must be a square, got {number}")
    return side


@register_notrace_function
def agent_bias(
    blocks: Tensor, rows: Tensor, columns: Tensor, prefix: Tensor | None, height: int, width: int, side: int
) -> Tensor:
    """Bias between agents and tokens (heads, side ** 2, prefix tokens + N) from a coarse, a row and a column table.

    Args:
        blocks: (heads, agents, 7, 7).
        rows, columns: (heads, agents, H0, 1) and (heads, agents, 1, W0); their sum is resampled for other maps.
        prefix: (heads, agents, prefix tokens) or None.
        height, width: of the map.
        side: of the square of agents; if the tables are for another number, they are resampled for it.
    """
    if blocks.shape[1] != side * side:
        blocks, rows, columns = fit_agents(blocks, side), fit_agents(rows, side), fit_agents(columns, side)
        if prefix is not None:
            prefix = fit_agents(prefix.unsqueeze(-1), side).squeeze(-1)
    size = [height, width]
    fine = F.interpolate(blocks, size=size, mode="bilinear") + F.interpolate(rows + columns, size=size, mode="bilinear")
    fine = fine.flatten(2)
    if prefix is not None:
        fine = torch.cat([prefix, fine], dim=-1)
    return fine


def fit_agents(table: Tensor, side: int) -> Tensor:
    """A table (heads, agents, H, W) resampled for ``side ** 2`` agents, which lie in a square as pooled queries do."""
    heads, agents, height, width = table.shape
    old = int(agents**0.5)
    planes = table.permute(0, 2, 3, 1).reshape(-1, 1, old, old)
    planes = F.interpolate(planes, size=[side, side], mode="bilinear")
    return planes.reshape(heads, height, width, side * side).permute(0, 3, 1, 2)


class AgentAttention(nn.Module):
    """Agent attention: softmax attention of pooled queries to all keys, then of all queries to what these found.

    Args:
        dim, num_heads: channels and heads.
        resolution: height and width that the bias tables are made for.
        agents: number of pooled queries, a square.
        pooled_agents: another number to pool to, a square, for which the biases are resampled; the authors' detectors
            have more agents than their classifiers.
        prefix_tokens: 1 for a class token, which is not pooled and has biases of its own.
        bare: without projections, and without the local branch, which CSWin has in every block.
    """

    # Linear: each has one row or column.
    size_bound = tuple((name, "bilinear") for name in ("ah_bias", "aw_bias", "ha_bias", "wa_bias"))

    def __init__(
        self,
        dim: int,
        num_heads: int,
        resolution: tuple[int, int],
        agents: int = 49,
        pooled_agents: int | None = None,
        prefix_tokens: int = 0,
        bare: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_mixer(dim, num_heads)
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.prefix_tokens = prefix_tokens
        _side_of("agents", agents)
        self.side = _side_of("pooled_agents", agents if pooled_agents is None else pooled_agents)
        self.qkv, self.proj = projections(dim, 3, bare, **dd)
        self.conv = None if bare else DepthwiseConv(dim, 3, **dd)
        height, width = resolution
        # "a" is for agents, "n" for pixels in blocks, "h" and "w" for rows and columns, "c" for the class token; the
        # first letter is what asks.
        for name, shape in {
            "an_bias": (7, 7),
            "na_bias": (7, 7),
            "ah_bias": (height, 1),
            "aw_bias": (1, width),
            "ha_bias": (height, 1),
            "wa_bias": (1, width),
        }.items():
            self.register_parameter(name, nn.Parameter(torch.empty(num_heads, agents, *shape, **dd)))
        for name in ("ac_bias", "ca_bias"):
            bias = nn.Parameter(torch.empty(num_heads, agents, prefix_tokens, **dd)) if prefix_tokens else None
            self.register_parameter(name, bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Biases start as linear layers do."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                trunc_normal_(parameter, std=0.02)

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        height, width = feat_size[0], feat_size[1]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        agents = pool_tokens(q[:, self.prefix_tokens :], height, width, self.side)
        asking = agent_bias(self.an_bias, self.ah_bias, self.aw_bias, self.ac_bias, height, width, self.side)
        answering = agent_bias(self.na_bias, self.ha_bias, self.wa_bias, self.ca_bias, height, width, self.side)
        q, k, heads, agents = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v, agents))
        found = F.scaled_dot_product_attention(agents, k, heads, attn_mask=asking.to(q.dtype).unsqueeze(0))
        o = F.scaled_dot_product_attention(q, agents, found, attn_mask=answering.mT.to(q.dtype).unsqueeze(0))
        o = o.transpose(1, 2).flatten(2)
        if self.conv is not None:
            local = self.conv(v[:, self.prefix_tokens :].unflatten(1, (height, width))).flatten(1, 2)
            o = o + F.pad(local, (0, 0, self.prefix_tokens, 0))
        return self.proj(o)


MIXERS: dict[str, Factory] = {
    "agent": AgentAttention,
    "flatten": FocusedAttention,
    "inline": InjectiveAttention,
    "polaformer": PolarityAttention,
    "slab": SimplifiedAttention,
}
"""Called as ``mixer(dim, num_heads, resolution, device=, dtype=)``."""

PREFIX_MIXERS: dict[str, Factory] = {"agent": AgentAttention, "inline": InjectiveAttention}
"""Those that take ``prefix_tokens=`` too."""

BARE_MIXERS: dict[str, Factory] = {name: mixer for name, mixer in MIXERS.items() if name != "polaformer"}
"""Those that take ``bare=`` too; PolaFormer's has a gate among its projections."""


def check_mixer(dim: int, num_heads: int) -> None:
    """Raises ValueError unless the heads divide the channels."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide the channels, got {num_heads} heads for {dim} channels")


def find_mixer(name: str) -> Factory:
    """The mixer of that name; raises ValueError for an unknown one."""
    if name not in MIXERS:
        raise ValueError(f"unknown mixer {name!r}, expected one of {list(MIXERS)}")
    return MIXERS[name]


# Weights ---------------------------------------------------------------------------------------------------------

NAMES: list[tuple[str, str | None]] = [
    (r"\.attn\.(relative_position_index|attn_mask)$|\.attn_mask$", None),
    (r"\.attn\.positional_encoding$", ".attn.position"),
    (r"\.attn\.dwc\.", ".attn.conv."),
    (r"\.attn\.residual\.0\.", ".attn.predict1."),
    (r"\.attn\.residual\.2\.", ".attn.predict2."),
    (r"\.attn\.qkvg\.", ".attn.qkv."),
]
"""Official names of mixers to ours."""


_RESAMPLED: dict[str, str] = dict(
    PositionedMixer.size_bound + InjectiveAttention.size_bound + AgentAttention.size_bound
)


def fit_mixers(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of mixers, under our names, in our shapes: joint projections, tables as maps of the right size."""
    fitted: dict[str, Tensor] = {}
    for name, value in state.items():
        prefix, _, leaf = name.rpartition(".attn.")
        joint = f"{prefix}.attn.qkv.{leaf.rpartition('.')[2]}"
        if leaf.startswith(("q.", "qg.")) and name not in expected and joint in expected:
            first = value.chunk(2) if leaf.startswith("qg.") else (value,)
            keys_values = state[f"{prefix}.attn.kv.{leaf.rpartition('.')[2]}"]
            fitted[joint] = torch.cat([first[0], keys_values, *first[1:]])
        elif leaf.startswith("kv.") and name not in expected and joint in expected:
            continue
        elif leaf == "position" and name in expected:
            height, width = expected[name].shape[1:3]
            fitted[name] = position_map(value, height, width, _RESAMPLED[leaf])
        elif leaf.endswith("_bias") and name in expected:
            fitted[name] = fit_agent_bias(leaf, value, expected[name])
        elif leaf in ("scale", "power") and name in expected and value.numel() == expected[name].numel():
            fitted[name] = value.reshape(expected[name].shape)
        else:
            fitted[name] = value
    return fitted


def fit_agent_bias(name: str, value: Tensor, expected: Tensor) -> Tensor:
    """A bias of agents in our order of axes, (heads, agents, ...), resampled if it is bound to a size."""
    if value.dim() == 5 and name in ("ha_bias", "wa_bias"):
        value = value.squeeze(0).movedim(-1, 1)  # (heads, H, 1, agents)
    elif name == "ca_bias" and value.dim() == 4:
        value = value.squeeze(0).movedim(-1, 1)
    elif value.dim() == expected.dim() + 1:
        value = value.squeeze(0)
    if name in _RESAMPLED and value.shape[:2] == expected.shape[:2] and value.shape != expected.shape:
        value = F.interpolate(value, size=expected.shape[2:], mode=_RESAMPLED[name])
    return value

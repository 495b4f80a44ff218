"""What the families of neighborhood attention share: blocks, names of their checkpoints, default cfgs."""

# Annotations are not postponed: torch.fx copies those of forward() into code that TorchScript has to understand.

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerScale, Mlp
from timm.models import register_notrace_module
from torch import Tensor, nn

from subquad.backbones import weights
from subquad.backbones.base import Pyramid, resample_position
from subquad.backbones.norms import AddLayerNorm, LayerNorm
from subquad.backbones.registry import default_cfg
from subquad.ops import NeighborhoodAttention2D

register_notrace_module(NeighborhoodAttention2D)


class Block(nn.Module):
    """Attention over a map and an MLP, each behind a norm and, with ``layer_scale``, before a scale a channel."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        layer_scale: float | None,
        drop_path: float,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, **dd)
        self.attn = attn
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.norm2 = AddLayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()


def neighborhood(
    dim: int, num_heads: int, kernel_size: int, dilation: int, pad_small_maps: bool, **dd: Any
) -> NeighborhoodAttention2D:
    """The layer of NAT.

    With ``pad_small_maps`` a map smaller than kernel_size * dilation is padded before the projection to queries, keys
    and values, and the padding attended; without, it is an error.
    """
    return NeighborhoodAttention2D(
        dim, num_heads, kernel_size, dilation, rel_pos_bias=True, pad_small_maps=pad_small_maps, **dd
    )


def check_kernel(kernel_size: int) -> None:
    """Raises ValueError for a side of windows that is not a positive integer."""
    if not isinstance(kernel_size, int) or kernel_size < 1:
        raise ValueError(f"kernel_size must be a positive integer, got {kernel_size!r}")


def bias_tables(model: nn.Module) -> set[str]:
    """Names of the relative positional biases, which the official training does not decay."""
    return {name for name, _ in model.named_parameters() if name.endswith(".rpb")}


# Weights ---------------------------------------------------------------------------------------------------------

# Names of transformers to the official ones, in order.
_TRANSFORMERS_NAMES: list[tuple[str, str | None]] = [
    (r"^hidden_states_norms\.", None),  # of its backbones
    (r"^(nat|dinat)\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.levels\.(\d+)\.layers\.", r"levels.\1.blocks."),
    (r"^encoder\.", ""),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
]

# Official names to ours, in order.
_NAMES: list[tuple[str, str | None]] = [
    (r"^norm\d+\.", None),  # of the detection backbone
    (r"\.relative_position_index$", None),
    (r"^patch_embed\.proj\.0\.", "stem.conv1."),
    (r"^patch_embed\.proj\.1\.", "stem.conv2."),
    (r"^patch_embed\.", "stem."),
    # upstream downsamples at the end of a stage
    *((rf"^(levels|layers)\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(8)),
    (r"^(levels|layers)\.(\d+)\.blocks\.", r"stages.\2.blocks."),
    (r"^layers\.", "blocks."),  # of an isotropic model
    (r"\.gamma([12])$", r".ls\1.gamma"),
]
_HEAD = (r"^head\.(weight|bias)$", r"head.fc.\1")


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """An official checkpoint, or transformers' form of one, under our names; ours pass unchanged.

    Bias tables are resampled, as the authors do, for a model with another kernel size.

    Raises:
        ValueError: if there are no tensors in it (see ``weights.unwrap``).
    """
    official = weights.unwrap(state_dict)
    if any(".attention.self." in name for name in official):
        official = _from_transformers(weights.rename(official, _TRANSFORMERS_NAMES))
    ours = weights.rename(official, [*_NAMES, _HEAD] if isinstance(model, Pyramid) else _NAMES)
    expected = model.state_dict()
    return {
        name: _resample(table, expected[name]) if name.endswith(".rpb") and name in expected else table
        for name, table in ours.items()
    }


def _from_transformers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values in one projection, scales of a block in two."""
    official: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if ".attn.query." in name:
            parts = [state_dict[name.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
            official[name.replace(".query.", ".qkv.")] = torch.cat(parts)
        elif name.endswith(".layer_scale_parameters"):
            block = name.removesuffix("layer_scale_parameters")
            official[f"{block}gamma1"], official[f"{block}gamma2"] = value
        elif ".attn.key." not in name and ".attn.value." not in name:
            official[name] = value
    return official


def _resample(table: Tensor, expected: Tensor) -> Tensor:
    """A bias table for another kernel size; what does not fit otherwise is left for the loader to report."""
    if table.dim() != 3 or len(table) != len(expected):
        return table
    return resample_position(table.permute(1, 2, 0).unsqueeze(0), *expected.shape[1:])[0].permute(2, 0, 1)


cfg = partial(
    default_cfg,
    folder="https://shi-labs.com/projects/nat/checkpoints/CLS/",
    first_conv="stem.conv1",
    license="mit",
    origin_url="https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
    paper_name="Neighborhood Attention Transformer",
    paper_ids="arXiv:2204.07143",
)
"""Default cfg of NAT, from the name of the file."""

dilated_cfg = partial(
    cfg,
    folder="https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/",
    paper_name="Dilated Neighborhood Attention Transformer",
    paper_ids="arXiv:2209.15001",
)
"""The same of DiNAT."""

"""The two macro-architectures, ``Pyramid`` and ``Isotropic``: timm's whole model contract, once.

A family builds one of them out of its own parts (stem, blocks, downsampling, norm) and states its table of variants;
everything that timm's scripts and wrappers ask of a model is here. Parameter names follow the macro-architecture:

    Pyramid     stem.*  stages.<i>.downsample.*  stages.<i>.blocks.<j>.*  norm.*  head.fc.*
    Isotropic   stem.*  prefix_tokens  pos_embed  blocks.<i>.*  norm.*  head.*

The contract is that of timm 1.0.31; timm's own test-suite checks it in ``tests/conformance``.
"""

# Annotations are not postponed here: torch.fx copies those of forward() into code that TorchScript has to understand.

import os
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, calculate_drop_path_rates, get_device_dtype, global_pool_nlc, trunc_normal_
from timm.models import checkpoint, checkpoint_seq, named_apply, register_notrace_function
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from subquad.backbones import weights
from subquad.backbones.images import channels_last, check_images, first_weight
from subquad.ops.maps import exporting

Factory = Callable[..., nn.Module]


class StageSpec(NamedTuple):
    """One stage of a ``Pyramid``.

    Attributes:
        dim: channels.
        depth: number of blocks.
        reduction: input pixels per pixel of the stage's map, along one axis.
        block: called as ``block(dim, drop_path=rate, device=, dtype=)``; the module maps (B, H, W, dim) to itself.
        downsample: called as ``downsample(previous_dim, dim, device=, dtype=)``, runs before the blocks; None for none.
    """

    dim: int
    depth: int
    reduction: int
    block: Factory
    downsample: Factory | None = None


class Stage(nn.Module):
    """Downsampling, then blocks, on maps (B, H, W, C)."""

    def __init__(self, in_dim: int, spec: StageSpec, drop_path: Sequence[float], device: Any, dtype: Any) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if spec.downsample is None and in_dim != spec.dim:
            raise ValueError(f"a stage of {spec.dim} channels after {in_dim} needs a downsample layer")
        self.downsample = nn.Identity() if spec.downsample is None else spec.downsample(in_dim, spec.dim, **dd)
        self.blocks = nn.Sequential(*(spec.block(spec.dim, drop_path=rate, **dd) for rate in drop_path))
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x


class Pyramid(nn.Module):
    """Stages of falling resolution on channels-last maps; a norm on the last map, then pooling and a classifier.

    Takes images (B, C, H, W) of any size. ``forward_features`` gives (B, H / r, W / r, num_features),
    ``forward_intermediates`` and ``features_only=True`` give maps (B, C, H, W), one for each stage.

    Args:
        stem: maps images (B, C, H, W) to (B, H, W, stages[0].dim).
        stages: see ``StageSpec``.
        norm: called as ``norm(dim, device=, dtype=)`` for the last map.
        head: called as timm's ``ClassifierHead``; if it has a ``hidden_size``, that is the width of pooled features.
        in_chans: channels of the image.
        num_classes: 0 for no classifier: then the model returns pooled features.
        global_pool: one of ``POOLS``; ``""`` leaves the map unpooled.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 over all blocks.
        device, dtype: where and how parameters are made.

    Raises:
        ValueError: for a rate outside [0, 1), negative classes, unknown pooling or stages that do not fit together.
    """

    POOLS = ("avg", "max", "avgmax", "catavgmax", "")
    output_fmt = "NHWC"

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[StageSpec],
        *,
        norm: Factory,
        head: Factory = ClassifierHead,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _check_head(num_classes, global_pool, self.POOLS, drop_rate, drop_path_rate)
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.drop_rate = drop_rate
        self.num_features = stages[-1].dim
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": spec.dim, "reduction": spec.reduction, "module": f"stages.{i}"} for i, spec in enumerate(stages)
        ]

        self.stem = stem
        rates: Any = calculate_drop_path_rates(drop_path_rate, [spec.depth for spec in stages], stagewise=True)
        in_dims = [stages[0].dim, *(spec.dim for spec in stages)]
        self.stages = nn.Sequential(*(Stage(in_dims[i], spec, rates[i], **dd) for i, spec in enumerate(stages)))
        self.norm = norm(self.num_features, **dd)
        self.head: Any = head(self.num_features, num_classes, global_pool, drop_rate, input_fmt=self.output_fmt, **dd)
        self.head_hidden_size = self._pooled_width()
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise every parameter, as after ``to_empty``; ``needs_reset=False`` if the layers are freshly made."""
        named_apply(partial(init_layer, needs_reset=needs_reset), self)

    def load_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Load the file of a default cfg, adapting input channels and classifier; see ``weights.load_pretrained``."""
        weights.load_pretrained(self, path)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimizers should not decay, beside vectors and biases."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates: one for each block, or for each stage if ``coarse``."""
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),  # with the stage's first block
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def get_classifier(self) -> nn.Module:
        """The classifier, an Identity if there is none."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier (0 classes: remove it) and, if given, the pooling."""
        pool = self.global_pool if global_pool is None else global_pool
        _check_head(num_classes, pool, self.POOLS)
        self.num_classes, self.global_pool = num_classes, pool
        self.head.in_features = self.num_features  # narrower after pruning
        self.head.reset(num_classes, pool_type=pool, **get_device_dtype(self))
        self.head_hidden_size = self._pooled_width()

    def _pooled_width(self) -> int:
        return getattr(self.head, "hidden_size", self.num_features) * self.head.global_pool.feat_mult()

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the map of the stem (B, H', W', stages[0].dim)."""
        check_images(x, self.in_chans, None if torch.jit.is_scripting() else first_weight(self.stem))
        return self.stem(channels_last(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps at the end of stages.

        Args:
            x: images (B, C, H, W).
            indices: stages; None for all, an int for that many last ones.
            norm: apply the final norm to the last stage's map.
            stop_early: do not run stages behind the last one asked for.
            output_fmt: ``"NCHW"`` or ``"NHWC"``.
            intermediates_only: return the maps alone.

        Returns:
            (what ``forward_features`` returns, maps), or the maps.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError("output_fmt must be NCHW or NHWC")
        intermediates: list[Tensor] = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        if torch.jit.is_scripting() or not stop_early:
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]
        x = self.embed(x)
        i = 0
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                tap = self.norm(x) if norm and i == last else x
                intermediates.append(tap.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else tap)
        if intermediates_only:
            return intermediates
        if i == last:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what maps of the given stages do not need; returns the stages' absolute indices."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        if prune_end:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the last map, normalised: (B, H / r, W / r, num_features)."""
        x = self.embed(x)
        x = self.stages(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What ``forward_features`` returns to logits (B, num_classes), or with ``pre_logits`` to pooled features."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


class Isotropic(nn.Module):
    """Blocks of one width on tokens; a norm on all tokens, then pooling and a classifier.

    Takes images (B, C, H, W) of any size. Tokens are (B, P + H' W', dim): P learned prefix tokens, then the stem's map
    (B, H', W', dim) in row-major order. A family that places its prefix tokens elsewhere overrides ``join_tokens`` and
    ``split_tokens``.

    Args:
        stem: maps images (B, C, H, W) to (B, H', W', dim).
        block: called as ``block(dim, drop_path=rate, device=, dtype=)``; its ``forward(tokens, height, width)`` maps
            tokens of a map of that size to tokens.
        dim, depth: width and number of blocks.
        reduction: input pixels per token along one axis.
        norm: called as ``norm(dim, device=, dtype=)``.
        pos_grid: height and width of the learned position embedding, resampled for maps of other sizes; None for none.
        num_prefix_tokens: P; the first is the class token.
        in_chans, num_classes, drop_rate, drop_path_rate, device, dtype: as in ``Pyramid``.
        global_pool: one of ``POOLS``; ``"token"`` takes the class token, if there is one, the others pool over the map.

    Raises:
        ValueError: for a rate outside [0, 1), negative classes, unknown pooling or a class token that is not there.
    """

    POOLS = ("avg", "token", "max", "avgmax", "")
    output_fmt = "NLC"

    def __init__(
        self,
        stem: nn.Module,
        block: Factory,
        *,
        dim: int,
        depth: int,
        reduction: int,
        norm: Factory,
        pos_grid: tuple[int, int] | None = None,
        num_prefix_tokens: int = 0,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_prefix_tokens = num_prefix_tokens
        self.pools = tuple(pool for pool in self.POOLS if pool != "token" or num_prefix_tokens)
        _check_head(num_classes, global_pool, self.pools, drop_rate, drop_path_rate)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = dim
        self.feature_info = [{"num_chs": dim, "reduction": reduction, "module": f"blocks.{i}"} for i in range(depth)]
        self.grad_checkpointing = False

        self.stem = stem
        prefix_shape = (1, num_prefix_tokens, dim)
        self.prefix_tokens = nn.Parameter(torch.empty(prefix_shape, **dd)) if num_prefix_tokens else None
        self.pos_embed = nn.Parameter(torch.empty(1, *pos_grid, dim, **dd)) if pos_grid else None
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(block(dim, drop_path=rate, **dd) for rate in rates)
        self.norm = norm(dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dim, num_classes, **dd) if num_classes else nn.Identity()
        self.init_weights(needs_reset=False)

    def reset_parameters(self) -> None:
        """Initialise prefix tokens and position embedding."""
        for parameter in (self.prefix_tokens, self.pos_embed):
            if parameter is not None:
                trunc_normal_(parameter, std=0.02)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise every parameter, as after ``to_empty``; ``needs_reset=False`` if the layers are freshly made."""
        self.reset_parameters()
        named_apply(partial(init_layer, needs_reset=needs_reset), self)

    def load_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Load the file of a default cfg, adapting input channels and classifier; see ``weights.load_pretrained``."""
        weights.load_pretrained(self, path)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimizers should not decay, beside vectors and biases."""
        return {name for name in ("prefix_tokens", "pos_embed") if getattr(self, name) is not None}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates: one for each block."""
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem|^prefix_tokens|^pos_embed", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The classifier, an Identity if there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier (0 classes: remove it) and, if given, the pooling."""
        pool = self.global_pool if global_pool is None else global_pool
        _check_head(num_classes, pool, self.pools)
        self.num_classes, self.global_pool = num_classes, pool
        head = nn.Linear(self.num_features, num_classes, **get_device_dtype(self)) if num_classes else nn.Identity()
        self.head = head.train(self.training)

    def join_tokens(self, x: Tensor) -> Tensor:
        """Map (B, H, W, dim) to tokens, with the prefix tokens."""
        x = x.flatten(1, 2)
        if self.prefix_tokens is not None:
            x = torch.cat([self.prefix_tokens.expand(x.shape[0], -1, -1), x], dim=1)
        return x

    def split_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens to prefix tokens (B, P, dim) and the map's tokens (B, H W, dim)."""
        return x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]

    def embed(self, x: Tensor) -> tuple[Tensor, int, int]:
        """Images (B, C, H, W) to tokens and the height and width of their map."""
        check_images(x, self.in_chans, None if torch.jit.is_scripting() else first_weight(self.stem))
        x = self.stem(channels_last(x))
        height, width = x.shape[1], x.shape[2]
        if self.pos_embed is not None:
            x = x + resample_position(self.pos_embed, height, width)
        return self.join_tokens(x), height, width

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps behind blocks.

        Args:
            x: images (B, C, H, W).
            indices: blocks; None for all, an int for that many last ones.
            return_prefix_tokens: pair each map with its prefix tokens (B, P, dim).
            norm: apply the final norm to every map.
            stop_early: do not run blocks behind the last one asked for.
            output_fmt: ``"NCHW"``, or ``"NLC"`` for the map's tokens (B, H' W', dim).
            intermediates_only: return the maps alone.

        Returns:
            (what ``forward_features`` returns, maps), or the maps.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError("output_fmt must be NCHW or NLC")
        intermediates: list[Tensor] = []
        prefixes: list[Tensor] = []
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        if torch.jit.is_scripting() or not stop_early:
            blocks = self.blocks
        else:
            blocks = self.blocks[: max_index + 1]
        x, height, width = self.embed(x)
        for i, block in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, height, width)
            else:
                x = block(x, height, width)
            if i in take_indices:
                prefix, tap = self.split_tokens(self.norm(x) if norm else x)
                if output_fmt == "NCHW":
                    tap = tap.transpose(1, 2).unflatten(2, (height, width)).contiguous()
                intermediates.append(tap)
                prefixes.append(prefix)
        if not torch.jit.is_scripting() and return_prefix_tokens:
            pairs = list(zip(intermediates, prefixes, strict=True))
            return pairs if intermediates_only else (self.norm(x), pairs)  # type: ignore[return-value]
        if intermediates_only:
            return intermediates
        return self.norm(x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what maps behind the given blocks do not need; returns the blocks' absolute indices."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to all tokens, normalised."""
        x, height, width = self.embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, height, width)
            else:
                x = block(x, height, width)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What ``forward_features`` returns to logits (B, num_classes), or with ``pre_logits`` to pooled features."""
        if self.global_pool:
            prefix, patches = self.split_tokens(x)
            x = prefix[:, 0] if self.global_pool == "token" else global_pool_nlc(patches, self.global_pool, 0)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


# Shared by both ----------------------------------------------------------------------------------------------------


def init_layer(module: nn.Module, name: str, needs_reset: bool) -> None:
    """Linear layers truncated normal (0.02) with zero bias, every other layer its own ``reset_parameters``."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif needs_reset and hasattr(module, "reset_parameters"):
        module.reset_parameters()  # type: ignore[operator]


@register_notrace_function
def resample_position(pos_embed: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """Position embedding (1, H0, W0, C) for a map of another size, (1, height, width, C), in float32 (or float64)."""
    # Not a branch in an exported program; resampling to the same size is exact.
    if not exporting() and pos_embed.shape[1] == height and pos_embed.shape[2] == width:
        return pos_embed
    wide = pos_embed if pos_embed.dtype == torch.float64 else pos_embed.float()
    resampled = F.interpolate(wide.permute(0, 3, 1, 2), size=[height, width], mode=mode)
    return resampled.permute(0, 2, 3, 1).to(pos_embed.dtype)


def _check_head(num_classes: int, global_pool: str, pools: tuple[str, ...], *rates: float) -> None:
    if num_classes < 0:
        raise ValueError(f"num_classes must not be negative, got {num_classes}")
    if global_pool not in pools:
        raise ValueError(f"unknown global_pool {global_pool!r}, expected one of {pools}")
    for rate in rates:
        if not isinstance(rate, Real) or not 0.0 <= rate < 1.0:
            raise ValueError(f"drop_rate and drop_path_rate must be numbers in [0, 1), got {rate!r}")

"""``SubquadBackbone``: a model of this library or of timm as the backbone of an OpenMMLab detector or segmentor."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import FUNCTIONS, MODELS
from timm.models import group_parameters
from torch import Tensor, nn

from subquad.backbones import weights
from subquad.backbones.base import Pyramid
from subquad.backbones.registry import check_any_model

# Norms behind the stages in the authors' detectors and segmentors: outnorm0, norm0 and extra_norms.0.
_OUT_NORM = re.compile(r"^(?:outnorm|norm|extra_norms\.)(\d+)\.(weight|bias)$")
_OURS = ("net", "out_norms")
_BLOCK = re.compile(r"(?:^|\.)blocks\.\d+$")


@MODELS.register_module()
class SubquadBackbone(BaseModule):
    """Feature maps of any model that has timm's ``forward_intermediates``, for the necks and heads of mmdet and mmseg.

    Args:
        model_name: a model of this library or of timm, or a name that ``timm.create_model`` takes (``hf-hub:...``).
        out_indices: stages (blocks of an isotropic model) whose maps are returned; what lies behind the last one, the
            classifier and the final norm are dropped, so that every parameter gets a gradient.
        pretrained: start training from the model's released weights.
        checkpoint: start training from this file instead: an official or converted one, of a classifier or of a
            detector or segmentor. It must hold every parameter of the model; norms behind stages may be absent.
        drop_path_rate: stochastic depth; None for the model's own.
        frozen_stages: -1 trains everything, 0 freezes the stem, n the stem and the first n stages (layers of the
            model's ``group_matcher(coarse=True)``).
        norm_eval: keep batch norms in evaluation mode.
        with_cp: recompute blocks in the backward pass instead of keeping their activations.
        out_norm: a LayerNorm of its own behind each returned map, as the authors of most hierarchical models have it.
        out_norm_eps: of these norms; by default the model says (``out_norm_eps``), or 1e-5.
        model_args: more arguments of ``timm.create_model``, such as ``dict(img_size=512)``.

    Attributes:
        channels, strides: of the returned maps, in the order of ``out_indices``.

    Raises:
        ValueError: for an unknown model, one without feature maps, or indices that it does not have.
        TypeError: for an argument that neither this class nor the model knows.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        *,
        pretrained: bool = False,
        checkpoint: str | None = None,
        drop_path_rate: float | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        out_norm: bool = False,
        out_norm_eps: float | None = None,
        model_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_start(model_name, pretrained, checkpoint)
        self.model_name = model_name
        self.pretrained = pretrained
        self.checkpoint = checkpoint
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.model_args = dict(model_args or {})

        self.net = _create(model_name, drop_path_rate=drop_path_rate, **self.model_args)
        self.out_indices = _check_indices(self.net, model_name, out_indices)
        info = [self.net.feature_info[i] for i in self.out_indices]
        self.channels = tuple(int(level["num_chs"]) for level in info)
        self.strides = tuple(int(level["reduction"]) for level in info)
        _prune(self.net, self.out_indices)
        if with_cp:
            self.net.set_grad_checkpointing(True)
        eps = getattr(self.net, "out_norm_eps", 1e-5) if out_norm_eps is None else out_norm_eps
        self.out_norms = nn.ModuleDict(
            {str(i): nn.LayerNorm(dim, eps=eps) for i, dim in zip(self.out_indices, self.channels, strict=True)}
            if out_norm
            else {}
        )
        for name, module in self.net.named_modules():
            module.is_block = bool(_BLOCK.search(name))  # see subquad_blocks
        self._frozen = self._parameters_of_stages(frozen_stages)
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(name not in self._frozen)
        self.register_load_state_dict_pre_hook(_adapt_checkpoint)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, C, H, W) to contiguous maps (B, channels[i], H / strides[i], W / strides[i])."""
        channels_last = isinstance(self.net, Pyramid)
        maps = self.net.forward_intermediates(
            x,
            indices=list(self.out_indices),
            output_fmt="NHWC" if channels_last else "NCHW",
            intermediates_only=True,
        )
        if not channels_last:
            maps = [y.permute(0, 2, 3, 1) for y in maps]
        if self.out_norms:
            maps = [self.out_norms[str(i)](y) for i, y in zip(self.out_indices, maps, strict=True)]
        # Operators of mmcv and the buckets of DDP expect memory in the order of the axes.
        return tuple(y.permute(0, 3, 1, 2).contiguous() for y in maps)

    def train(self, mode: bool = True) -> SubquadBackbone:
        """Training or evaluation mode, except for what is frozen: detectors call this at every epoch."""
        super().train(mode)
        if mode and self._frozen:
            for name, module in self.net.named_modules():
                inside = [f"{name}.{leaf}" if name else leaf for leaf, _ in module.named_parameters()]
                if inside and self._frozen.issuperset(inside):
                    module.eval()
        if mode and self.norm_eval:
            for module in self.net.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def init_weights(self) -> None:
        """Load ``checkpoint`` or the released weights; a Runner calls this once, when it starts to train.

        Without either, the weights stay as they are.

        Raises:
            FileNotFoundError, ValueError: see ``weights.read_checkpoint`` and ``weights.Difference``.
        """
        if self.checkpoint is not None:
            raw = weights.read_checkpoint(self.checkpoint)
            try:
                state_dict = self.named_as_here(weights.unwrap(raw, weights.wrapper_for(self.net, raw)))
            except ValueError as error:
                raise ValueError(f"{self.checkpoint}: {error}") from error
        elif self.pretrained:
            source = _create(self.model_name, pretrained=True, **self.model_args)
            state_dict = {f"net.{name}": value for name, value in source.state_dict().items()}
        else:
            return
        with torch.device("meta"):
            whole = _create(self.model_name, **self.model_args).state_dict()
        expected = self.state_dict()
        dropped = {f"net.{name}" for name in whole} - set(expected)
        state_dict = {name: value for name, value in state_dict.items() if name not in dropped}
        new = {name for name in expected if name.startswith("out_norms.") and name not in state_dict}
        needed = {name: value for name, value in expected.items() if name not in new}
        if difference := weights.compare(state_dict, needed):
            raise ValueError(f"{self.checkpoint or 'the released file'} does not fit {self.model_name}:\n{difference}")
        print_log(f"{self.model_name}: loaded {len(state_dict)} tensors, new: {sorted(new) or 'none'}", "current")
        self.load_state_dict(expected | state_dict)

    def named_as_here(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a backbone under the names of this module; official names are mapped, our own pass unchanged."""
        if all(name.split(".")[0] in _OURS for name in state_dict):
            return dict(state_dict)
        mapped: dict[str, Tensor] = {}
        rest: dict[str, Tensor] = {}
        own = self.net.state_dict()
        for name, value in state_dict.items():
            if (found := _OUT_NORM.match(name)) and name not in own:
                mapped[f"out_norms.{found[1]}.{found[2]}"] = value
            else:
                rest[name] = value
        try:
            filter_fn = weights.filter_of(self.net)
        except TypeError:  # one of timm's models whose weights need no mapping
            filter_fn = None
        rest = filter_fn(rest, self.net) if filter_fn is not None else rest
        return {f"net.{name}": value for name, value in rest.items()} | mapped

    def layers(self, coarse: bool) -> dict[str, int]:
        """Number of the layer (``coarse``: stage) of each parameter of ``net``, from the stem's 0 on.

        Raises:
            ValueError: some models of timm do not state it.
        """
        if not hasattr(self.net, "group_matcher"):
            raise ValueError(
                f"{self.model_name!r} has no group_matcher, which says to which layer a parameter belongs:"
                " frozen_stages and SubquadLayerDecay need it"
            )
        return group_parameters(self.net, self.net.group_matcher(coarse=coarse), reverse=True)

    def _parameters_of_stages(self, frozen_stages: int) -> frozenset[str]:
        if frozen_stages == -1:
            return frozenset()
        layer_of = self.layers(coarse=True)
        last = max(layer_of.values())
        if not -1 <= frozen_stages <= last:
            raise ValueError(f"frozen_stages must be -1 (none) to {last} (all), got {frozen_stages}")
        return frozenset(name for name, layer in layer_of.items() if layer <= frozen_stages)


@FUNCTIONS.register_module()
def subquad_blocks(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """Policy of FSDP that shards each block of a ``SubquadBackbone`` as one unit, and all else together."""
    return recurse or getattr(module, "is_block", False)


def _adapt_checkpoint(backbone: SubquadBackbone, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before weights are loaded: bring those of the backbone to our names; what does not fit is an error.

    mmengine itself would load what fits and only log the rest.
    """
    if is_sharded(backbone):
        return  # FSDP compares for itself, and its state dict is a collective call
    names = [name for name in state_dict if name.startswith(prefix)]
    expected = backbone.state_dict()
    found = backbone.named_as_here({name.removeprefix(prefix): state_dict[name] for name in names})
    if difference := weights.compare(found, expected):
        where = f"under {prefix!r}" if prefix else "in the checkpoint"
        raise ValueError(f"the weights {where} do not fit {backbone.model_name}:\n{difference}")
    for name in names:
        del state_dict[name]
    state_dict.update({prefix + name: value for name, value in found.items()})


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP has wrapped modules inside, whose parameters are then flat pieces under other names."""
    return any("_fsdp_wrapped_module" in name for name, _ in module.named_modules())


def _create(name: str, **options: Any) -> Any:
    return timm.create_model(name, **options)


def _check_start(model_name: str, pretrained: bool, checkpoint: str | None) -> None:
    if not isinstance(pretrained, bool):
        raise TypeError(f"pretrained must be True or False, got {pretrained!r}: a file goes to checkpoint")
    if pretrained and checkpoint is not None:
        raise ValueError("pretrained and checkpoint exclude each other: both say where to start from")
    check_any_model(model_name, pretrained)


def _check_indices(model: nn.Module, name: str, out_indices: Sequence[int]) -> tuple[int, ...]:
    if not hasattr(model, "forward_intermediates") or not hasattr(model, "feature_info"):
        raise ValueError(f"{name!r} gives no feature maps: it has no forward_intermediates")
    levels = len(model.feature_info)  # type: ignore[arg-type]
    indices = tuple(out_indices)
    if not indices or list(indices) != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= levels:
        raise ValueError(f"out_indices must rise within 0 to {levels - 1}, the levels of {name!r}, got {indices}")
    return indices


def _prune(model: Any, out_indices: Sequence[int]) -> None:
    """Drop what no map needs: DDP waits for the gradient of every parameter."""
    model.prune_intermediate_layers(list(out_indices), prune_norm=True, prune_head=True)
    classifiers = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    for name in [classifiers] if isinstance(classifiers, str) else classifiers:
        setattr(model, name.split(".")[0], nn.Identity())  # timm before 1.0.31 leaves the norm in some heads

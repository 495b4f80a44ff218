"""Which parameters learn how fast and are decayed: few groups for the optimizer, learning rates by layer."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from subquad.heads.openmmlab.backbone import SubquadBackbone, is_sharded

_KEYS = {"decay_rate", "decay_type"}
_TYPES = ("layer_wise", "stage_wise")


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class SubquadParamGroups(DefaultOptimWrapperConstructor):
    """mmengine's rules (``paramwise_cfg``), with one group for all parameters of the same options.

    mmengine makes a group of each tensor, and an optimizer then runs its kernels for each.
    """

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, prefix: str = "", **options: Any) -> None:
        """Append the groups of ``module``'s parameters to ``params``; calls itself for the modules inside."""
        super().add_params(params, module, prefix=prefix, **options)
        if prefix:
            return
        merged: dict[tuple[tuple[str, Any], ...], list[nn.Parameter]] = defaultdict(list)
        for group in params:
            merged[tuple(sorted((key, value) for key, value in group.items() if key != "params"))] += group["params"]
        params[:] = [dict(options, params=members) for options, members in merged.items()]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class SubquadLayerDecay(DefaultOptimWrapperConstructor):
    """Layer-wise learning-rate decay (arXiv 2106.08254) for any ``SubquadBackbone`` in a model.

        optim_wrapper = dict(
            optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05),
            constructor="SubquadLayerDecay",
            paramwise_cfg=dict(decay_rate=0.9, decay_type="layer_wise"))

    Layers are those of the model's ``group_matcher``: of L layers, stem included, layer i learns at
    ``lr * decay_rate ** (L - i)``; norms behind stages, necks and heads at ``lr``. ``decay_type`` "stage_wise" counts
    stages instead of blocks. Vectors, biases and what the model's ``no_weight_decay`` names are not decayed. Parameters
    of one rate and decay form one group.

    Raises:
        ValueError: for an unknown key, a rate outside (0, 1], a model without a ``SubquadBackbone`` or behind FSDP, or
            a backbone of timm without ``group_matcher``.
    """

    def _validate_cfg(self) -> None:
        rate, kind = self.paramwise_cfg.get("decay_rate"), self.paramwise_cfg.get("decay_type", "layer_wise")
        if unknown := set(self.paramwise_cfg) - _KEYS:
            raise ValueError(f"paramwise_cfg of SubquadLayerDecay takes {sorted(_KEYS)}, got {sorted(unknown)}")
        if rate is None or not 0 < rate <= 1:
            raise ValueError(f"decay_rate must be in (0, 1], got {rate}")
        if kind not in _TYPES:
            raise ValueError(f"decay_type must be one of {_TYPES}, got {kind!r}")

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **_: Any) -> None:
        """Append the groups of ``module``'s trainable parameters to ``params``."""
        scales, fixed = self._scales_and_fixed(module)
        groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = defaultdict(list)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                plain = parameter.ndim <= 1 or name.endswith(".bias") or name in fixed
                groups[scales.get(name, 1.0), 0.0 if plain else self.base_wd or 0.0].append((name, parameter))
        for (scale, decay), members in sorted(groups.items(), key=lambda item: item[0]):
            names = [name for name, _ in members]
            lr = self.base_lr * scale
            print_log(f"lr {lr:.3g} (x {scale:.3g}), weight decay {decay:g}: {', '.join(names)}", "current")
            group = {"params": [parameter for _, parameter in members], "lr": lr, "weight_decay": decay}
            params.append(group | {"lr_scale": scale, "param_names": names})

    def _scales_and_fixed(self, module: nn.Module) -> tuple[dict[str, float], set[str]]:
        """Factor on the learning rate, and names without weight decay, of the parameters of backbones."""
        rate = self.paramwise_cfg["decay_rate"]
        coarse = self.paramwise_cfg.get("decay_type") == "stage_wise"
        backbones = [(name, part) for name, part in module.named_modules() if isinstance(part, SubquadBackbone)]
        if is_sharded(module):
            raise ValueError("SubquadLayerDecay cannot tell vectors from matrices behind FSDP: use DDP")
        if not backbones:
            raise ValueError(f"SubquadLayerDecay found no SubquadBackbone in {type(module).__name__}")
        scales: dict[str, float] = {}
        fixed: set[str] = set()
        for path, backbone in backbones:
            prefix = f"{path}.net." if path else "net."
            layer_of = backbone.layers(coarse)
            layers = max(layer_of.values()) + 1
            scales |= {prefix + name: rate ** (layers - layer) for name, layer in layer_of.items()}
            if hasattr(backbone.net, "no_weight_decay"):  # convolutional models of timm have only matrices and vectors
                fixed |= {prefix + name for name in backbone.net.no_weight_decay()}
        return scales, fixed

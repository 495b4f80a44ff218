"""Norms that are affine maps at inference: progressive re-parameterised batch norm.

SLAB, arXiv 2405.11582, section 3.1, https://github.com/xinghaochen/SLAB. During training a layer norm hands over to a
batch norm with a scaled identity beside it; in the end ``hosts.folding`` merges these into the layers next to them.
"""

# Annotations are not postponed: torch.fx copies those of forward() into code that TorchScript has to understand.

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from subquad.backbones.base import Factory

NORMS = ("layer", "repbn", "prepbn")
"""LayerNorm, ``RepNorm`` and ``ProgressiveNorm``."""


class RepNorm(nn.Module):
    """Re-parameterised batch norm of the last axis, BN(x) + alpha x (equation 5), of (*, dim)."""

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
        self.bn = nn.BatchNorm1d(dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """The identity counts in full at the start; the batch norm resets itself."""
        nn.init.ones_(self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x.flatten(0, -2)).view_as(x) + self.alpha * x


class ProgressiveNorm(nn.Module):
    """Layer norm at the start of training, ``RepNorm`` at its end and in eval mode, of (*, dim) (equation 4).

    A step is a call in training mode: accumulated gradients, and recomputation by checkpointing, count too.

    Args:
        dim: channels.
        eps: of the layer norm.
        steps: calls until the layer norm has no part any more; 4/5 of all iterations, say the authors.
        warm_up: calls before these, with the layer norm alone; the batch norm takes no statistics from them.
        start: weight of the layer norm at the first step.

    Raises:
        ValueError: for no steps or a negative warm-up.
    """

    warm: Tensor
    iter: Tensor
    total_step: Tensor

    def __init__(
        self,
        dim: int,
        eps: float,
        steps: int,
        warm_up: int = 0,
        start: float = 1.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if steps < 1 or warm_up < 0:
            raise ValueError(f"steps must be positive and warm_up not negative, got steps={steps}, warm_up={warm_up}")
        dd = {"device": device, "dtype": dtype}
        self.steps, self.warm_up, self.start = steps, warm_up, start
        self.norm1 = nn.LayerNorm(dim, eps=eps, **dd)
        self.norm2 = RepNorm(dim, **dd)
        for name, value in {"warm": warm_up, "iter": steps, "total_step": steps}.items():
            self.register_buffer(name, torch.tensor(value, device=device))

    def reset_parameters(self) -> None:
        """All steps are to come."""
        self.warm.fill_(self.warm_up)
        self.iter.fill_(self.steps)
        self.total_step.fill_(self.steps)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.norm2(x)
        # Without a warm-up nothing is asked of the device, which would have to finish first.
        if self.warm_up > 0 and int(self.warm) > 0:
            self.warm.sub_(1)
            return self.norm1(x)
        share = self.start * self.iter / self.total_step
        self.iter.sub_((self.iter > 0).to(self.iter.dtype))
        return share * self.norm1(x) + (1 - share) * self.norm2(x)


class ChannelAffine(nn.Module):
    """a x + b for each channel of (*, dim): what is left of a norm that could not be folded."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, x, self.weight)


def affine_of(norm: RepNorm | ProgressiveNorm) -> tuple[Tensor, Tensor]:
    """a and b, each (dim,) in float64, of the affine map a x + b that the norm is in eval mode."""
    rep = norm.norm2 if isinstance(norm, ProgressiveNorm) else norm
    bn = rep.bn
    mean, var = bn.running_mean, bn.running_var
    if mean is None or var is None:
        raise ValueError("a batch norm without running statistics is no affine map")
    scale = bn.weight.double() * (var.double() + bn.eps).rsqrt()
    return scale + rep.alpha.double(), bn.bias.double() - scale * mean.double()


def find_norm(name: str, eps: float, steps: int) -> Factory:
    """The norm of that name, called as ``norm(dim, device=, dtype=)``.

    Args:
        name: one of ``NORMS``.
        eps: of the layer norm.
        steps: of ``ProgressiveNorm``.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in NORMS:
        raise ValueError(f"unknown norm {name!r}, expected one of {NORMS}")
    if name == "repbn":
        return RepNorm
    return partial(nn.LayerNorm, eps=eps) if name == "layer" else partial(ProgressiveNorm, eps=eps, steps=steps)


# Weights ---------------------------------------------------------------------------------------------------------

_REP = ("alpha", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked")
_PROGRESSIVE = ("norm1.weight", "norm1.bias", "warm", "iter", "total_step")


def fit_norms(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Norms in the form of the model: files hold ``ProgressiveNorm`` as trained, or the ``RepNorm`` that is left of it.

    What the latter lacks of the former has no part in eval mode and is taken from ``expected``.
    """
    fitted = dict(state)
    for name in [name for name in expected if name.endswith("alpha")]:
        slot = name.removesuffix("norm2.alpha")
        # The second norm of a block is called norm2 too.
        progressive = f"{slot}total_step" in expected
        slot = slot if progressive else name.removesuffix("alpha")
        source, target = (slot, f"{slot}norm2.") if progressive else (f"{slot}norm2.", slot)
        if f"{source}alpha" not in state:
            continue
        for leaf in _REP:
            if f"{source}{leaf}" in state:
                fitted[f"{target}{leaf}"] = fitted.pop(f"{source}{leaf}")
        for leaf in _PROGRESSIVE:
            if progressive:
                fitted[f"{slot}{leaf}"] = expected[f"{slot}{leaf}"]
            else:
                fitted.pop(f"{slot}{leaf}", None)
    return fitted

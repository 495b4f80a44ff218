"""Progressive re-parameterised batch norm: what the recorded cases of tests/parity do not say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from subquad.backbones.hosts import pvt
from subquad.backbones.hosts.cswin import MixerCSWin
from subquad.backbones.hosts.deit import MixerDeiT
from subquad.backbones.hosts.folding import fold_norms
from subquad.backbones.hosts.pvt import MixerPVT
from subquad.backbones.hosts.pvt_v2 import MixerPVT2
from subquad.backbones.hosts.swin import MixerSwin
from subquad.backbones.prepbn import ChannelAffine, ProgressiveNorm, RepNorm, fit_norms

SWIN: dict[str, Any] = {"depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "embed_dim": 8, "img_size": 96}
PVT: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 2), "img_size": 96}
CSWIN: dict[str, Any] = {"depths": (1, 1, 2, 1), "num_heads": (2, 2, 2, 4), "embed_dim": 8, "img_size": 96}
DEIT: dict[str, Any] = {"dim": 16, "num_heads": 2, "depth": 2, "patch_size": 8, "img_size": 64}


def _host(kind: str, mixer: str, norm: str, **options: Any) -> nn.Module:
    """In float64 and eval mode, with norms as after some training, in which no part is trivial."""
    torch.manual_seed(0)
    model: nn.Module
    if kind == "swin":
        model = MixerSwin(mixer, (1, 1, 0, 0), window_size=3, norm=norm, **SWIN)
    elif kind == "cswin":
        model = MixerCSWin(mixer, (1, 0, 1, 0), stripes=(1, 2, 4), norm=norm, **CSWIN, **options)
    elif kind == "pvt_v2":
        model = MixerPVT2(mixer, mlp_ratios=(2, 2, 2, 2), norm=norm, **PVT)
    elif kind == "pvt":
        model = MixerPVT(mixer, mlp_ratios=(2, 2, 2, 2), norm=norm, **PVT, **options)
    else:
        model = MixerDeiT(mixer, norm=norm, **DEIT, **options)
    model = model.double().eval()
    for module in model.modules():
        if isinstance(module, RepNorm):
            for value in (module.alpha, module.bn.weight, module.bn.bias, module.bn.running_mean):
                nn.init.normal_(value, 0.5, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.bn.running_var, 0.2, 3)  # type: ignore[arg-type]
        elif isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias)
    return model


HOSTS: list[tuple[str, str, str, dict[str, Any], int]] = [
    # what is left of 4 blocks' norms: the last norm, and the first norm of the blocks with windows
    ("swin", "slab", "prepbn", {}, 1 + 3),
    ("swin", "inline", "repbn", {}, 1 + 5),
    ("pvt", "slab", "prepbn", {}, 0),
    ("pvt_v2", "slab", "prepbn", {}, 4),
    ("pvt", "slab", "repbn", {"mixer_stages": (False, True, False, False)}, 0),
    ("deit", "slab", "prepbn", {"class_token": False}, 1),
    ("deit", "softmax", "repbn", {}, 1),
    ("deit", "agent", "repbn", {"agents": (9, None)}, 1),
    ("deit", "inline", "repbn", {}, 1 + 2),
    ("cswin", "slab", "prepbn", {"mixer_stripes": (0, 0, 4, 0)}, 1),
    ("cswin", "inline", "repbn", {}, 1),
]


@pytest.mark.parametrize(("kind", "mixer", "norm", "options", "left"), HOSTS)
def test_folding_is_exact_at_any_size(kind: str, mixer: str, norm: str, options: dict[str, Any], left: int) -> None:
    model = _host(kind, mixer, norm, **options)
    folded = fold_norms(copy.deepcopy(model))
    assert not any(isinstance(module, RepNorm | ProgressiveNorm | nn.BatchNorm1d) for module in folded.modules())
    assert sum(isinstance(module, ChannelAffine) for module in folded.modules()) == left
    with torch.no_grad():
        for size in ((96, 96), (64, 160), (45, 101)):
            x = torch.randn(2, 3, *size, dtype=torch.float64)
            expected, actual = model.forward_features(x), folded.forward_features(x)  # type: ignore[operator]
            # Rounding of float64, which norms that scale up and a division by a sum carry on.
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_what_cannot_be_folded() -> None:
    with pytest.raises(ValueError, match="eval mode"):
        fold_norms(_host("deit", "softmax", "repbn").train())
    with pytest.raises(ValueError, match="MixerDeiT has no batch norms to fold"):
        fold_norms(_host("deit", "softmax", "layer"))


def test_bad_norms() -> None:
    with pytest.raises(ValueError, match=r"unknown norm 'group', expected one of \('layer', 'repbn', 'prepbn'\)"):
        _host("pvt", "slab", "group")
    with pytest.raises(ValueError, match="steps=0"):
        ProgressiveNorm(4, 1e-6, steps=0)
    with pytest.raises(ValueError, match="warm_up=-1"):
        ProgressiveNorm(4, 1e-6, steps=1, warm_up=-1)


def test_statistics_are_over_all_pixels_of_a_map() -> None:
    norm, x = RepNorm(6), 3 * torch.randn(2, 5, 7, 6) + 1
    y = norm(x)
    expected = nn.functional.batch_norm(x.permute(0, 3, 1, 2), None, None, training=True).permute(0, 2, 3, 1) + x
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(norm.bn.running_mean, 0.1 * x.mean((0, 1, 2)))


def test_layer_norm_hands_over_to_batch_norm() -> None:
    """From all to nothing, in equal steps, of which each call in training mode is one and a call in eval mode none."""
    norm, x = ProgressiveNorm(6, 1e-6, steps=4), torch.randn(2, 5, 6)
    layer, rep = copy.deepcopy(norm.norm1), copy.deepcopy(norm.norm2)
    for share in (1.0, 0.75, 0.5, 0.25, 0.0, 0.0):
        torch.testing.assert_close(norm(x), share * layer(x) + (1 - share) * rep(x))
        norm.eval()(x)
        norm.train()
    torch.testing.assert_close(norm.eval()(x), rep.eval()(x))


@pytest.mark.parametrize(("held", "wanted"), [("prepbn", "repbn"), ("repbn", "prepbn")])
def test_files_may_hold_either_form(held: str, wanted: str) -> None:
    """Trained with a layer norm, or with that taken out: the same in eval mode."""
    source, target = _host("pvt", "slab", held), _host("pvt", "slab", wanted)
    target.load_state_dict(pvt.checkpoint_filter_fn(source.state_dict(), target))
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(target(x), source(x))


def test_own_checkpoints_keep_their_counters() -> None:
    """Training goes on where it stopped."""
    norm = ProgressiveNorm(6, 1e-6, steps=4)
    norm(torch.randn(2, 6))
    state: dict[str, Tensor] = {f"norm.{name}": value for name, value in norm.state_dict().items()}
    fresh = {f"norm.{name}": value for name, value in ProgressiveNorm(6, 1e-6, steps=9).state_dict().items()}
    fitted = fit_norms(state, fresh)
    assert fitted.keys() == state.keys()
    assert (int(fitted["norm.iter"]), int(fitted["norm.total_step"])) == (3, 4)

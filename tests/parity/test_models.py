"""Every recorded model case and every manifest, through the family's ``checkpoint_filter_fn`` as a checkpoint goes.

Upstream's weights enter the filter under upstream's names as leaves of the autograd graph: whatever the filter does to
them (rename, reshape, split), gradients come out under upstream's names again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.backbones import weights
from subquad.backbones.base import Isotropic


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """No TF32, so that a run on a GPU host means the same."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)


def _split_norms(case: Any, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The classification model's weights, and those of the norms that only a detection backbone has."""
    norms = {name: value for name, value in state.items() if re.match(case.system.OUTPUT_NORM, name)}
    return {name: value for name, value in state.items() if name not in norms}, norms


_COUNTERS = (".num_batches_tracked", ".warm", ".iter", ".total_step")


def _convert(model: nn.Module, state: dict[str, Tensor], absent: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Upstream's weights under our names; recorded states lack counters of batch norms and what ``absent`` starts."""
    converted = weights.filter_of(model)(state, model)
    own = model.state_dict()
    left = {name for name in own if name.startswith(absent) or name.endswith(_COUNTERS)}
    converted = {name: own[name] for name in left} | converted
    assert not (difference := weights.compare(converted, own)), str(difference)
    return converted


def _prepare(case: Any, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """The model in eval mode with the case's weights, the recorded tensors, and the detection norms."""
    state, norms = _split_norms(case, case.state())
    model = case.build().to(dtype).eval()
    backbone_only = not any(re.match(case.system.CLASSIFIER, name) for name in state)
    absent = ("norm.", "head.") if backbone_only else ()
    model.load_state_dict(_convert(model, {name: value.to(dtype) for name, value in state.items()}, absent))
    return model, case.tensors(), {name: value.to(dtype) for name, value in norms.items()}


def _as_recorded(value: Tensor, reference: Tensor) -> Tensor:
    """A channels-last map as NCHW or as tokens (B, N, C), whichever was recorded."""
    if value.dim() == 4 and reference.dim() == 3:
        return value.flatten(1, 2)
    if value.shape != reference.shape and value.dim() == 4:
        return value.permute(0, 3, 1, 2)
    return value


@torch.no_grad()
def _compare_outputs(case: Any, dtype: torch.dtype, check: Callable[..., None]) -> None:
    model, recorded, norms = _prepare(case, dtype)
    seen: dict[str, Tensor] = {}
    activated = set()  # outputs that were recorded in front of the activation that ours come behind
    for name, module in case.system.probes(model).items():
        key = name if name.startswith("out/") else f"probe/{name}"
        if getattr(module, "activation", "none") == "silu":
            activated.add(key)
        # an AddLayerNorm gives its sum too
        module.register_forward_hook(
            lambda _module, _args, output, key=key: seen.update({key: output[-1] if type(output) is tuple else output})
        )
    for name, module in getattr(case.system, "taps", lambda model: {})(model).items():
        # permuted here, because a map of as many channels as pixels a side does not show its layout
        module.register_forward_hook(
            lambda _module, args, _output, name=name: seen.update({name: args[0].permute(0, 3, 1, 2)})
        )
    image = recorded["input"].to(dtype)
    seen["out/logits"] = model(image)
    maps = _stage_maps(model, image, recorded, _by_stage(case.system, norms))
    if hasattr(case.system, "outputs"):
        maps = case.system.outputs(model, image, maps)
    elif isinstance(model, Isotropic):
        maps = {}
    seen |= {f"out/{name}": value for name, value in maps.items()}
    compared = set()
    for whole in [key.removesuffix("_triple") for key in recorded if key.endswith("_triple")]:
        mean_std, first = recorded[f"{whole}_triple"].split([2, 64])  # of a full-size map
        check(case, f"{whole}/mean_std", torch.stack([seen[whole].mean(), seen[whole].std()]), mean_std)
        check(case, f"{whole}/first64", seen[whole].flatten()[:64], first)
        compared.add(f"{whole}_triple")
    for key in seen.keys() & recorded.keys():
        expected = F.silu(recorded[key]) if key in activated else recorded[key]
        check(case, key, _as_recorded(seen[key], expected), expected)
        compared.add(key)
    left = {key for key in recorded if key.startswith("out/")} - compared
    assert not left, f"recorded outputs that nothing was compared with: {sorted(left)}"


def _stage_maps(model: Any, image: Tensor, recorded: Any, norms: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    """What most systems record: the map of each stage, and the same behind a detection backbone's norm."""
    stages = model.forward_intermediates(image, intermediates_only=True)
    maps = {f"stage{i}_norm" if f"out/stage{i}_norm" in recorded else f"stage{i}": x for i, x in enumerate(stages)}
    for i, norm in norms.items():
        tokens = stages[i].permute(0, 2, 3, 1)
        eps = getattr(model, "out_norm_eps", 1e-5)
        normed = F.layer_norm(tokens, tokens.shape[-1:], norm["weight"], norm["bias"], eps=eps)
        maps[f"det{i}"] = maps[f"normed{i}"] = normed.permute(0, 3, 1, 2)
    return maps


def _by_stage(system: Any, norms: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    stages: dict[int, dict[str, Tensor]] = {}
    for name, value in norms.items():
        match = re.match(system.OUTPUT_NORM, name)
        assert match is not None
        stages.setdefault(int(match["i"]), {})[name[match.end() :]] = value
    return stages


def test_outputs(case: Any, assert_recorded: Callable[..., None]) -> None:
    """Stage maps, module outputs, detection features and logits in float32."""
    _compare_outputs(case, torch.float32, assert_recorded)


@pytest.mark.cases(where=lambda case: case.sidecar["weights"] == "stored")
def test_outputs_in_float64(case: Any, assert_recorded: Callable[..., None]) -> None:
    _compare_outputs(case, torch.float64, assert_recorded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.cases(where=lambda case: case.has_gradients)
def test_gradients(case: Any, dtype: torch.dtype, assert_recorded: Callable[..., None]) -> None:
    """The gradient of the image and of every one of upstream's parameters."""
    state, _ = _split_norms(case, case.state())
    leaves = {name: value.to(dtype).requires_grad_(not _is_statistic(name)) for name, value in state.items()}
    model = case.build().to(dtype).eval()
    recorded = case.tensors()
    image = recorded["input"].to(dtype).requires_grad_()
    logits = torch.func.functional_call(model, _convert(model, leaves), (image,))
    (logits * recorded["cotangent"]).sum().backward()

    mine = {f"grad/{name}": leaf.grad for name, leaf in leaves.items()} | {"grad/input": image.grad}
    expected = {name for name in recorded if name.startswith("grad/")}
    unused = {f"grad/{name}" for name in case.sidecar.get("params_without_gradient", ())}
    assert {name for name, grad in mine.items() if grad is not None} == expected - unused
    assert not any(recorded[key].any() for key in expected & unused)
    for key in sorted(expected - unused):
        assert_recorded(case, key, mine[key], recorded[key])


def _is_statistic(name: str) -> bool:
    return name.endswith((".running_mean", ".running_var"))


def _on_meta(manifest: Any) -> dict[str, Tensor]:
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, (shape, dtype) in manifest.entries.items()
    }


def _model_of(manifest: Any) -> nn.Module:
    system = manifest.system
    assert manifest.name in system.MANIFESTS, f"no row for manifest {manifest.name} in {system.__name__}.MANIFESTS"
    return timm.create_model(system.MANIFESTS[manifest.name], device="meta")


def test_manifest(manifest: Any) -> None:
    """Names, shapes and the number of parameters of a released variant."""
    model = _model_of(manifest)
    _convert(model, _on_meta(manifest))
    surplus = getattr(manifest.system, "SURPLUS", {}).get(manifest.name, 0)
    assert sum(parameter.numel() for parameter in model.parameters()) + surplus == manifest.total


@pytest.mark.cases(where=lambda manifest: manifest.related("backbone_extra"))
def test_manifest_of_detection_backbone(manifest: Any) -> None:
    """The model without its classifier and with a norm for each stage; its checkpoint says ``backbone.``"""
    model, system, extra = _model_of(manifest), manifest.system, manifest.related("backbone_extra")
    norms = _by_stage(system, _on_meta(extra))
    channels = {i: (info["num_chs"],) for i, info in enumerate(model.feature_info)}
    assert {i: tuple(norm["weight"].shape) for i, norm in norms.items()} == channels
    assert {i: tuple(norm["bias"].shape) for i, norm in norms.items()} == channels

    backbone = {name: value for name, value in _on_meta(manifest).items() if not re.match(system.CLASSIFIER, name)}
    backbone |= _on_meta(extra)
    assert sum(value.numel() for value in backbone.values()) == extra.total
    checkpoint = {"meta": {}, "state_dict": {f"backbone.{name}": value for name, value in backbone.items()}}
    difference = weights.compare(weights.filter_of(model)(checkpoint, model), model.state_dict())
    assert all(name.startswith(("norm.", "head.")) for name in difference.missing)
    assert not difference.unexpected and not difference.misshaped, str(difference)


@pytest.mark.cases(where=lambda manifest: manifest.related("legacy_names"))
def test_legacy_names(manifest: Any, fill_rule: Callable[..., Any]) -> None:
    """A checkpoint under the names of an older release gives the same weights, hence the same logits."""
    model, legacy = _model_of(manifest), manifest.related("legacy_names")
    values = {name: torch.from_numpy(fill_rule(name, shape)) for name, (shape, _) in manifest.entries.items()}
    renamed = weights.rename(values, manifest.system.LEGACY_NAMES)
    assert {name: tuple(value.shape) for name, value in renamed.items()} == {
        name: shape for name, (shape, _) in legacy.entries.items()
    }
    current, older = _convert(model, values), _convert(model, renamed)
    assert older.keys() == current.keys()
    for name, value in current.items():
        assert torch.equal(older[name], value), name


def test_system_is_implemented(unknown_system: str) -> None:
    pytest.skip(f"system {unknown_system} is not implemented")


def test_every_manifest_has_a_model(unclaimed_manifests: list[str]) -> None:
    pytest.skip(f"no implemented system has the models of {', '.join(unclaimed_manifests)}")

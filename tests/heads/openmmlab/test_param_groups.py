"""Which parameter learns how fast and is decayed: ``SubquadLayerDecay`` and ``SubquadParamGroups``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

pytest.importorskip("mmengine", reason='needs mmengine: pip install "subquad[mm]"')

from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper

from subquad.heads.openmmlab import SubquadBackbone

LR, DECAY = 1e-3, 0.05


class Detector(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = nn.Linear(4, 4)


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What goes to the current logger."""
    logger = MMLogger.get_current_instance()
    lines: list[str] = []

    class Handler(type(logger.handlers[0])):  # type: ignore[misc]
        def emit(self, record: Any) -> None:
            lines.append(record.getMessage())

    handler = Handler()
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def _groups(model: nn.Module, **paramwise: Any) -> dict[str, dict[str, Any]]:
    """Options of the group of each parameter."""
    optimizer = {"type": "AdamW", "lr": LR, "weight_decay": DECAY}
    cfg = {"optimizer": optimizer, "constructor": "SubquadLayerDecay", "paramwise_cfg": paramwise}
    wrapper = build_optim_wrapper(model, cfg)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in wrapper.optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert names[id(parameter)] == name and name not in found
            found[name] = group
    return found


def test_layers_of_a_pyramid(logged: list[str]) -> None:
    """``test_vmamba`` has a stem and 1, 1, 2 and 1 blocks: six layers below the norms behind the stages."""
    model = Detector(SubquadBackbone("test_vmamba", out_norm=True))
    groups = _groups(model, decay_rate=0.5)
    layers = {
        "backbone.net.stem.conv1.weight": 0,
        "backbone.net.stages.0.blocks.0.mlp.fc1.weight": 1,
        "backbone.net.stages.1.downsample.conv.weight": 2,
        "backbone.net.stages.1.blocks.0.mixer.in_proj.weight": 2,
        "backbone.net.stages.2.blocks.0.mixer.A_log": 3,
        "backbone.net.stages.2.blocks.1.mixer.A_log": 4,
        "backbone.net.stages.3.blocks.0.mixer.conv.weight": 5,
        "neck.weight": 6,
    }
    for name, layer in layers.items():
        assert groups[name]["lr"] == pytest.approx(LR * 0.5 ** (6 - layer)), name
        assert groups[name]["weight_decay"] == DECAY, name
    assert groups["backbone.out_norms.0.weight"]["lr"] == LR
    undecayed = {"backbone.net.stem.conv1.bias", "backbone.out_norms.0.weight", "neck.bias"}
    undecayed.add("backbone.net.stages.2.blocks.0.mixer.D")  # a matrix that no_weight_decay names
    assert {groups[name]["weight_decay"] for name in undecayed} == {0.0}

    assert set(groups) == {name for name, _ in model.named_parameters()}
    assert len({id(group) for group in groups.values()}) == 7 * 2
    printed = [line for line in logged if line.startswith("lr ")]
    assert len(printed) == 7 * 2
    assert any("(x 0.0156), weight decay 0.05" in line and "stem.conv1.weight" in line for line in printed)


def test_stages_instead_of_blocks() -> None:
    groups = _groups(Detector(SubquadBackbone("test_vmamba")), decay_rate=0.5, decay_type="stage_wise")
    scale = {name: group["lr"] / LR for name, group in groups.items()}
    assert scale["backbone.net.stages.2.blocks.0.mixer.A_log"] == pytest.approx(0.25)
    assert scale["backbone.net.stages.2.blocks.1.mixer.A_log"] == pytest.approx(0.25)
    assert scale["backbone.net.stem.conv1.weight"] == pytest.approx(0.5**5)


def test_isotropic_model_of_timm() -> None:
    """Position embedding and class token with the stem, and without weight decay."""
    backbone = SubquadBackbone("test_vit", (5,), model_args={"dynamic_img_size": True})
    groups = _groups(Detector(backbone), decay_rate=0.8)
    for name in ("pos_embed", "cls_token"):
        assert groups[f"backbone.net.{name}"]["lr"] == pytest.approx(LR * 0.8**7)
        assert groups[f"backbone.net.{name}"]["weight_decay"] == 0
    assert groups["backbone.net.blocks.5.attn.qkv.weight"]["lr"] == pytest.approx(LR * 0.8)


@pytest.mark.parametrize(
    ("name", "indices", "first", "last"),
    [
        ("test_convnext", (0, 1, 2, 3), "stem.0.weight", "stages.3.blocks.0.mlp.fc1.weight"),
        ("test_resnet", (1, 2, 3, 4), "conv1.0.weight", "layer4.0.conv1.weight"),
    ],
)
def test_convolutional_models_of_timm(name: str, indices: tuple[int, ...], first: str, last: str) -> None:
    """They have no ``no_weight_decay``: vectors and biases alone are not decayed."""
    model = Detector(SubquadBackbone(name, indices))
    groups = _groups(model, decay_rate=0.5, decay_type="stage_wise")
    layers = 5  # the stem and four stages
    assert groups[f"backbone.net.{first}"]["lr"] == pytest.approx(LR * 0.5**layers)
    assert groups[f"backbone.net.{last}"]["lr"] == pytest.approx(LR * 0.5)
    for parameter_name, parameter in model.named_parameters():
        assert (groups[parameter_name]["weight_decay"] == 0) == (parameter.ndim == 1), parameter_name


def test_model_without_layers() -> None:
    with pytest.raises(ValueError, match="'poolformer_s12' has no group_matcher"):
        _groups(Detector(SubquadBackbone("poolformer_s12")), decay_rate=0.9)
    with pytest.raises(ValueError, match="'poolformer_s12' has no group_matcher"):
        SubquadBackbone("poolformer_s12", frozen_stages=1)


def test_frozen_parameters_are_left_out() -> None:
    groups = _groups(Detector(SubquadBackbone("test_vmamba", frozen_stages=1)), decay_rate=0.5)
    assert not any(name.startswith(("backbone.net.stem", "backbone.net.stages.0")) for name in groups)


@pytest.mark.parametrize(
    ("paramwise", "message"),
    [
        ({"decay_rate": 0}, r"decay_rate must be in \(0, 1\], got 0"),
        ({"decay_type": "stage_wise"}, "decay_rate must be"),
        ({"decay_rate": 0.9, "decay_type": "blockwise"}, "decay_type must be one of"),
        ({"decay_rate": 0.9, "num_layers": 12}, r"got \['num_layers'\]"),
    ],
    ids=str,
)
def test_bad_options(paramwise: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _groups(Detector(SubquadBackbone("test_vmamba")), **paramwise)


def test_rules_of_mmengine_in_few_groups() -> None:
    """The same rates and decays as those of mmengine's constructor, which makes a group of each tensor."""
    model = Detector(SubquadBackbone("test_vmamba", out_norm=True, frozen_stages=0))
    paramwise = {"custom_keys": {"norm": {"decay_mult": 0.0}, "neck": {"lr_mult": 0.1}}, "bias_decay_mult": 0.5}

    def options(constructor: str) -> tuple[int, dict[int, tuple[float, float]]]:
        optimizer = {"type": "AdamW", "lr": LR, "weight_decay": DECAY}
        cfg = {"optimizer": optimizer, "constructor": constructor, "paramwise_cfg": paramwise}
        groups = build_optim_wrapper(model, cfg).optimizer.param_groups
        return len(groups), {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}

    many, theirs = options("DefaultOptimWrapperConstructor")
    few, ours = options("SubquadParamGroups")
    assert ours == theirs
    assert few == 4 < many == len(theirs)


def test_sharded_parameters_have_no_shape() -> None:
    model = Detector(SubquadBackbone("test_vmamba"))
    model.add_module("_fsdp_wrapped_module", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="behind FSDP"):
        _groups(model, decay_rate=0.9)


def test_needs_a_backbone_that_it_knows() -> None:
    with pytest.raises(ValueError, match="no SubquadBackbone in Detector"):
        _groups(Detector(nn.Linear(2, 2)), decay_rate=0.9)

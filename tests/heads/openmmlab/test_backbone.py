"""``SubquadBackbone``: maps, freezing, weights that load or say why not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

pytest.importorskip("mmengine", reason='needs mmengine: pip install "subquad[mm]"')

from mmengine.registry import MODELS
from mmengine.runner.checkpoint import load_checkpoint

from subquad.heads.openmmlab import SubquadBackbone

NAME = "test_vmamba"
CHANNELS = (16, 24, 32, 48)

# Of our own and of timm's: hierarchical in both layouts, with batch norms, and isotropic.
MODELS_AND_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    (NAME, {}),
    ("test_vmamba_vanilla", {}),
    ("test_convnext", {}),
    ("test_resnet", {"out_indices": (1, 2, 3, 4)}),
    ("test_vit", {"out_indices": (1, 5), "model_args": {"dynamic_img_size": True}}),
    ("swin_tiny_patch4_window7_224", {"model_args": {"strict_img_size": False, "depths": (1, 1, 1, 1)}}),
]


class Detector(nn.Module):
    """A backbone under the name that it has in a detector, and another part."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.backbone = MODELS.build({"type": "SubquadBackbone", "model_name": NAME, "out_norm": True, **options})
        self.neck = nn.Linear(2, 2)


@pytest.mark.parametrize(("name", "options"), MODELS_AND_OPTIONS, ids=[name for name, _ in MODELS_AND_OPTIONS])
@pytest.mark.parametrize("out_norm", [False, True])
def test_maps(name: str, options: dict[str, Any], out_norm: bool) -> None:
    """Contiguous NCHW maps of the stated channels and strides, equal to timm's; every parameter gets a gradient."""
    torch.manual_seed(0)
    norms = {"out_norm": out_norm, "out_norm_eps": 1e-3}
    backbone = MODELS.build({"type": "SubquadBackbone", "model_name": name, **norms, **options}).eval()
    image = torch.randn(2, 3, 64, 96)
    maps = backbone(image)
    assert isinstance(maps, tuple) and len(maps) == len(backbone.out_indices)
    for y, channels, stride in zip(maps, backbone.channels, backbone.strides, strict=True):
        assert y.shape == (2, channels, 64 // stride, 96 // stride)
        assert y.is_contiguous()

    whole = timm.create_model(name, **options.get("model_args", {})).eval()
    whole.load_state_dict(backbone.net.state_dict(), strict=False)
    expected = whole.forward_intermediates(image, indices=list(backbone.out_indices), intermediates_only=True)
    for y, plain in zip(maps, expected, strict=True):
        if out_norm:
            plain = nn.functional.layer_norm(plain.permute(0, 2, 3, 1), plain.shape[1:2], eps=1e-3).permute(0, 3, 1, 2)
        torch.testing.assert_close(y, plain)

    sum(y.square().mean() for y in backbone.train()(image)).backward()
    assert [name for name, parameter in backbone.named_parameters() if parameter.grad is None] == []


def test_fewer_stages_drop_what_lies_behind() -> None:
    backbone = SubquadBackbone(NAME, (0, 2), out_norm=True)
    assert (backbone.channels, backbone.strides) == ((16, 32), (4, 16))
    assert [y.shape[1] for y in backbone(torch.randn(1, 3, 33, 70))] == [16, 32]
    assert len(backbone.net.stages) == 3
    assert sorted(backbone.out_norms) == ["0", "2"]


def test_checkpointing_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    plain = SubquadBackbone(NAME, frozen_stages=1)
    recomputing = SubquadBackbone(NAME, frozen_stages=1, with_cp=True)
    recomputing.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 64, 64)  # needs no gradient, and neither does the frozen stage's map
    for backbone in (plain.train(), recomputing.train()):
        sum(y.square().mean() for y in backbone(image)).backward()
    assert all(stage.grad_checkpointing for stage in recomputing.net.stages)
    trained = {name: p for name, p in recomputing.named_parameters() if p.requires_grad}
    for name, parameter in plain.named_parameters():
        assert (name in trained) == (parameter.grad is not None)
        if parameter.grad is not None:
            torch.testing.assert_close(trained[name].grad, parameter.grad)


@pytest.mark.parametrize(("frozen", "prefixes"), [(-1, ()), (0, ("stem.",)), (2, ("stem.", "stages.0.", "stages.1."))])
def test_frozen_stages(frozen: int, prefixes: tuple[str, ...]) -> None:
    backbone = SubquadBackbone(NAME, frozen_stages=frozen)
    for name, parameter in backbone.net.named_parameters():
        assert parameter.requires_grad != name.startswith(prefixes), name
    backbone.eval()
    backbone.train()  # detectors do this after every validation
    assert [stage.training for stage in backbone.net.stages] == [i >= max(frozen, 0) for i in range(4)]
    assert backbone.training


def test_norm_eval() -> None:
    backbone = SubquadBackbone("test_resnet", (1, 2, 3, 4), norm_eval=True, frozen_stages=1).train()
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
    assert not backbone.net.layer1.training and backbone.net.layer2.training


def test_drop_path_rate() -> None:
    rates = [b.drop_path.drop_prob for s in SubquadBackbone(NAME, drop_path_rate=0.4).net.stages for b in s.blocks[1:]]
    assert rates == [pytest.approx(0.4 * 3 / 4)]


# Weights


def _filled(module: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(value.shape, generator=generator).to(value.dtype)
        for name, value in module.state_dict().items()
    }


def _assert_equal(backbone: SubquadBackbone, state: dict[str, Tensor], prefix: str = "") -> None:
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, state[prefix + name]), name


def test_weights_survive_init_weights() -> None:
    detector = Detector()
    before = copy.deepcopy(detector.backbone.state_dict())
    detector.backbone.init_weights()
    _assert_equal(detector.backbone, before)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
def test_checkpoint_of_a_classifier(wrapper: str | None, tmp_path: Path) -> None:
    state = _filled(timm.create_model(NAME))
    torch.save({wrapper: state} if wrapper else state, tmp_path / "c.pth")
    backbone = SubquadBackbone(NAME, (0, 1, 2), out_norm=True, checkpoint=str(tmp_path / "c.pth"))
    backbone.init_weights()
    assert all(torch.equal(value, state[name]) for name, value in backbone.net.state_dict().items())
    assert all(torch.equal(norm.weight, torch.ones_like(norm.weight)) for norm in backbone.out_norms.values())


def test_checkpoint_of_timm(tmp_path: Path) -> None:
    state = _filled(timm.create_model("test_resnet"))
    torch.save(state, tmp_path / "c.pth")
    backbone = SubquadBackbone("test_resnet", (1, 2), checkpoint=str(tmp_path / "c.pth"))
    backbone.init_weights()
    assert all(torch.equal(value, state[name]) for name, value in backbone.net.state_dict().items())


def test_released_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``pretrained`` goes through timm: its file is replaced by a local one."""
    state = _filled(timm.create_model(NAME))
    torch.save(state, tmp_path / "c.pth")
    overlay = {"file": str(tmp_path / "c.pth"), "custom_load": True, "url": "https://example.com/c.pth"}
    monkeypatch.setattr(timm.models, "is_model_pretrained", lambda name: True)
    backbone = SubquadBackbone(NAME, pretrained=True, model_args={"pretrained_cfg_overlay": overlay})
    backbone.init_weights()
    assert all(torch.equal(value, state[name]) for name, value in backbone.net.state_dict().items())


def test_checkpoint_of_a_detector_starts_a_backbone(tmp_path: Path) -> None:
    """With the norms behind the stages, under our names."""
    trained = Detector()
    state = _filled(trained)
    torch.save({"state_dict": state, "meta": {"epoch": 12}}, tmp_path / "c.pth")
    backbone = SubquadBackbone(NAME, out_norm=True, checkpoint=str(tmp_path / "c.pth"))
    backbone.init_weights()
    _assert_equal(backbone, state, "backbone.")


@pytest.mark.parametrize("wrong", [{"model_name": "test_vmamba_vanilla"}, {"out_indices": (0, 1)}, {"out_norm": False}])
def test_detector_of_another_architecture(wrong: dict[str, Any], tmp_path: Path) -> None:
    """mmengine would load what fits and log the rest."""
    torch.save({"state_dict": Detector(**wrong).state_dict()}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=rf"under 'backbone\.' do not fit {NAME}") as caught:
        load_checkpoint(Detector(), str(tmp_path / "c.pth"))
    assert "out_norms" in str(caught.value) or "mixer" in str(caught.value)


def test_detector_without_a_backbone(tmp_path: Path) -> None:
    """A classifier's checkpoint in place of a detector's."""
    torch.save({"state_dict": timm.create_model(NAME).state_dict()}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match="missing"):
        load_checkpoint(Detector(), str(tmp_path / "c.pth"))


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vmamba_vanilla").state_dict(), tmp_path / "c.pth")
    backbone = SubquadBackbone(NAME, checkpoint=str(tmp_path / "c.pth"))
    with pytest.raises(ValueError, match=rf"c\.pth does not fit {NAME}:\nonly \d+ of \d+ tensors fit"):
        backbone.init_weights()
    torch.save({"model": {"epoch": 3}}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match=r"empty\.pth: .* holds no tensors"):
        SubquadBackbone(NAME, checkpoint=str(tmp_path / "empty.pth")).init_weights()
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        SubquadBackbone(NAME, checkpoint=str(tmp_path / "absent.pth")).init_weights()


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model_name": "vmamba_tinny"}, ValueError, "'vmamba_tinny'; did you mean vmamba_tiny"),
        ({"out_indices": (0, 4)}, ValueError, "0 to 3, the levels of 'test_vmamba', got"),
        ({"out_indices": (2, 1)}, ValueError, "must rise"),
        ({"out_indices": ()}, ValueError, "must rise"),
        ({"frozen_stages": 5}, ValueError, "frozen_stages must be -1"),
        ({"pretrained": "file.pth"}, TypeError, "a file goes to checkpoint"),
        ({"pretrained": True}, ValueError, "no released weights"),
        ({"pretrained": True, "checkpoint": "c.pth"}, ValueError, "exclude each other"),
        ({"embed_dim": 96}, TypeError, "embed_dim"),
        ({"init_cfg": {"type": "Pretrained"}}, TypeError, "init_cfg"),
        ({"model_args": {"embed_dim": 96}}, TypeError, "embed_dim"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MODELS.build({"type": "SubquadBackbone", "model_name": NAME, **options})

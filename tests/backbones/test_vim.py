"""Vim: what the recorded cases of tests/parity do not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.backbones import weights
from subquad.backbones.vim import Vim, checkpoint_filter_fn
from subquad.tools.training import session

TINY: dict[str, Any] = {"dim": 16, "depth": 3, "d_state": 2, "img_size": 64, "num_classes": 5}


def _official(model: Vim, patches: int, index: int | None) -> dict[str, Tensor]:
    """Class token and positions as an official file of so many patches holds them, and a name that tells it apart."""
    generator = torch.Generator().manual_seed(0)
    rows = patches + (index is not None)
    official = {"pos_embed": torch.randn(1, rows, 16, generator=generator), "layers.0.norm.weight": torch.ones(16)}
    return official | ({"cls_token": torch.randn(1, 1, 16, generator=generator)} if index is not None else {})


@pytest.mark.parametrize(("place", "index"), [("middle", 8), (0, 0), (3, 3), (16, 16)])
def test_class_token_stands_where_it_is_asked_for(place: Any, index: int) -> None:
    model = Vim(class_token=place, **TINY)
    x = torch.randn(2, 4, 4, 16)
    tokens = model.join_tokens(x)
    expected = (model.prefix_tokens + model.pos_embed_prefix)[0, 0]
    assert torch.equal(tokens[:, index], expected.expand(2, -1))
    token, patches = model.split_tokens(tokens)
    assert torch.equal(token[:, 0], tokens[:, index])
    assert torch.equal(patches, x.flatten(1, 2))


def test_class_token_outside_of_the_sequence() -> None:
    with pytest.raises(ValueError, match=r"class_token must be .* from 0 to 16.* got 17"):
        Vim(class_token=17, **TINY)
    with pytest.raises(ValueError, match=r"class_token must be .* got -1"):
        Vim(class_token=-1, **TINY)
    model = Vim(class_token=9, **TINY)
    with pytest.raises(ValueError, match=r"class_token must be at most 4 for 4 patches, got 9"):
        model(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("place", [True, "first", 2.0])
def test_class_token_at_no_place(place: Any) -> None:
    """True, which says in timm that there is one, is not the place 1."""
    with pytest.raises(ValueError, match=f"class_token must be 'middle', False or from 0 to 16.* got {place!r}"):
        Vim(class_token=place, **TINY)


def test_no_class_token() -> None:
    """False, because timm's create_model drops None; it is not the place 0."""
    for model in (Vim(class_token=None, **TINY), timm.create_model("test_vim", class_token=False)):
        assert model.num_prefix_tokens == 0
        assert "prefix_tokens" not in model.state_dict()


@pytest.mark.parametrize("size", [(8, 64), (64, 15)])
def test_images_smaller_than_a_patch(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"at least 16 x 16 pixels, got {size[0]} x {size[1]}"):
        Vim(**TINY)(torch.randn(1, 3, *size))


@pytest.mark.parametrize(("place", "index"), [("middle", 18), (0, 0), (None, None)], ids=["middle", "first", "without"])
def test_positions_of_another_size_are_resampled_without_the_class_token(place: Any, index: int | None) -> None:
    """An official file for 96 px (6 x 6 patches) in a model for 48 x 80 px (3 x 5)."""
    model = Vim(class_token=place, **TINY | {"img_size": (48, 80)})
    official = _official(model, 36, index)
    filtered = checkpoint_filter_fn(official, model)
    rows = [i for i in range(official["pos_embed"].shape[1]) if i != index]
    grid = official["pos_embed"][:, rows].unflatten(1, (6, 6)).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(3, 5), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    torch.testing.assert_close(filtered["pos_embed"], expected)
    if index is None:
        assert "prefix_tokens" not in filtered
    else:
        assert torch.equal(filtered["prefix_tokens"], official["cls_token"])
        assert torch.equal(filtered["pos_embed_prefix"], official["pos_embed"][:, index : index + 1])


def test_positions_of_a_non_square_grid_fit_a_model_of_that_grid() -> None:
    model = Vim(class_token="middle", **TINY | {"img_size": (48, 80)})
    official = _official(model, 15, 7)
    filtered = checkpoint_filter_fn(official, model)
    assert torch.equal(filtered["pos_embed"].flatten(1, 2), official["pos_embed"][:, [*range(7), *range(8, 16)]])
    # 8 patches are neither the model's 15 nor a square: left for the loader to report.
    assert checkpoint_filter_fn(_official(model, 8, 4), model)["pos_embed"].shape == (1, 8, 16)


def test_positions_of_a_square_are_no_rows_of_a_wide_grid_of_as_many() -> None:
    """4 x 4 patches of an official file, which are square, in a model for 2 x 8."""
    model = Vim(**TINY | {"img_size": (32, 128)})
    official = _official(model, 16, 8)
    grid = official["pos_embed"][:, [*range(8), *range(9, 17)]].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(2, 8), mode="bicubic").permute(0, 2, 3, 1)
    torch.testing.assert_close(checkpoint_filter_fn(official, model)["pos_embed"], expected)


def test_own_weights_for_another_size_serve_as_they_did() -> None:
    """Resampled once on loading instead of for each image."""
    trained, larger = Vim(**TINY).eval(), Vim(**TINY | {"img_size": (48, 80)}).eval()
    larger.load_state_dict(checkpoint_filter_fn(trained.state_dict(), larger))
    x = torch.randn(1, 3, 48, 80)
    torch.testing.assert_close(larger(x), trained(x))


def test_features_without_a_class_token_come_from_a_checkpoint_with_one() -> None:
    model = Vim(class_token=None, **TINY)
    assert model.global_pool == "avg"
    assert "cls_token" not in checkpoint_filter_fn(_official(model, 16, 8) | {"layers.0.x": torch.ones(1)}, model)


def test_official_weights_are_those_that_upstream_evaluates(tmp_path: Path) -> None:
    """Not the averaged ones beside them, unless they are asked for or alone."""
    model = timm.create_model("test_vim")
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    averaged = {name: torch.ones_like(value) for name, value in state.items()}
    torch.save({"model": state, "model_ema": averaged}, tmp_path / "both.pth")
    torch.save({"model": None, "model_ema": averaged}, tmp_path / "averaged.pth")
    for file, key, expected in (("both", None, 0.0), ("both", "model_ema", 1.0), ("averaged", None, 1.0)):
        weights.load_checkpoint(model, tmp_path / f"{file}.pth", key=key)
        assert (model.head.weight == expected).all()
    session.load_weights(model, tmp_path / "both.pth")  # of `subquad train`
    assert (model.head.weight == 0).all()
    assert (checkpoint_filter_fn({"model": state, "model_ema": averaged}, model)["head.weight"] == 0).all()


def test_start_is_that_of_the_official_code() -> None:
    model = Vim(**TINY | {"dim": 64, "depth": 4})
    mixer = model.blocks[1].mixer
    assert (mixer.dt_bias[1] == 0).all() and (mixer.dt_bias[0] < 0).any()
    bound = 128**-0.5 / 2  # kaiming with a = sqrt(5), over the square root of the depth
    assert 0.95 * bound < mixer.out_proj.weight.abs().max() <= bound
    assert 0.95 / 8 < mixer.in_proj.weight.abs().max() <= 1 / 8
    assert (model.stem.conv.bias == 0).all()


def test_only_matrices_and_convolutions_decay() -> None:
    model = timm.create_model("test_vim")
    decayed = {n for n, p in model.named_parameters() if n not in model.no_weight_decay() and p.dim() > 1}
    leaves = {name.split(".", 2)[-1] for name in decayed if name.startswith("blocks.")}
    projections = {f"mixer.{name}.weight" for name in ("in_proj", "gate_proj", "out_proj")}
    assert leaves == projections | {"mixer.conv_weight", "mixer.x_proj_weight", "mixer.dt_weight"}
    assert decayed - {n for n in decayed if n.startswith("blocks.")} == {"stem.conv.weight", "head.weight"}


@pytest.mark.parametrize(
    "options",
    [{"depth": 0}, {"patch_size": 0}, {"stride": 0}, {"d_state": 0}, {"dt_rank": "full"}, {"img_size": 8}],
    ids=str,
)
def test_options_that_cannot_be_built(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        Vim(**TINY | options)


def test_options_combine() -> None:
    model = Vim(
        **TINY, stride=8, class_token=1, expand=1, kernel_size=3, dt_rank=2, average=False, rms_norm=False,
        init_values=0.1, in_chans=2, drop_path_rate=0.1, global_pool="avg",
    )  # fmt: skip
    model(torch.randn(2, 2, 41, 36)).square().mean().backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    assert not unused

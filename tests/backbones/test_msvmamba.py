"""MSVMamba: what the recorded cases of tests/parity do not say."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.export import Dim

from subquad import ops
from subquad.backbones.msvmamba import MSVMamba, MultiScaleSS2D, checkpoint_filter_fn

SMALL: dict[str, Any] = {"depths": (1, 1), "dims": (8, 12), "num_classes": 5}
SECOND: dict[str, Any] = SMALL | {
    "ssm_ratio": 1.0, "gated": False, "merge": "raw", "ffn_ratio": 4.0, "post_norm": True,
    "stem": "conv", "downsample": "conv",
}  # fmt: skip


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (1, 1)])
def test_half_routes_are_one_sequence(height: int, width: int) -> None:
    """The state is handed on: equal to one scan, in float64, of the three routes' pixels one behind the other."""
    torch.manual_seed(0)
    mixer = MultiScaleSS2D(6, merge="raw", d_state=2).double()
    x = torch.randn(2, height, width, 12, dtype=torch.float64)
    pixels = torch.arange(height * width)
    columns = pixels.view(height, width).T.flatten()
    order = torch.cat([pixels.flip(0), columns, columns.flip(0)])
    sequence = x.flatten(1, 2)[:, order]
    dt, B, C = mixer.project(sequence, 1, 2)
    with ops.use_backend("reference"):
        y = ops.selective_scan(
            sequence, dt, -mixer.A_log[1:].exp(), B, C, mixer.D[1:], dt_weight=mixer.dt_weight[1:],
            dt_bias=mixer.dt_bias[1:],
        )  # fmt: skip
    assert isinstance(y, Tensor)
    expected = torch.zeros_like(x).flatten(1, 2).index_add(1, order, y)
    torch.testing.assert_close(mixer.scan_half(x).flatten(1, 2), expected, rtol=1e-10, atol=1e-12)


def test_filter_puts_the_full_map_first() -> None:
    model = MSVMamba(**SMALL)
    weight = torch.arange(2.0)[:, None].expand(2, 16)  # the half map's 0, the full map's 1
    official = {"layers.0.blocks.0.op.dt_projs_bias": weight, "layers.0.blocks.0.op.Ds": weight.flatten()}
    for value in checkpoint_filter_fn(official, model).values():
        assert torch.equal(value, weight.flip(0))
    second = MSVMamba(**SECOND | {"ssm_ratio": 2.0})
    for value in checkpoint_filter_fn(official, second).values():
        assert torch.equal(value, weight)


def test_second_version_scripts_and_exports() -> None:
    """The first does as test_msvmamba."""
    model = MSVMamba(**SECOND).eval()
    x = torch.randn(2, 3, 48, 64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},)).module()
    scripted = torch.jit.script(model)
    for image in (x, torch.randn(1, 3, 53, 41)):
        with torch.no_grad():
            expected = model(image)
            torch.testing.assert_close(scripted(image), expected)
            torch.testing.assert_close(program(image), expected)


@pytest.mark.parametrize(
    "options",
    [{"merge": "sum"}, {"ffn_ratio": 0.0}, {"d_state": 0}, {"ssm_ratio": 0.0}, {"dt_rank": 0}, {"stem": "v1"},
     {"downsample": "v3"}, {"in_chans": 0}, {"depths": (1, 0)}],
    ids=str,
)  # fmt: skip
def test_options_that_cannot_be_built(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}.* got|unknown"):
        MSVMamba(**SMALL | options)


def test_images_too_small_for_the_stem_or_a_downsampling() -> None:
    with pytest.raises(ValueError, match="at least 4 x 4 pixels, got 3 x 64"):
        MSVMamba(**SMALL)(torch.randn(1, 3, 3, 64))
    assert MSVMamba(**SMALL).eval()(torch.randn(1, 3, 4, 5)).isfinite().all()
    model = MSVMamba(**SMALL | {"downsample": "patch"}).eval()
    with pytest.raises(ValueError, match="a map of 2 x 1 pixels is left, expected at least 2 x 2"):
        model(torch.randn(1, 3, 9, 7))
    assert model(torch.randn(1, 3, 8, 11)).isfinite().all()
    assert MSVMamba(**SECOND).eval()(torch.randn(1, 3, 1, 1)).isfinite().all()


def test_options_combine() -> None:
    model = MSVMamba(
        **SECOND | {"merge": "normed", "gated": True, "downsample": "patch", "d_state": 2, "dt_rank": 2},
        in_chans=2, patch_norm=False, drop_path_rate=0.1,
    )  # fmt: skip
    model(torch.randn(2, 2, 41, 36)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("name", "rate"), [("msvmamba_tiny", 0.2), ("msvmamba_base_v2", 0.5)])
def test_drop_path_rises_to_the_published_rate(name: str, rate: float) -> None:
    model = timm.create_model(name, device="meta")
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    torch.testing.assert_close(rates, torch.linspace(0, rate, len(rates)).tolist())

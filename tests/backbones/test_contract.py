"""What every model of the library promises beyond timm's own tests (see tests/conformance), whatever its family.

Small models stand for their families; what needs no weights is checked for every variant on the meta device.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.export import Dim

from subquad.backbones import weights
from subquad.backbones.base import Isotropic
from subquad.backbones.registry import model_names

SMALL = [name for name in model_names() if name.startswith("test_")]
RELEASED = [name for name in model_names() if not name.startswith("test_")]
SIZES = [(32, 32), (33, 47), (64, 40), (333, 517)]

# Pixels that the README states: the smallest map has two a side, and 4x4 stems drop what is beyond a multiple of 4.
SMALLEST_EXPORTED = {
    "test_vmamba": 33,
    "test_vmamba_vanilla": 36,
    "test_vim": 33,
    "test_msvmamba": 68,
    "test_vig": 33,
    "test_vig_h": 33,
}

small_models = pytest.mark.parametrize("name", SMALL)
released_models = pytest.mark.parametrize("name", RELEASED)


def _images(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(0))


def _model(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **options)


@released_models
def test_default_cfg_states_origin(name: str) -> None:
    cfg = timm.models.get_pretrained_cfg(name)
    if cfg.has_weights:
        # The name under which timm keeps the file: an address without one would be taken for its whole cache.
        file = cfg.url.rpartition("/")[2] if isinstance(cfg.url, str) else cfg.url[1]
        assert file.endswith((".pth", ".pt", ".safetensors")) and cfg.custom_load
    assert cfg.license and cfg.origin_url and cfg.paper_name and cfg.paper_ids


@released_models
def test_forward_on_meta(name: str) -> None:
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16)
    logits = model(torch.empty(2, *model.default_cfg["input_size"], device="meta", dtype=torch.bfloat16))
    assert logits.shape == (2, 1000)
    assert logits.dtype == torch.bfloat16


@small_models
def test_features_at_any_size_on_one_instance(name: str) -> None:
    model = _model(name, features_only=True).eval()
    for height, width in SIZES:
        with torch.no_grad():
            features = model(_images(1, 3, height, width))
        assert len(features) == len(model.feature_info.channels())
        for feature, channels, reduction in zip(
            features, model.feature_info.channels(), model.feature_info.reduction(), strict=True
        ):
            assert feature.shape[:2] == (1, channels)
            assert abs(feature.shape[2] - height / reduction) < 1
            assert abs(feature.shape[3] - width / reduction) < 1
            assert feature.isfinite().all()


@small_models
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_finite_for_large_inputs(name: str, dtype: torch.dtype) -> None:
    model = _model(name).train()
    with torch.autocast("cpu", dtype):
        logits = model(100 * _images(2, 3, 64, 64))
    logits.float().square().mean().backward()
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name


@small_models
def test_autocast_is_close_to_float32(name: str) -> None:
    model, x = _model(name).eval(), _images(1, 3, 64, 64)
    with torch.no_grad():
        features = model.forward_features(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = model.forward_features(x)
    assert (low.float() - features).norm() < 0.03 * features.norm()


@small_models
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    x = _images(2, 3, 64, 64)
    plain = _model(name).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    for model in (plain, saving):
        model(x).square().mean().backward()
    for (parameter_name, expected), actual in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-7, msg=parameter_name)


@small_models
@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 4, 64, 64), (1, 3, 0, 64), (1, 3, 64, 0)], ids=str)
def test_images_of_a_wrong_shape(name: str, shape: tuple[int, ...]) -> None:
    model = _model(name)
    with pytest.raises(ValueError, match=re.escape(str(list(shape)))):
        model(torch.zeros(shape))
    with pytest.raises(TypeError, match=r"expected a tensor of images \(B, C, H, W\), got list"):
        model([1.0])
    with pytest.raises(ValueError, match="expected images of shape"):
        model.forward_intermediates(torch.zeros(shape))


# Not the models of tests: their stem is somebody's own module, which may cast images as it likes.
@pytest.mark.parametrize("name", [name for name in SMALL if not name.startswith("test_isotropic")])
def test_images_of_a_wrong_dtype_or_on_another_device(name: str) -> None:
    model, x = _model(name).eval(), _images(1, 3, 64, 64)
    for dtype in (torch.uint8, torch.int64, torch.float64, torch.bfloat16):
        message = re.escape(f"expected images in torch.float32, the dtype of the model, got {dtype}")
        for forward in (model, model.forward_intermediates):
            with pytest.raises(TypeError, match=message):
                forward(x.to(dtype))
    with pytest.raises(TypeError, match=r"in torch\.float64, the dtype of the model, got torch\.float32"):
        copy.deepcopy(model).double()(x)
    with pytest.raises(ValueError, match="expected images on cpu, where the model is, got meta"):
        model(x.to("meta"))
    scripted = torch.jit.script(model)
    with pytest.raises(torch.jit.Error, match="expected images in floating point"):
        scripted(x.byte())


@pytest.mark.parametrize("name", ["test_vmamba", "test_vim"])
def test_images_under_autocast(name: str) -> None:
    """Autocast casts what is in floating point, but for float64."""
    model, x = _model(name).eval(), _images(1, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x.bfloat16().float())
        torch.testing.assert_close(model(x.bfloat16()), expected)
        for dtype in (torch.uint8, torch.float64):
            with pytest.raises(TypeError, match=f"expected images in torch.float32.*got {dtype}"):
                model(x.to(dtype))
        with pytest.raises(TypeError, match=r"expected images in torch\.float64.*got torch\.float32"):
            copy.deepcopy(model).double()(x)


def test_images_that_a_stem_of_somebodys_own_casts() -> None:
    class Cast(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.float())

    model, x = _model("test_vmamba").eval(), _images(1, 3, 64, 64)
    expected = model(x)
    model.stem = Cast(model.stem)
    assert torch.equal(model(x.double()), expected)


def test_images_that_hooks_bring_into_place() -> None:
    accelerate = pytest.importorskip("accelerate")
    x = _images(1, 3, 64, 64)
    expected = _model("test_vmamba").eval()(x)

    casting = _model("test_vmamba").eval()
    casting.stem.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    torch.testing.assert_close(casting(x.double()), expected)

    offloaded = _model("test_vmamba").eval()
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert next(offloaded.stem.parameters()).is_meta
    torch.testing.assert_close(offloaded(x), expected)


@pytest.mark.parametrize("original", [True, False])
def test_images_that_fsdp_casts(original: bool) -> None:
    """It hands on images in its own dtype before the stem's weights have that."""
    mixed = MixedPrecision(param_dtype=torch.bfloat16)
    options = {"mixed_precision": mixed, "use_orig_params": original, "device_id": torch.device("cpu")}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = _model("test_vmamba").eval()
        model.stem = FullyShardedDataParallel(model.stem, **options)
        assert FullyShardedDataParallel(model, **options)(_images(1, 3, 64, 64)).dtype == torch.bfloat16
    finally:
        dist.destroy_process_group()


@small_models
def test_unknown_and_bad_arguments(name: str) -> None:
    with pytest.raises(
        TypeError, match=rf"^{name} has no argument 'qqq', expected one of .*\bdrop_path_rate\b.*help\("
    ) as e:
        timm.create_model(name, qqq=1)
    family = type(_model(name))
    assert f"help({family.__module__}.{family.__name__})" in str(e.value)
    with pytest.raises(TypeError, match=rf"^{name} has no argument 'drop_path_rates', did you mean drop_path_rate"):
        timm.create_model(name, drop_path_rates=0.1, features_only=True, out_indices=(0,))
    for options in (
        {"num_classes": -1},
        {"drop_path_rate": 1.5},
        {"drop_path_rate": "fast"},
        {"drop_rate": -0.1},
        {"global_pool": "median"},
    ):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            timm.create_model(name, **options)
    with pytest.raises(ValueError, match="median"):
        _model(name).reset_classifier(10, "median")


@pytest.mark.parametrize("name", ["test_vmamba", "test_nat", "test_biformer"])
def test_size_of_images_is_no_argument(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name} has no argument 'img_size', it takes images of any size"):
        timm.create_model(name, img_size=160)


def test_arguments_that_are_taken() -> None:
    """Those of timm, of the family and of the architecture; an error inside a model stays what it is."""
    model = timm.create_model("test_vmamba", pretrained_cfg_overlay={"crop_pct": 1.0}, cache_dir="none", foo=None)
    assert model.pretrained_cfg["crop_pct"] == 1.0
    model = timm.create_model("test_ravlt", device="meta", dims=(8, 8, 8, 8), num_heads=(1, 1, 1, 1), drop_rate=0.1)
    assert (model.drop_rate, model.num_features) == (0.1, 8)
    with pytest.raises(TypeError, match=r"^(?!test_vmamba has no argument)"):
        timm.create_model("test_vmamba", depths=1)


@small_models
def test_layer_decay_orders_the_layers(name: str) -> None:
    model = _model(name)
    exempt = model.no_weight_decay()
    groups = param_groups_layer_decay(model, weight_decay=0.05, no_weight_decay_list=exempt, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert set(scales) == {id(p) for p in named.values()}
    depth = len(model.blocks) if isinstance(model, Isotropic) else sum(len(stage.blocks) for stage in model.stages)
    # stem, blocks, head
    assert sorted(set(scales.values())) == [0.5**i for i in range(depth + 1, -1, -1)]
    assert all(scales[id(p)] == 0.5 ** (depth + 1) for key, p in named.items() if key.startswith("stem."))
    assert all(scales[id(p)] == 1.0 for key, p in named.items() if key.startswith("head."))
    assert all(decays[id(named[key])] == 0.0 for key in exempt)


@small_models
def test_init_weights_restores_every_parameter(name: str) -> None:
    fresh = _model(name)
    model = timm.create_model(name, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.init_weights()
    for (key, parameter), expected in zip(model.named_parameters(), fresh.parameters(), strict=True):
        if expected.numel() > 1 and expected.std() > 1e-6:
            assert 0.5 < parameter.std() / expected.std() < 2, key
        else:
            torch.testing.assert_close(parameter, expected, msg=key)


@small_models
def test_own_state_dict_passes_the_filter(name: str) -> None:
    model = _model(name)
    filter_fn = weights.filter_of(model)
    expected = model.state_dict()
    filtered = filter_fn(filter_fn(expected, model), model)
    assert list(filtered) == list(expected)
    assert all(torch.equal(filtered[key], expected[key]) for key in expected)


@small_models
def test_scripted_features(name: str) -> None:
    model, x = _model(name, features_only=True).eval(), _images(1, 3, 45, 64)
    scripted = torch.jit.script(model)
    with torch.no_grad():
        for actual, expected in zip(scripted(x), model(x), strict=True):
            torch.testing.assert_close(actual, expected)


@small_models
def test_compile_without_graph_breaks(name: str) -> None:
    torch._dynamo.reset()
    model, x = _model(name), _images(2, 3, 64, 96)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(x), model.eval()(x))
    model.train().set_grad_checkpointing()
    compiled(x).square().mean().backward()
    actual = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(x).square().mean().backward()
    for (key, parameter), grad in zip(model.named_parameters(), actual, strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-7, msg=key)


@small_models
def test_exported_program_takes_other_sizes(name: str) -> None:
    model = _model(name).eval()
    # The example's last maps are small, so that a guard on their sizes would show at the larger ones.
    # MSVMamba halves them once more.
    scale = 2 if "msvmamba" in name else 1
    example = _images(2, 3, scale * 64, scale * 96)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},))
    exported = program.module()
    sizes = [(2, 64, 96), (1, 64, 64), (3, 45, 101), (2, 224, 130)]
    images = [_images(batch, 3, scale * height, scale * width) for batch, height, width in sizes]
    if name in SMALLEST_EXPORTED:
        images.append(_images(1, 3, SMALLEST_EXPORTED[name], SMALLEST_EXPORTED[name]))
    for x in images:
        with torch.no_grad():
            torch.testing.assert_close(exported(x), model(x))

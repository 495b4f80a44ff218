"""``subquad export``: a model as a torch.export program, an ONNX file, safetensors, or a folder that timm loads.

    torch        .pt2 of ``torch.export`` with dynamic batch, height and width, as long as no map inside is one pixel
                 high or wide; run it after ``import subquad``
    onnx         standard ONNX operators only, any batch, height and width; input ``image``, output ``logits``
    safetensors  the weights under this library's names
    hf           config.json and model.safetensors for ``timm.create_model("local-dir:FOLDER", pretrained=True)``

What was written is read back and compared with the model, at other sizes than it was traced at, before it appears under
its final name.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import timm
import torch
from safetensors.torch import load_file, save
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from subquad.backbones import weights
from subquad.backbones.registry import check_any_model, check_model
from subquad.ops.depthwise_conv import export_form as depthwise_conv_form
from subquad.ops.gated_linear_attention import export_form as gated_linear_attention_form
from subquad.ops.layer_norm import export_form as layer_norm_form
from subquad.ops.linear_attention import export_form as linear_attention_form
from subquad.ops.neighborhood_attention import export_form as neighborhood_attention_form
from subquad.ops.region_attention import export_form as region_attention_form
from subquad.ops.selective_scan import export_form as selective_scan_form
from subquad.ops.window_attention import export_form as window_attention_form

with suppress(ImportError):  # only the command line reads the annotation, and it cannot run without tyro
    from tyro.conf import arg

TOLERANCE = 1e-4
"""Largest difference from the model that a program may show, relative to the largest magnitude of the output."""

EXPORT_FORMS: dict[Any, Callable[..., Any]] = {
    torch.ops.subquad.add_layer_norm.default: layer_norm_form.sum_form,
    torch.ops.subquad.depthwise_conv.default: depthwise_conv_form.export_form,
    torch.ops.subquad.gated_linear_attention.default: gated_linear_attention_form.export_form,
    torch.ops.subquad.layer_norm.default: layer_norm_form.export_form,
    torch.ops.subquad.linear_attention.default: linear_attention_form.export_form,
    torch.ops.subquad.neighborhood_attention.default: neighborhood_attention_form.export_form,
    torch.ops.subquad.neighborhood_av.default: neighborhood_attention_form.av_export_form,
    torch.ops.subquad.neighborhood_qk.default: neighborhood_attention_form.qk_export_form,
    torch.ops.subquad.region_attention.default: region_attention_form.export_form,
    torch.ops.subquad.region_routing.default: region_attention_form.routing_form,
    torch.ops.subquad.selective_scan.default: selective_scan_form.export_form,
    torch.ops.subquad.window_attention.default: window_attention_form.export_form,
}
"""For every operator of this library the form in standard operators that ``run_decompositions`` puts in its place."""

_SUFFIXES = {"torch": ".pt2", "onnx": ".onnx", "safetensors": ".safetensors", "hf": ""}
_OPSETS = (18, 23)  # PyTorch's exporter writes none older; newer ones are not tried
# Sizes 0 and 1 are constants to torch.export, so it is shown a batch of two; the program takes any.
_TRACED_BATCH = 2
_SMALLEST_TRACED = 64
_AXES = {0: "batch", 2: "height", 3: "width"}


@dataclass
class Options:
    """Write a model as a torch.export program, ONNX, safetensors or a folder that timm loads."""

    model: str
    """Name of a model of this library, such as vmamba_tiny."""

    format: Literal["torch", "onnx", "safetensors", "hf"]
    """What to write."""

    output: Annotated[Path, arg(aliases=["-o"])]
    """File (.pt2, .onnx, .safetensors) or, for hf, folder to write. A file is replaced, a folder must be empty."""

    checkpoint: Path | None = None
    """Weights: an official checkpoint or one of this library. Nothing in the file is executed."""

    pretrained: bool = False
    """Use the released weights. Without them and without --checkpoint the weights are random."""

    features: bool = False
    """Export the feature maps (B, C, H, W) of all stages instead of logits (torch, onnx)."""

    num_classes: int | None = None
    """Classes; if not given, those of the checkpoint's classifier, or the model's default."""

    in_chans: int | None = None
    """Input channels, the model's default if not given."""

    image_size: int | tuple[int, int] | None = None
    """Size, or height and width, to trace at (torch, onnx), the model's default if not given. Other sizes run too."""

    opset: int | None = None
    """ONNX operator set, 18 to 23, PyTorch's default if not given."""

    check: bool = True
    """Read the result back and compare it with the model."""


def run(options: Options) -> Path:
    """Build the model, write it, compare; prints what was written and how far it is from the model.

    Returns:
        The file or folder that was written. It appears only when it is complete and, with ``check``, has passed.

    Raises:
        ValueError: an unknown model, options that do not go together, an unreadable or ill-fitting checkpoint.
        FileNotFoundError: no checkpoint, or no folder to write to.
        ImportError: a package of the extra ``export`` is missing.
        RuntimeError: the result does not compute what the model computes.
    """
    _check_options(options)
    model = _model(options)
    with _staged(options.output) as path:
        if options.format == "torch":
            report = _write_torch(model, path, options)
        elif options.format == "onnx":
            report = _write_onnx(model, path, options)
        elif options.format == "safetensors":
            report = _write_safetensors(model, path, options)
        else:
            report = _write_hf(model, path, options)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    source = options.checkpoint or ("released weights" if options.pretrained else "untrained weights")
    print(f"{options.output}: {options.model}, {parameters:,} parameters, {source}")
    print(report if options.check else "not checked")
    return options.output


def _check_options(options: Options) -> None:
    check_model(options.model)
    if options.format not in _SUFFIXES:
        raise ValueError(f"unknown format {options.format!r}, expected one of {', '.join(_SUFFIXES)}")
    traced = options.format in ("torch", "onnx")
    for name, given, fits in (
        ("features", options.features, traced),
        ("image_size", options.image_size is not None, traced),
        ("opset", options.opset is not None, options.format == "onnx"),
    ):
        if given and not fits:
            raise ValueError(f"{name} does not apply to the format {options.format}")
    if options.opset is not None and not _OPSETS[0] <= options.opset <= _OPSETS[1]:
        raise ValueError(f"opset must be from {_OPSETS[0]} to {_OPSETS[1]}, got {options.opset}")
    if options.pretrained and options.checkpoint is not None:
        raise ValueError("pretrained and checkpoint exclude each other: both say where the weights come from")
    if options.pretrained:
        check_any_model(options.model, pretrained=True)
    if options.num_classes is not None and options.num_classes < 0:
        raise ValueError(f"num_classes must not be negative, got {options.num_classes}")
    if options.in_chans is not None and options.in_chans < 1:
        raise ValueError(f"in_chans must be at least 1, got {options.in_chans}")
    if traced and min(_input_size(options)[1:]) < _SMALLEST_TRACED:
        raise ValueError(f"image_size to trace at must be at least {_SMALLEST_TRACED}, got {options.image_size}")
    _check_output(options.output, _SUFFIXES[options.format])
    if options.format == "onnx":
        packages = ["onnx", "onnxscript", *(["onnxruntime"] if options.check else [])]
        if missing := [package for package in packages if find_spec(package) is None]:
            raise ImportError(f'export to ONNX needs {", ".join(missing)}: pip install "subquad[export]"')


def _check_output(output: Path, suffix: str) -> None:
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {output.parent} to write {output.name} to")
    if suffix:
        if output.suffix != suffix:
            raise ValueError(f"output must be a {suffix} file, got {output}")
        if output.is_dir():
            raise ValueError(f"output {output} is a folder, expected a file")
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output} exists and is not an empty folder")


def _model(options: Options) -> Any:
    sizes: dict[str, Any] = {"num_classes": options.num_classes, "in_chans": options.in_chans}
    model: Any = timm.create_model(options.model, pretrained=options.pretrained, **sizes)
    if options.checkpoint is not None:
        if options.num_classes is None:
            _take_classes(model, options.checkpoint)
        weights.load_checkpoint(model, options.checkpoint)
    if options.features:
        state = model.state_dict()
        model = timm.create_model(options.model, features_only=True, in_chans=options.in_chans)
        model.model.load_state_dict({name: state[name] for name in model.model.state_dict()})
    return model.eval().requires_grad_(False)


def _take_classes(model: Any, checkpoint: Path) -> None:
    """Give the model as many classes as the checkpoint's classifier has, if there is one in it."""
    classifier = weights.read_for(model, checkpoint).get(f"{model.pretrained_cfg['classifier']}.weight")
    if classifier is not None and classifier.dim() == 2 and len(classifier) != model.num_classes:
        model.reset_classifier(len(classifier))


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A path of the same name in a hidden folder beside ``output``, moved to ``output`` if the block ends well."""
    output = output.absolute()
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        path = Path(folder, output.name)
        yield path
        os.replace(path, output)


# Programs --------------------------------------------------------------------------------------------------------


class _Image(nn.Module):
    """The model with its input named ``image``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Any:
        return self.model(image)


def _write_torch(model: nn.Module, path: Path, options: Options) -> str:
    program = _trace(model, options)
    torch.export.save(program, path)
    if not options.check:
        return ""
    loaded = torch.export.load(path).module()
    return _compare(model, lambda image: _as_list(loaded(image)), options)


def _write_onnx(model: Any, path: Path, options: Options) -> str:
    program = _trace(model, options).run_decompositions(EXPORT_FORMS)
    names = [f"features_{i}" for i in range(len(model.feature_info.out_indices))] if options.features else ["logits"]
    # It warns of each scan that has no output but its last state.
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    exported = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["image"],
        output_names=names,
        dynamic_shapes={"image": _AXES},
        opset_version=options.opset,
        verbose=False,
    )
    assert exported is not None  # None comes only from the older exporter
    exported.save(path)
    foreign = {node.domain for node in exported.model.graph.all_nodes()} - {""}
    if foreign or exported.model.functions:
        raise RuntimeError(f"the ONNX graph is not portable: operators of {sorted(foreign)}")
    if not options.check:
        return ""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return _compare(
        model, lambda image: [torch.from_numpy(out) for out in session.run(None, {"image": image.numpy()})], options
    )


def _trace(model: nn.Module, options: Options) -> ExportedProgram:
    image = torch.zeros(_TRACED_BATCH, *_input_size(options))
    dynamic = {"image": dict.fromkeys(_AXES, Dim.AUTO)}
    with torch.no_grad():
        return torch.export.export(_Image(model), (image,), dynamic_shapes=dynamic)


def _input_size(options: Options) -> tuple[int, int, int]:
    """Channels, height and width to trace at."""
    cfg = timm.get_pretrained_cfg(options.model)
    assert cfg is not None  # every model of the library has one
    channels, *default = cfg.input_size
    size = options.image_size
    height, width = default if size is None else (size, size) if isinstance(size, int) else size
    return options.in_chans or channels, height, width


def _compare(model: nn.Module, program: Callable[[Tensor], Sequence[Tensor]], options: Options) -> str:
    """Largest difference of a program from the model, at sizes and batches that it was not traced at."""
    channels, height, width = _input_size(options)
    generator = torch.Generator().manual_seed(0)
    worst, shapes = 0.0, [(1, height + height // 2, width), (3, height + 8, width + 37)]
    for batch, *size in shapes:
        image = torch.randn(batch, channels, *size, generator=generator)
        with torch.no_grad():
            expected = _as_list(model(image))
        outputs = program(image)
        if [output.shape for output in outputs] != [value.shape for value in expected]:
            raise RuntimeError(
                f"at {tuple(image.shape)} the program gives shapes {[tuple(output.shape) for output in outputs]}, "
                f"the model {[tuple(value.shape) for value in expected]}"
            )
        for output, value in zip(outputs, expected, strict=True):
            difference = float((output.detach() - value).abs().max() / value.abs().max())
            if not difference <= TOLERANCE:  # also catches NaN
                raise RuntimeError(
                    f"at {tuple(image.shape)} the program differs from the model by {difference:.2g} of the largest "
                    f"value, more than {TOLERANCE:g}"
                )
            worst = max(worst, difference)
    sizes = " and ".join("x".join(map(str, shape)) for shape in shapes)
    return f"checked at {sizes}: largest difference {worst:.2g} of the largest value (tolerance {TOLERANCE:g})"


def _as_list(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


# Weights ---------------------------------------------------------------------------------------------------------


def _write_safetensors(model: nn.Module, path: Path, options: Options) -> str:
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    # Not save_file, which makes its file unreadable for other users.
    path.write_bytes(save(tensors, metadata={"format": "pt"}))
    return _compare_tensors(load_file(path), model.state_dict()) if options.check else ""


def _write_hf(model: Any, path: Path, options: Options) -> str:
    # The folder holds weights of this model under this library's names: nothing is left to adapt or to map.
    cfg = model.pretrained_cfg
    input_size = (model.in_chans, *cfg["input_size"][1:])
    model.pretrained_cfg = dict(cfg, input_size=input_size, num_classes=model.num_classes, custom_load=False)
    args = {"num_classes": model.num_classes, "in_chans": model.in_chans}
    save_for_hf(model, str(path), model_args=args, safe_serialization=True)
    # timm writes the weights with save_file too: give them the mode of an ordinary file.
    (path / "model.safetensors").chmod((path / "config.json").stat().st_mode)
    if not options.check:
        return ""
    loaded = timm.create_model(f"local-dir:{path}", pretrained=True)
    return _compare_tensors(loaded.state_dict(), model.state_dict())


def _compare_tensors(written: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    different = [name for name in expected if name not in written or not torch.equal(written[name], expected[name])]
    if different or len(written) != len(expected):
        raise RuntimeError(f"what was written does not load back as it was: {', '.join(different) or 'extra tensors'}")
    return f"checked: {len(expected)} tensors load back bit by bit"

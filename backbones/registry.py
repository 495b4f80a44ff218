"""From a family's table of variants to timm's registry."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from inspect import Parameter, signature
from typing import Any
from urllib.error import URLError

import timm
from timm.models import build_model_with_cfg, register_model
from torch import nn

from subquad.backbones import weights

_names: list[str] = []


def model_names() -> list[str]:
    """Names of this library's models in timm's registry, family by family."""
    return list(_names)


def check_model(name: str) -> None:
    """Raises ValueError, with close names, if ``name`` is not one of this library's models."""
    if name not in _names:
        raise ValueError(f"unknown model {name!r}, {hint(name, _names)}")


def hint(name: str, known: Sequence[str]) -> str:
    """What an error says behind an unknown name: close names, or all if none is."""
    close = get_close_matches(name, known)
    return f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(known)}"


def check_any_model(name: str, pretrained: bool = False) -> None:
    """Raises ValueError, with names that are close, for a model that neither this library nor timm has.

    With ``pretrained`` also for one without released weights. Names with a colon are folders and hubs that timm reads.
    """
    if ":" in name:
        return
    if not timm.is_model(name):
        close = get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f"unknown model {name!r}" + (f"; did you mean {', '.join(close)}?" if close else ""))
    if pretrained and not timm.models.is_model_pretrained(name):
        raise ValueError(
            f"{name!r} has no released weights that can be fetched by an address; start from scratch or from a "
            f"checkpoint, or name another model{_where_weights_are(name)}"
        )


def _where_weights_are(name: str) -> str:
    """What the model's notes say of files to convert, as the end of a message."""
    notes = getattr(timm.models.get_pretrained_cfg(name), "notes", None) or ()
    return "".join(f". {note}" for note in notes if "subquad convert" in note)


def default_cfg(
    file: str = "", *, folder: str = "", share: str = "", size: int = 224, stride: int | None = 32, **kwargs: Any
) -> dict[str, Any]:
    """timm's default cfg of a variant trained on ImageNet-1K, of which families state what is their own.

    Args:
        file: the authors' file, "" if there is none that can be loaded by its address.
        folder: address that ``file`` lies at.
        share: of the file at cloud.tsinghua.edu.cn, whose address has no name; ``file`` names timm's copy.
        size: height and width of the images.
        stride: pixels per pixel of the last map, None for a model without one.
        kwargs: entries beside, or instead of, those that most families have.
    """
    common: dict[str, Any] = {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None if stride is None else (size // stride, size // stride),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "classifier": "head.fc",
    }
    if file:
        common["url"] = (f"https://cloud.tsinghua.edu.cn/f/{share}/?dl=1", file) if share else folder + file
        common["custom_load"] = True
    return common | kwargs


def register_variants(
    module: str,
    model: type[nn.Module],
    variants: Mapping[str, Mapping[str, Any]],
    filter_fn: weights.FilterFn,
    out_indices: tuple[int, ...] = (0, 1, 2, 3),
) -> None:
    """Register each row of a family's table with timm, as a function of that name in the family's module.

    Args:
        module: ``__name__`` of the family's module, whose ``default_cfgs`` timm reads.
        model: class to build.
        variants: name to constructor arguments, which ``create_model``'s own override.
        filter_fn: the family's ``checkpoint_filter_fn``.
        out_indices: feature levels of ``features_only=True``.
    """
    for name, options in variants.items():
        entry = _entry_point(name, model, options, filter_fn, out_indices)
        entry.__name__ = entry.__qualname__ = name
        entry.__module__ = module
        setattr(sys.modules[module], name, register_model(entry))
        _names.append(name)


def _entry_point(
    name: str,
    model: type[nn.Module],
    options: Mapping[str, Any],
    filter_fn: weights.FilterFn,
    out_indices: tuple[int, ...],
) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        try:
            return build_model_with_cfg(
                partial(_construct, model, name, options),
                name,
                pretrained,
                pretrained_filter_fn=filter_fn,
                feature_cfg={"out_indices": out_indices, "feature_cls": "getter", "flatten_sequential": True},
                **{**options, **kwargs},
            )
        except URLError as error:
            url = getattr(timm.models.get_pretrained_cfg(name), "url", None)
            raise ConnectionError(
                f"cannot fetch the weights of {name!r} from {url}: {error}; "
                "without a network give the file as a checkpoint"
            ) from error
        except RuntimeError as error:
            where = _where_weights_are(name)
            if not where or not str(error).startswith("No pretrained weights"):
                raise
            raise RuntimeError(f"{str(error).rstrip('.')}{where}") from error

    return entry


def _construct(model: type[nn.Module], name: str, options: Mapping[str, Any], /, **kwargs: Any) -> nn.Module:
    """The model, built from what timm has not taken for itself, if it has arguments of these names."""
    known = {**options, **dict.fromkeys(_arguments(model))}
    if unknown := [argument for argument in kwargs if argument not in known]:
        sized = unknown[0] == "img_size"
        advice = "it takes images of any size as it is" if sized else hint(unknown[0], list(known))
        where = f"{model.__module__}.{model.__name__}"
        raise TypeError(f"{name} has no argument {unknown[0]!r}, {advice} (see help({where}))")
    return model(**kwargs)


def _arguments(model: type[nn.Module]) -> list[str]:
    """Names of the constructor's arguments, and of optional ones that it passes on to those of its base classes."""
    names: list[str] = []
    for cls in model.__mro__:
        if "__init__" in vars(cls):
            parameters = list(signature(vars(cls)["__init__"]).parameters.values())[1:]
            named = [p for p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)]
            names += [p.name for p in named if cls is model or p.default is not Parameter.empty]
            if all(p.kind is not Parameter.VAR_KEYWORD for p in parameters):
                break
    return names

"""Foreign checkpoints: reading them without executing anything, renaming their keys, loading them into a model.

A torch checkpoint is a pickle, and unpickling one runs whatever it names. ``read_checkpoint`` allows the three names
that tensors need and puts a ``Placeholder`` wherever a file names anything else: nothing is imported or called, and the
training state beside the weights (configs, optimizers, numpy scalars) does no harm. Each family's
``checkpoint_filter_fn`` maps upstream's names to ours with ``unwrap`` and ``rename``.

timm's ways to load weights:

* ``pretrained=True`` with a default cfg's ``url``, or an overlay of ``file=..., custom_load=True``: timm hands the file
  to ``load_pretrained``: this reader, then timm's own adaptation of input channels and classifier.
* ``file=...`` alone, ``local-dir:`` and ``hf-hub:``: timm's reader, which executes nothing either but refuses files
  with other objects in them, then ``checkpoint_filter_fn``. Of a file with averaged weights beside the others timm's
  takes the averaged ones, this reader those that the authors evaluated (a model's ``checkpoint_key``).
* ``checkpoint_path=...``: timm's reader, then a strict load without any filter: for files under our own names, such as
  those that ``subquad convert`` writes.
"""

from __future__ import annotations

import collections
import io
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import load_pretrained as timm_load_pretrained
from torch import Tensor, nn

FilterFn = Callable[[dict[str, Any], nn.Module], dict[str, Tensor]]

WRAPPERS = ("model_ema", "state_dict_ema", "model", "state_dict")
"""Top-level keys under which training scripts keep the weights, in the order in which ``unwrap`` looks for them."""

_EXPECTED = "expected a safetensors file or a torch checkpoint (zip or legacy format)"

# Reading ---------------------------------------------------------------------------------------------------------


class Placeholder:
    """Stands for an object of a class outside the allow-list: accepts whatever a pickle does to it and keeps nothing.

    ``origin`` is the name that the file gave, a class attribute because pickle makes objects without ``__init__``.
    """

    origin = ""
    dump_patches = False  # asked of pickled modules by torch's reader of the legacy format

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Placeholder:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Drop what the pickle adds to a list or set."""

    extend = add = append


class _Allowed:
    """A function that a pickle may call but, unlike the function itself, cannot set attributes of."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("the file sets attributes of a function")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Allowed(torch._utils._rebuild_tensor_v2),
    ("torch._utils", "_rebuild_parameter"): _Allowed(torch._utils._rebuild_parameter),
}


class _InertUnpickler(pickle.Unpickler):
    """Resolves a name to an entry of the allow-list or a fresh placeholder class; torch resolves storages before."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        return type("Placeholder", (Placeholder,), {"origin": f"{module}.{name}"})


class _InertPickle:
    """What ``torch.load`` needs of a pickle module."""

    Unpickler = _InertUnpickler

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return _InertUnpickler(file, **options).load()


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a safetensors file or a torch checkpoint without executing or importing anything that it names.

    Args:
        path: a file; the format is told by its content, not by its name.

    Returns:
        The file's top-level dict: tensors on the CPU in their stored dtypes, nested dicts, plain Python values, and a
        ``Placeholder`` for every object of another class. ``unwrap`` picks the weights out of it.

    Raises:
        FileNotFoundError: no file at ``path``.
        ValueError: anything but a readable checkpoint with a dict on top, saying what was found.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file, {_EXPECTED}")
    if path.is_dir():
        raise ValueError(f"{path}: found a directory, {_EXPECTED}")
    with path.open("rb") as file:
        head = file.read(512)
    try:
        if head.startswith(b"PK\x03\x04"):
            checkpoint = _read_zip(path)
        elif head.startswith(b"\x80"):
            # From memory, because torch unpacks a tar archive that passes for a pickle when it is given a file.
            checkpoint = _torch_load(io.BytesIO(path.read_bytes()))
        elif head[8:9] == b"{":
            checkpoint = load_file(path)
        else:
            raise ValueError(_describe(head))
    except SafetensorError as error:
        raise ValueError(f"{path}: found a truncated or damaged safetensors file ({error})") from error
    except Exception as error:
        # Whatever a damaged or hostile file provokes inside torch.load, from EOFError to AttributeError.
        raise ValueError(f"{path}: {error or type(error).__name__}, {_EXPECTED}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: found {_kind(checkpoint)}, expected a dict of tensors or of state dicts")
    return _plain(checkpoint, depth=2)


def _read_zip(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"found a truncated or damaged zip archive ({error})") from error
    if any(record.filename.endswith("/constants.pkl") for record in records):
        raise ValueError("found a TorchScript archive, which is a program")
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("found a compressed zip archive, which torch.save never writes")
    with path.open("rb") as file:
        return _torch_load(file)


def _torch_load(file: Any) -> Any:
    # A function as map_location, because torch.jit.load, to which torch.load hands TorchScript archives, refuses that.
    try:
        return torch.load(file, lambda storage, _: storage, _InertPickle, weights_only=False)
    except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"found a truncated or otherwise unreadable torch checkpoint ({error})") from error


def _describe(head: bytes) -> str:
    text = head.lstrip().lower()
    if not head:
        return "found an empty file"
    if text.startswith(b"version https://git-lfs"):
        return "found a git-lfs pointer instead of the file it points to (fetch it with `git lfs pull`)"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "found a web page, probably the error page of a download"
    return f"found a file of unknown type that starts with {head[:8]!r}"


def _plain(value: Any, depth: int) -> Any:
    """Dicts without a subclass, tensors without the hooks and the gradient flag that a pickle may give them."""
    if isinstance(value, dict) and depth > 0:
        return {key: _plain(item, depth - 1) for key, item in dict.items(value)}
    return value.detach() if isinstance(value, Tensor) else value


def _kind(value: Any) -> str:
    if isinstance(value, Placeholder):
        return f"a pickled object of {value.origin}"
    return f"an object of type {type(value).__name__}"


# Names -----------------------------------------------------------------------------------------------------------


def wrapper_of(checkpoint: Mapping[str, Any], key: str | None = None) -> str | None:
    """The entry that ``unwrap`` takes the weights from: ``key``, else the first of ``WRAPPERS``, else None.

    A wrapper without tensors (averaged weights that were never filled, or kept as a pickled object) comes last.
    """
    if key is not None and key not in checkpoint:
        raise ValueError(f"no entry {key!r} in the checkpoint, found {_names(checkpoint)}")
    if key is not None:
        return key
    found = [name for name in WRAPPERS if isinstance(checkpoint.get(name), (Mapping, Placeholder))]
    return next((name for name in found if _has_tensors(checkpoint[name])), found[0] if found else None)


def wrapper_for(model: nn.Module, checkpoint: Mapping[str, Any], key: str | None = None) -> str | None:
    """As ``wrapper_of``, but the entry that the model's class names as ``checkpoint_key`` comes before ``WRAPPERS``."""
    own = getattr(model, "checkpoint_key", None)
    if key is None and own is not None and _has_tensors(checkpoint.get(own)):
        return own
    return wrapper_of(checkpoint, key)


def _has_tensors(entry: Any) -> bool:
    return isinstance(entry, Mapping) and any(isinstance(value, Tensor) for value in entry.values())


def unwrap(state_dict: Mapping[str, Any], key: str | None = None) -> dict[str, Tensor]:
    """The weights of a checkpoint, under the names that they have inside the model.

    Takes the state dict out of its wrapper (``WRAPPERS``, averaged weights first), drops what is not a tensor, and
    strips ``module.`` and ``_orig_mod.``. Where some names start with ``backbone.`` or ``model.``, only these are kept,
    without that prefix: the others belong to a detector's other parts or to a loss. Other state dicts pass unchanged.

    Args:
        state_dict: what ``read_checkpoint`` returned, or a state dict.
        key: the wrapper to take instead of the first of ``WRAPPERS`` that holds tensors.

    Returns:
        New dict of name to tensor; the tensors are not copied.

    Raises:
        ValueError: for an absent ``key``, no tensors, or an object of another class where a tensor is expected.
    """
    where = wrapper_of(state_dict, key)
    chosen: Any = state_dict if where is None else state_dict[where]
    place = "the checkpoint" if where is None else f"{where!r}"
    if not isinstance(chosen, Mapping):
        raise ValueError(f"{place} is {_kind(chosen)}, expected a dict of tensors")
    for name, value in chosen.items():
        if isinstance(value, Placeholder):
            raise ValueError(f"{place} has {_kind(value)} at {name!r}, expected a tensor")
    tensors = {str(name): value for name, value in chosen.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{place} holds no tensors, found {_names(chosen)}")
    return _strip_prefixes(tensors)


def _strip_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    changed = True
    while changed:
        changed = False
        for prefix, others_stay in (("module.", True), ("_orig_mod.", True), ("model.", False), ("backbone.", False)):
            if any(name.startswith(prefix) for name in tensors):
                changed = True
                tensors = {
                    name.removeprefix(prefix): value
                    for name, value in tensors.items()
                    if others_stay or name.startswith(prefix)
                }
    return tensors


def rename(state_dict: Mapping[str, Tensor], rules: Iterable[tuple[str, str | None]]) -> dict[str, Tensor]:
    r"""Rename keys by regular expressions.

    Args:
        state_dict: name to tensor.
        rules: (pattern, replacement) pairs, applied to each name in order as ``re.sub`` does; with None as replacement
            a name in which the pattern is found is dropped.

    Returns:
        New dict in the same order.

    Raises:
        ValueError: if two names become one.
    """
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    origin: dict[str, str] = {}
    for old in state_dict:
        if (new := _rename(old, compiled)) is None:
            continue
        if new in origin:
            raise ValueError(f"{origin[new]!r} and {old!r} both become {new!r}")
        origin[new] = old
    return {new: state_dict[old] for new, old in origin.items()}


def _rename(name: str, rules: list[tuple[re.Pattern[str], str | None]]) -> str | None:
    for pattern, replacement in rules:
        if replacement is not None:
            name = pattern.sub(replacement, name)
        elif pattern.search(name):
            return None
    return name


# Loading ---------------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """How a state dict differs from what a model expects; false when it does not.

    As text it lists every name, or where hardly anything fits says so and lists the first ones.
    """

    missing: list[str]
    unexpected: list[str]
    misshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # shape found, shape expected
    fitting: int  # how many tensors have name and shape as expected

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshaped)

    def __str__(self) -> str:
        found, wanted = (self.fitting + len(self.misshaped) + len(rest) for rest in (self.unexpected, self.missing))
        foreign = min(found, wanted) >= _TELLING and self._familiar < _FAMILIAR * min(found, wanted)
        shapes = [f"{name} is {have}, expected {want}" for name, (have, want) in self.misshaped.items()]
        parts = {"missing": self.missing, "unexpected": self.unexpected, "wrong shape": shapes}
        lines = [
            f"{label} ({len(names)}): {_names(names, 3 if foreign else len(names))}"
            for label, names in parts.items()
            if names
        ]
        if foreign:
            lines.insert(0, f"only {self.fitting} of {found} tensors fit: these seem to be weights of another model")
        return "\n".join(lines)

    @property
    def _familiar(self) -> int:
        """How many tensors fit, or have an expected name with something in front of it."""
        below = {name[i + 1 :] for name in self.unexpected for i, letter in enumerate(name) if letter == "."}
        return self.fitting + sum(name in below for name in self.missing)


_FAMILIAR = 0.25
"""Share of familiar tensors from which on it helps to see every name that does not fit."""

_TELLING = 8
"""Tensors from which on their names say whose they are: a file may hold a head alone."""


def compare(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Difference:
    """Every name and shape in which ``state_dict`` differs from ``expected`` (a model's ``state_dict()``)."""
    shared = [name for name in state_dict if name in expected]
    shapes = {name: (tuple(state_dict[name].shape), tuple(expected[name].shape)) for name in shared}
    misshaped = {name: (found, wanted) for name, (found, wanted) in shapes.items() if found != wanted}
    return Difference(
        missing=[name for name in expected if name not in state_dict],
        unexpected=[name for name in state_dict if name not in expected],
        misshaped=misshaped,
        fitting=len(shared) - len(misshaped),
    )


def filter_of(model: nn.Module) -> FilterFn:
    """``checkpoint_filter_fn`` of the family file that defines the model's class, or the nearest base class of it.

    Raises:
        TypeError: for a model of no family.
    """
    for cls in type(model).__mro__:
        filter_fn = getattr(sys.modules.get(cls.__module__), "checkpoint_filter_fn", None)
        if filter_fn is not None:
            return filter_fn
    raise TypeError(f"expected a model of a family with a checkpoint_filter_fn, got {type(model).__name__}")


def read_for(model: nn.Module, path: str | os.PathLike[str], key: str | None = None) -> dict[str, Tensor]:
    """The weights in a file under the names of ``model``, not compared with it yet; errors name the file."""
    checkpoint = read_checkpoint(path)
    try:
        return filter_of(model)(unwrap(checkpoint, wrapper_for(model, checkpoint, key)), model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], strict: bool = True, *, key: str | None = None
) -> Difference:
    """Load an official checkpoint, or one of ours, into a model of this library of the same sizes.

    Args:
        path, key: see ``read_checkpoint`` and ``unwrap``.
        strict: names that are missing or unexpected are errors. A wrong shape always is.

    Returns:
        The names that differ (none with ``strict``).

    Raises:
        FileNotFoundError, ValueError: see ``read_checkpoint``, ``unwrap`` and ``Difference``.
    """
    state_dict = read_for(model, path, key)
    difference = compare(state_dict, model.state_dict())
    if difference.misshaped or (strict and difference):
        raise ValueError(f"{path} does not fit {type(model).__name__}:\n{difference}")
    model.load_state_dict(state_dict, strict=strict)
    return difference


def load_pretrained(model: Any, path: str | os.PathLike[str]) -> None:
    """timm's ``custom_load`` hook: load the file that ``model.pretrained_cfg`` describes.

    timm adapts the first convolution to ``model.in_chans`` and drops the classifier where ``model.num_classes`` is not
    the cfg's; everything else must fit exactly.

    Raises:
        FileNotFoundError, ValueError: as ``load_checkpoint`` does.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if not cfg:
        load_checkpoint(model, path)
        return
    state_dict = read_for(model, path)
    adapted: set[str] = set()
    if model.num_classes != cfg["num_classes"]:
        adapted.update(f"{name}.{leaf}" for name in _as_tuple(cfg.get("classifier")) for leaf in ("weight", "bias"))
    if model.in_chans != cfg["input_size"][0]:
        adapted.update(f"{name}.weight" for name in _as_tuple(cfg.get("first_conv")))
    both = (state_dict, model.state_dict())
    fixed = ({name: value for name, value in names.items() if name not in adapted} for names in both)
    if difference := compare(*fixed):
        raise ValueError(f"{path} does not fit {type(model).__name__}:\n{difference}")
    source = dict(cfg, state_dict=state_dict, source="")
    timm_load_pretrained(model, pretrained_cfg=source, num_classes=model.num_classes, in_chans=model.in_chans)


def _names(found: Iterable[object], limit: int = 8) -> str:
    names = [str(name) for name in found]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "") or "nothing"


def _as_tuple(names: str | Iterable[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())

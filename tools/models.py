"""``subquad models``: a table of every model, and the README's made anew.

Parameters are counted, GFLOPs too: by the FLOP formulas of PyTorch and of this library's operators, a multiply-add as
one operation as in papers. Paper, licence and origin come from the default cfgs, accuracies from
``subquad.tools.benchmarks.systems``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from subquad.backbones.registry import hint, model_names
from subquad.tools.benchmarks.systems import TOP1

BEGIN, END = "<!-- begin of `subquad models` -->", "<!-- end of `subquad models` -->"

_CLEAR_LINE = "\r\x1b[K"
"""Clears a terminal's line."""


@dataclass
class Options:
    """Print a table of the models, or put it into a Markdown file."""

    models: tuple[str, ...] = ("*",)
    """Names or patterns; test models only by name."""

    write: Path | None = None
    """Markdown file whose table, between its two marker lines, is replaced."""


class Size(NamedTuple):
    """What a model takes: parameters, and 10^9 multiply-adds for one image of its default size."""

    parameters: int
    gflops: float
    pixels: int


def run(options: Options) -> str:
    """Make the table; prints it or writes it.

    Returns:
        The table.

    Raises:
        ValueError: for a pattern that no model matches, or a file without the two marker lines.
        FileNotFoundError: for a file that is not there.
    """
    if options.write is not None and not options.write.is_file():
        raise FileNotFoundError(f"no file {str(options.write)!r} with a table to replace between two marker lines")
    found = table(_select(options.models))
    if options.write is None:
        print(found)
    else:
        text = options.write.read_text()
        options.write.write_text(replace(text, found))
    return found


def replace(text: str, found: str) -> str:
    """``text`` with ``found`` between its marker lines.

    Raises:
        ValueError: if there are no marker lines.
    """
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no lines {BEGIN} and {END} to put the table between")
    return pattern.sub(lambda _: f"{BEGIN}\n\n{found}\n\n{END}", text)


def _select(patterns: Sequence[str]) -> list[str]:
    names = []
    for pattern in patterns:
        released = [name for name in model_names() if not name.startswith("test_") or pattern == name]
        if not (matching := [name for name in released if fnmatchcase(name, pattern)]):
            raise ValueError(f"no model matches {pattern!r}, {hint(pattern, model_names())}")
        names += [name for name in matching if name not in names]
    return names


def measure(name: str) -> Size:
    """Size of a model at its default input size; nothing is computed."""
    model: Any = timm.create_model(name, device="meta").eval()
    size = model.pretrained_cfg["input_size"]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *size, device="meta"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Size(parameters, counter.get_total_flops() / 2e9, size[-1])


def table(names: Sequence[str]) -> str:
    """Markdown: for each paper a heading line and a row for each of its models."""
    sizes = {name: measure(name) for name in _announced(names)}
    papers: dict[str, list[str]] = {}
    for name in names:
        papers.setdefault(_cfg(name)["paper_ids"], []).append(name)
    return "\n\n".join(_of_paper(identifier, models, sizes) for identifier, models in papers.items())


def _announced(names: Sequence[str]) -> Iterator[str]:
    """The names, each shown in a line that the next one replaces if somebody is watching: all take about a minute."""
    visible = sys.stderr.isatty()
    for i, name in enumerate(names, 1):
        if visible:
            print(f"{_CLEAR_LINE}counting {i} of {len(names)}: {name}", end="", file=sys.stderr, flush=True)
        yield name
    if visible:
        print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)


def _of_paper(identifier: str, names: list[str], sizes: Mapping[str, Size]) -> str:
    cfg = _cfg(names[0])
    link = f"[{identifier.replace(':', ' ')}](https://arxiv.org/abs/{identifier.partition(':')[2]})"
    lines = [f"**{cfg['paper_name']}** ({link}, [official code]({cfg['origin_url']}))", ""]
    lines += ["| name | parameters | GFLOPs | top-1 | licence |", "|---|---|---|---|---|"]
    for name in names:
        size = sizes[name]
        at = "" if size.pixels == 224 else f" at {size.pixels} px"
        top1 = f"{TOP1[name]:.1f}" if name in TOP1 else "-"
        licence = _cfg(name)["license"]
        lines.append(f"| `{name}` | {size.parameters:,} | {size.gflops:.2f}{at} | {top1} | {licence} |")
    notes = [note for note in cfg.get("notes", ()) if "licence" in note]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def _cfg(name: str) -> dict[str, Any]:
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None  # every model of the library has one
    return cfg.to_dict()

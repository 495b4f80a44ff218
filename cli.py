"""The command ``subquad``: finds the module of a subcommand, parses its options and runs it.

A subcommand is a module of ``subquad.tools`` with a dataclass ``Options`` and a function ``run(options)``. Only the
module that was asked for is imported.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from subquad._version import __version__

COMMANDS = {
    "train": "fine-tune a model on a folder of images, or on the handwritten digits that come with scikit-learn",
    "export": "write a model as a torch.export program, ONNX, safetensors or a folder that timm loads",
    "convert": "turn an official checkpoint into safetensors with this library's names",
    "mm_train": "train or test a detector or segmentor of MMDetection or MMSegmentation by config",
    "models": "list the models with parameters, GFLOPs, accuracy, paper and licence",
    "benchmark": "time ops or models beside their peers, after checking that they compute the same",
}

# What a user can cause: bad values, missing or unreadable files, an unreachable address, an extra that is not
# installed, settings under which a loss diverges.
_USER_ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
_USAGE_ERROR = 2
_INTERRUPTED = 130


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 after an error of the user, 130 after Ctrl-C.

    Args:
        args: the words after ``subquad``; those of the process by default.

    Raises:
        SystemExit: where a parser prints its help or rejects the arguments (status 0 or 2).
    """
    words = list(sys.argv[1:] if args is None else args)
    # Everything after the command's name is the command's own, --help included.
    end = next((i for i, word in enumerate(words) if not word.startswith("-")), len(words)) + 1
    options, arguments = _parser().parse_args(words[:end]), words[end:]
    if options.command is None:
        _parser().print_help(sys.stderr)
        return _USAGE_ERROR
    try:
        _run(options.command, arguments)
    except KeyboardInterrupt:
        print(f"subquad {options.command}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except _USER_ERRORS as error:
        if options.traceback:
            raise
        print(f"subquad {options.command}: error: {str(error) or type(error).__name__}", file=sys.stderr)
        return _USAGE_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="subquad",
        usage="subquad [--help] [--version] [--traceback] COMMAND [OPTIONS]",
        description="Sub-quadratic vision backbones.",
        epilog="commands:\n"
        + "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
        + "\n\n'subquad COMMAND --help' lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"subquad {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error instead of one line")
    parser.add_argument("command", nargs="?", type=_command, metavar="COMMAND", help="one of the commands below")
    return parser


def _command(name: str) -> str:
    if name in COMMANDS:
        return name
    close = get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"expected one of {', '.join(COMMANDS)}"
    raise argparse.ArgumentTypeError(f"unknown command '{name}', {hint}")


def _run(command: str, arguments: list[str]) -> None:
    tyro = _tyro()
    module: ModuleType = importlib.import_module(f"subquad.tools.{command}")
    module.run(tyro.cli(module.Options, args=arguments, prog=f"subquad {command}"))


def _tyro() -> Any:
    try:
        import tyro
    except ImportError as error:
        raise ImportError(
            'the command line needs tyro, which comes with the extras: pip install "subquad[train]"'
            ' (or "subquad[export]", "subquad[mm]")'
        ) from error
    return tyro

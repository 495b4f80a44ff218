"""Runs a script of MMDetection or MMSegmentation with this library registered first.

Some of their scripts import the models before they read the config, and with it ``custom_imports``. So
``python -m subquad.tools.mm_run mmdet/tools/test.py CONFIG CHECKPOINT``, or under torchrun
``torchrun --nproc-per-node 8 -m subquad.tools.mm_run mmseg/tools/train.py CONFIG --launcher pytorch``.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path


def find(script: str) -> Path:
    """A file, or ``mmdet/tools/test.py``: a script of an installed library.

    Raises:
        FileNotFoundError: neither.
    """
    if Path(script).is_file():
        return Path(script)
    library, _, inside = script.partition("/")
    spec = importlib.util.find_spec(library) if library.isidentifier() else None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (found := Path(folder) / ".mim" / inside).is_file():
            return found
    raise FileNotFoundError(f"no script {script!r}, expected a file or such as mmdet/tools/test.py")


def run(arguments: Sequence[str]) -> None:
    """Run ``arguments[0]`` with the arguments behind it, as ``python SCRIPT ...`` does."""
    import subquad.heads.openmmlab  # noqa: F401  registers with mmengine

    script = str(find(arguments[0]))
    sys.argv = [script, *arguments[1:]]
    sys.path.insert(0, str(Path(script).resolve().parent))  # a script may import what lies beside it
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m subquad.tools.mm_run SCRIPT [ARGUMENTS]")
    run(sys.argv[1:])

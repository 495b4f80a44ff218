"""``subquad benchmark {ops,models}``: our ops and models beside their floors and their peers, in the same run.

Without tyro and rich (on a bare GPU machine) the same from Python: ``benchmark.run(benchmark.OpsOptions(...))``.
"""

from __future__ import annotations

from typing import Annotated, Any

from subquad.tools.benchmarks import models, ops, report
from subquad.tools.benchmarks.models import ModelsOptions
from subquad.tools.benchmarks.ops import OpsOptions

__all__ = ["ModelsOptions", "OpsOptions", "Options", "run"]

Options: Any = OpsOptions | ModelsOptions
try:
    from tyro.conf import subcommand
except ImportError:
    pass  # only the command line names subcommands, and it cannot run without tyro
else:
    Options = Annotated[OpsOptions, subcommand("ops")] | Annotated[ModelsOptions, subcommand("models")]


def run(options: OpsOptions | ModelsOptions) -> list[report.Row]:
    """Run a benchmark, print its table, and write CSV and JSON to the output folder.

    Returns:
        The rows, by column name.

    Raises:
        ValueError: for names, shapes or devices that do not exist.
    """
    return ops.run(options) if isinstance(options, OpsOptions) else models.run(options)

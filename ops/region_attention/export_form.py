"""Region attention and its routing in operators that every exporter knows.

Made for ``ExportedProgram.run_decompositions``. The references gather by tables and sizes alone: they are the forms.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from subquad.ops.region_attention import reference
from subquad.ops.region_attention.call import RegionCall


def export_form(*args: Any) -> tuple[Tensor, Tensor]:
    """Same arguments and results as the operator ``subquad::region_attention``."""
    o, lse = reference.attend(RegionCall(*args))
    return o.contiguous(), lse.contiguous()


def routing_form(*args: Any) -> Tensor:
    """Same arguments and result as the operator ``subquad::region_routing``."""
    return reference.route(*args).contiguous()

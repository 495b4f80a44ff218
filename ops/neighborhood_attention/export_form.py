"""Neighborhood attention, whole and split, in operators that every exporter knows, in place of its own.

Made for ``ExportedProgram.run_decompositions({torch.ops.subquad.neighborhood_attention.default: export_form})``.
The reference gathers by tables that are computed from the map's size: it is the form.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from subquad.ops.neighborhood_attention import reference
from subquad.ops.neighborhood_attention.call import NeighborhoodCall


def export_form(*args: Any) -> tuple[Tensor, Tensor]:
    """Same arguments and results as the operator ``subquad::neighborhood_attention``."""
    o, lse = reference.attend(NeighborhoodCall(*args))
    return o.contiguous(), lse.contiguous()


def qk_export_form(*args: Any) -> Tensor:
    """Same arguments and result as the operator ``subquad::neighborhood_qk``."""
    return reference.qk(NeighborhoodCall.of_qk(*args)).contiguous()


def av_export_form(*args: Any) -> Tensor:
    """Same arguments and result as the operator ``subquad::neighborhood_av``."""
    return reference.av(NeighborhoodCall.of_av(*args)).contiguous()

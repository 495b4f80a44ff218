"""Neighborhood attention in operators that every exporter knows, in place of ``subquad::neighborhood_attention``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from subquad.ops.neighborhood_attention import reference
from subquad.ops.neighborhood_attention.call import NeighborhoodCall


def export_form(*args: Any) -> tuple[Tensor, Tensor]:
    """Same arguments and results as the operator ``subquad::neighborhood_attention``.

    Made for ``ExportedProgram.run_decompositions({torch.ops.subquad.neighborhood_attention.default: export_form})``.
    The reference gathers by tables that are computed from the map's size: it is the form.
    """
    o, lse = reference.attend(NeighborhoodCall(*args))
    return o.contiguous(), lse.contiguous()

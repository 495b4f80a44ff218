"""Window attention in operators that every exporter knows, in place of ``subquad::window_attention``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from subquad.ops.window_attention import reference
from subquad.ops.window_attention.call import WindowCall


def export_form(*args: Any) -> tuple[Tensor, Tensor]:
    """Same arguments and results as the operator ``subquad::window_attention``.

    Made for ``ExportedProgram.run_decompositions({torch.ops.subquad.window_attention.default: export_form})``. The
    reference rolls, pads and cuts by sizes alone: it is the form.
    """
    o, lse = reference.attend(WindowCall(*args))
    return o.contiguous(), lse.contiguous()

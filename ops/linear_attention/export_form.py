"""Linear attention in operators that every exporter knows, in place of ``subquad::linear_attention``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from subquad.ops.linear_attention import reference
from subquad.ops.linear_attention.call import AttentionCall


def export_form(*args: Any) -> tuple[Tensor, ...]:
    """Same arguments and results as the operator ``subquad::linear_attention``.

    Made for ``ExportedProgram.run_decompositions({torch.ops.subquad.linear_attention.default: export_form})``. The
    reference has nothing that depends on a size: it is the form.
    """
    o, statistics = reference.attend(AttentionCall(*args))
    return o.contiguous(), *statistics

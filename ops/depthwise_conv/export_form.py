"""The depthwise convolution in operators that every exporter knows, in place of ``subquad::depthwise_conv``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from subquad.ops.depthwise_conv import torch_impl
from subquad.ops.depthwise_conv.call import ConvCall


def export_form(*args: Any) -> Tensor:
    """Same arguments and result as the operator ``subquad::depthwise_conv``.

    Made for ``ExportedProgram.run_decompositions({torch.ops.subquad.depthwise_conv.default: export_form})``. The
    PyTorch path is one convolution and has nothing that depends on a size: it is the form.
    """
    return torch_impl.forward(ConvCall(*args))

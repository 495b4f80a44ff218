"""Gated linear attention in operators that every exporter knows, in place of ``subquad::gated_linear_attention``.

The chunks of ``torch_impl`` walked by two ``scan`` operators (an ONNX ``Scan`` each): forwards with everything inside a
chunk, backwards with what the chunk reads of the state alone. A step makes its exponentials itself, so that nothing of
size CHUNK * d_k a token is stored. No guard on a size: there is always one chunk more than needed, because a symbol
whose example is 1 is taken for the number 1, and examples should have a batch of two or more.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops._loop import scan
from subquad.ops.gated_linear_attention.call import GatedCall, log_decays
from subquad.ops.gated_linear_attention.exponents import CHUNK, exponent_sums


def export_form(*args: Any) -> Tensor:
    """Same arguments and result as the operator ``subquad::gated_linear_attention``: (B, N, H, d_v).

    Made for ``ExportedProgram.run_decompositions({torch.ops.subquad.gated_linear_attention.default: export_form})``;
    batch and length may be symbolic. Computes in float32 (float64 for float64 inputs).
    """
    call = GatedCall(*args)
    batch, length, heads, d_v = call.v.shape
    working = call.working_dtype
    q, k, v = _chunks(call.q.to(working)), _chunks(call.k.to(working)), _chunks(call.v.to(working))
    decays = log_decays(call.gates, call.gate_normalizer, working)
    gates = torch.cat([_chunks(decays[:, :, 0]), _chunks(decays[:, :, 1])], dim=3)  # (n, B, H, 2 c, d_k)

    sums = exponent_sums(CHUNK, working, q.device)
    # Cloned, because scan takes two views of one tensor for a mutation.
    inner, backward_inner, outer, backward_outer, pairs = (
        part.clone() for part in sums.split([CHUNK] * 4 + [CHUNK**2])
    )
    both = 1 + torch.eye(CHUNK, dtype=working, device=q.device)
    start = torch.zeros_like(k[0, :, :, :1].mT * v[0, :, :, :1])  # (B, H, d_k, d_v)
    forwards = scan(_step_with_pairs, (start,), (q, k, v, gates), (inner, outer, pairs, both))[1]
    from_end = tuple(value.flip(0) for value in (q, k, v, gates))
    backwards = scan(_step, (start,), from_end, (backward_inner, backward_outer))[1]

    out = (forwards + backwards.flip(0)).permute(1, 0, 3, 2, 4)  # (B, n, c, H, d_v)
    out = out.reshape(batch, _padded(length), heads, d_v)[:, :length]
    return (0.5 * call.scale * out).to(call.out_dtype).contiguous()


def _padded(length: int) -> int:
    return (length + 2 * CHUNK - 1) // CHUNK * CHUNK


def _chunks(value: Tensor) -> Tensor:
    """(B, N, H, d) to (n, B, H, c, d), with zeros behind the last token."""
    batch, length, heads, dim = value.shape
    value = F.pad(value, (0, 0, 0, 0, 0, _padded(length) - length))
    chunks = (length + 2 * CHUNK - 1) // CHUNK
    return value.reshape(batch, chunks, CHUNK, heads, dim).permute(1, 0, 3, 2, 4)


def _step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, inner: Tensor, outer: Tensor) -> Any:
    """A chunk of the backward direction: the state behind it, and what its rows (B, H, c, d_v) read of the state."""
    decay = torch.exp(inner @ gates)
    added = (k * torch.exp(outer @ gates)).mT @ v
    return decay[:, :, 0, :, None] * state + added, (q * decay) @ state


def _step_with_pairs(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    inner: Tensor,
    outer: Tensor,
    pairs: Tensor,
    both: Tensor,
) -> Any:
    """A chunk of the forward direction, with what its rows read of each other in both directions."""
    decay = torch.exp(inner @ gates)
    added = (k * torch.exp(outer @ gates)).mT @ v
    between = torch.exp(pairs @ gates).unflatten(2, (CHUNK, CHUNK))  # (B, H, t, s, d_k)
    weights = (between * q[:, :, :, None] * k[:, :, None]).sum(-1) * both
    return decay[:, :, -1, :, None] * state + added, (q * decay) @ state + weights @ v

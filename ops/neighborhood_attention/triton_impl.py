"""Neighborhood attention in Triton: forward and backward of sequences, maps and volumes.

Design. The tokens of a dilation group are a map of their own, whose tokens are addressed on the whole map: nothing is
gathered or copied. A program owns a *tile* of such a map, 8 x 8 queries of one head, and walks over the keys that any
of them sees (14 x 14 with K = 7) in *slabs* of 64, as products on the tensor cores; pairs that do not see each other
are masked by comparing the key's coordinates with the query's window. A sequence is a map of height 1 with tiles of 64.
A tile of a volume lies in one plane and walks over the slabs of each plane that it sees; planes of a map are constants.
Additional keys are blocks at the end of the walk. Neighbouring tiles read the keys that they share once from memory,
then from the cache.

The backward pass has no atomics: one kernel owns tiles of queries and makes dq, the other owns tiles of keys and
gathers dk and dv from slabs of the queries that see any of them. Both compute the logits again from the lse. The
gradient of the bias is, for each tile, a table of sums of dS along diagonals; two products with 0-1 matrices compute it
on the tensor cores, and PyTorch sums the tables of all tiles. A third kernel makes the gradients of additional keys
from parts of the queries, which PyTorch sums, too.

Limits: at most 128 channels a head (64 in float32).
Bytes, floors and measurements: tools/benchmarks/NOTES.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops import _compile, _triton
from subquad.ops._compile import Turn
from subquad.ops.neighborhood_attention._triton_backward import (
    neighborhood_attention_bwd_kernel_extra,
    neighborhood_attention_bwd_kernel_keys,
    neighborhood_attention_bwd_kernel_queries,
)
from subquad.ops.neighborhood_attention._triton_forward import neighborhood_attention_fwd_kernel
from subquad.ops.neighborhood_attention._triton_plan import Config, config_for, default_config, plan_for, with_axes
from subquad.ops.neighborhood_attention.call import Gradients, NeighborhoodCall


def _table(call: NeighborhoodCall) -> Tensor:
    """The bias; q where there is none."""
    return call.q if call.rpb is None else call.rpb.contiguous()


def _extra(call: NeighborhoodCall) -> tuple[Tensor, Tensor, int]:
    """Additional keys and values, q where there are none, and their number: the last arguments of kernels."""
    keys, values = (call.q if x is None else x.contiguous() for x in call[4:6])
    return keys, values, call.extra


def _compile_ahead(call: NeighborhoodCall) -> None:
    """Compile the kernels of a call that is about to run for the first time at once, and those of its gradients."""
    meta = _triton.on_meta(call)
    with _compile.compiling_ahead(call.q.device):
        o, lse = _forward(meta, default_config("forward", call))
    if call.q.requires_grad:
        with _compile.compiling_ahead(call.q.device, Turn.GRADIENTS):
            rows, *_ = _backward_queries(meta, o, lse, o, lse, default_config("queries", call))
            _backward_keys(meta, o, rows, default_config("keys", call))
            if call.extra:
                _backward_extra(meta, o, rows)


def forward(call: NeighborhoodCall) -> tuple[Tensor, Tensor]:
    """Output (B, *S, H, E) in q's dtype and lse (B, *S, H) in float32."""
    given, call = call, with_axes(call, 2)
    o, lse = _forward(call, config_for("forward", call, lambda config: _forward(call, config)))
    if call.q.dim() == given.q.dim():
        return o, lse
    size = given.q.shape[:-1]
    return o.view(*size, o.shape[-1]), lse.view(size)


def _forward(call: NeighborhoodCall, config: Config) -> tuple[Tensor, Tensor]:
    o = call.q.new_empty((*call.q.shape[:-1], call.v.shape[-1]))
    lse = call.q.new_empty(call.q.shape[:-1], dtype=torch.float32)
    plan = plan_for("forward", call, config, on_new=lambda: _compile_ahead(call))
    if call.q.shape[0]:
        with torch.cuda.device_of(call.q):
            plan.launch(
                "forward",
                neighborhood_attention_fwd_kernel,
                plan.grid,
                (call.q, call.k, call.v, _table(call), o, lse, call.scale, *plan.sizes, *_extra(call)),
                plan.meta,
            )
    return o, lse


def backward(call: NeighborhoodCall, grad_o: Tensor, grad_lse: Tensor, o: Tensor, lse: Tensor) -> Gradients:
    """Gradients of q, k, v, rpb and additional keys and values, in their dtypes; None for an absent argument."""
    given = call
    call = with_axes(call, 2)
    size = call.q.shape[:-1]
    o, lse, grad_o, grad_lse = o.contiguous(), lse.contiguous(), grad_o.contiguous(), grad_lse.contiguous()
    if call.q.dim() != given.q.dim():
        o, lse = o.view(*size, o.shape[-1]), lse.view(size)
        grad_o, grad_lse = grad_o.view_as(o), grad_lse.view_as(lse)

    def of_queries(config: Config) -> tuple[Tensor, Tensor, Tensor | None]:
        return _backward_queries(call, grad_o, grad_lse, o, lse, config)

    rows, grad_q, grad_rpb = of_queries(config_for("queries", call, of_queries))

    def of_keys(config: Config) -> tuple[Tensor, Tensor]:
        return _backward_keys(call, grad_o, rows, config)

    grad_k, grad_v = of_keys(config_for("keys", call, of_keys))
    grads = (grad_q, grad_k, grad_v, grad_rpb, *_backward_extra(call, grad_o, rows))
    return tuple(None if x is None or y is None else x.view_as(y) for x, y in zip(grads, given[:6], strict=True))


def _backward_queries(
    call: NeighborhoodCall, grad_o: Tensor, grad_lse: Tensor, o: Tensor, lse: Tensor, config: Config
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the other kernel needs of each query (its lse and <do, o> - dlse), and the gradients of q and rpb."""
    rows, grad_q = lse.new_empty((*lse.shape, 2)), torch.empty_like(call.q, memory_format=torch.contiguous_format)
    plan = plan_for("queries", call, config, grad_o, grad_lse, o, lse)
    tables = rows
    if call.rpb is not None:
        heads, meta = call.q.shape[-2], plan.meta
        shape = heads, plan.grid[0] // heads, 2 * meta["KZ"] - 1, meta["NY"], meta["NX"]
        tables = rows.new_zeros(shape) if meta["DEEP"] else rows.new_empty(shape)
    if call.q.shape[0]:
        with torch.cuda.device_of(call.q):
            plan.launch(
                "queries",
                neighborhood_attention_bwd_kernel_queries,
                plan.grid,
                (
                    call.q, call.k, call.v, _table(call), o, grad_o, lse, grad_lse, rows, grad_q, tables, call.scale,
                    *plan.sizes, *_extra(call),
                ),
                plan.meta,
            )  # fmt: skip
    if call.rpb is None:
        return rows, grad_q, None
    height, width = (2 * kernel - 1 for kernel in call.kernel_size[-2:])
    return rows, grad_q, tables.sum(1)[..., :height, :width].to(call.rpb.dtype, copy=True)


def _backward_keys(call: NeighborhoodCall, grad_o: Tensor, rows: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Gradients of k and v."""
    grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (call.k, call.v))
    plan = plan_for("keys", call, config, grad_o)
    if call.q.shape[0]:
        with torch.cuda.device_of(call.q):
            plan.launch(
                "keys",
                neighborhood_attention_bwd_kernel_keys,
                plan.grid,
                (call.q, call.k, call.v, _table(call), grad_o, rows, grad_k, grad_v, call.scale, *plan.sizes),
                plan.meta,
            )
    return grad_k, grad_v


def _backward_extra(call: NeighborhoodCall, grad_o: Tensor, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of additional keys and values."""
    keys, values = call.additional_keys, call.additional_values
    if keys is None or values is None:
        return None, None
    if not (call.q.shape[0] and call.extra):
        return torch.zeros_like(keys), torch.zeros_like(values)
    plan = plan_for("extra", call, default_config("keys", call), grad_o)
    parts = [rows.new_empty((plan.grid[2], *x.shape)) for x in (keys, values)]
    with torch.cuda.device_of(call.q):
        plan.launch(
            "extra",
            neighborhood_attention_bwd_kernel_extra,
            plan.grid,
            (call.q, grad_o, rows, *parts, call.scale, *plan.sizes, *_extra(call)),
            plan.meta,
        )
    return parts[0].sum(0).to(keys.dtype), parts[1].sum(0).to(values.dtype)

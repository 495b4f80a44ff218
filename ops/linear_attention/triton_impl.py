"""Linear attention in Triton: forward and backward.

Design. A program sweeps the tokens of one image and head, tile by tile, with the state [D, E] on chip: the keys and
values for S and the means, then the queries for the output; the backward pass sweeps the queries and the gradient of
the output for dS and dq, then keys and values for dk and dv. Feature map and rotary embedding are computed on the tiles
in float32, and nothing but inputs, outputs and statistics is ever in memory. Features enter the products rounded once,
to the operands of the tensor cores; sums over tokens, z and quotients are float32.

With enough images and heads to fill the GPU, or few tokens, one program does all sweeps: one launch a pass. Otherwise
tokens are split: a launch for each sweep, whose sums over the splits a small kernel adds up in a fixed order, so that
results do not change from run to run. ``softmax_weighted`` needs two more sweeps over the queries: for their mean
before everything else, and for their gradients after everything else.

Limits: the state on chip, padded to powers of two. E up to 128 and D up to 128; D up to 256 in bfloat16 without weights
and without the mean of the values.
Bytes, floors and measurements: tools/benchmarks/NOTES.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops import _compile, _triton
from subquad.ops._compile import Turn
from subquad.ops.linear_attention._triton_backward import linear_attention_bwd_kernel
from subquad.ops.linear_attention._triton_forward import (
    linear_attention_fwd_kernel,
    linear_attention_fwd_kernel_combine,
    linear_attention_kernel_sum,
)
from subquad.ops.linear_attention._triton_plan import (
    Config,
    Plan,
    as_rows,
    config_for,
    default_config,
    plan_for,
    readable,
)
from subquad.ops.linear_attention.call import AttentionCall, Gradients, Statistics, empty_statistics


class _Sums(NamedTuple):
    """Where a sweep over keys leaves its results: statistics, or rows of sums of splits."""

    state: Tensor
    key_mean: Tensor
    value_mean: Tensor
    maximum: Tensor
    sum: Tensor


def _compile_ahead(call: AttentionCall) -> None:
    """Compile the kernels of a call that is about to run for the first time at once, and those of its gradients."""
    meta = _triton.on_meta(call)
    with _compile.compiling_ahead(call.v.device):
        o, statistics = _forward(meta, default_config("forward", call))
    if any(value is not None and value.requires_grad for value in call[:5]):
        with _compile.compiling_ahead(call.v.device, Turn.GRADIENTS):
            _backward(meta, statistics, o, default_config("backward", call))


def forward(call: AttentionCall) -> tuple[Tensor, Statistics]:
    """Output (B, M, H, E) in v's dtype and the statistics that the backward pass needs."""
    call = readable(call)
    return _forward(call, config_for("forward", call, lambda config: _forward(call, config)))


def _forward(call: AttentionCall, config: Config) -> tuple[Tensor, Statistics]:
    plan = plan_for("forward", call, config, on_new=lambda: _compile_ahead(call))
    batch, tokens, heads, dim = call.q.shape
    values = call.v.shape[-1]
    o = call.v.new_empty((batch, tokens, heads, values))
    statistics = empty_statistics(call)
    weighted = call.normalizer == "softmax_weighted"
    whole = plan.splits == 1
    final = _Sums(*statistics[:3], statistics.log_sum, statistics.log_sum)
    strides = (dim * values, dim, values, dim, 1)
    q_content, k_content, cos, sin = _optional(call)

    def sweep(name: str, sums: _Sums, query_mean: Tensor, strides: tuple[int, ...], *sweeps: str) -> None:
        plan.launch(
            name,
            linear_attention_fwd_kernel,
            (plan.programs, 1, 1),
            (
                call.q, call.k, call.v, q_content, k_content, cos, sin, o, *sums[:3], query_mean, *sums[3:],
                *plan.sizes, *plan.strides, *strides, call.scale, call.eps,
            ),
            {**plan.meta, **{which: which in sweeps for which in ("MEAN", "KEYS", "QUERIES", "PARTIAL")}},
        )  # fmt: skip

    with torch.cuda.device_of(call.v):
        if whole:
            sweep("whole", final, statistics.query_mean, strides, *(["MEAN"] if weighted else []), "KEYS", "QUERIES")
            return o, statistics
        if weighted:
            part = _scratch(call, plan.splits, batch * heads, dim)
            sweep("mean", final, part, strides, "MEAN", "PARTIAL")
            _add_up(plan, "mean sum", part, statistics.query_mean, tokens)
        width = dim * values + dim + values + 8  # the last two numbers 16 bytes apart, as compiled ahead for
        part = _scratch(call, plan.splits * batch * heads, width)
        starts = (0, dim * values, dim * values + dim, width - 8, width - 4)
        sums = _Sums(*(part.view(-1)[start:] for start in starts))
        sweep("keys", sums, statistics.query_mean, (width, width, width, dim, width), "KEYS", "PARTIAL")
        plan.launch(
            "combine",
            linear_attention_fwd_kernel_combine,
            (batch * heads, -(-(dim * values) // plan.meta["BJ"]), 1),
            (
                *sums,
                *statistics[:3],
                statistics.log_sum,
                batch * heads,
                call.k.shape[1],
                plan.splits,
                width,
                call.scale,
            ),
            plan.meta | {"num_warps": 4},
        )
        sweep("queries", final, statistics.query_mean, strides, "QUERIES")
    return o, statistics


def backward(call: AttentionCall, statistics: Statistics, grad_o: Tensor) -> Gradients:
    """Gradients of q, k, v and of the content features, each of its argument's shape and dtype; None if absent."""
    call, grad_o = readable(call), as_rows(grad_o)
    statistics = Statistics(*(value.contiguous() for value in statistics))

    def run(config: Config) -> Gradients:
        return _backward(call, statistics, grad_o, config)

    return run(config_for("backward", call, run))


def _backward(call: AttentionCall, statistics: Statistics, grad_o: Tensor, config: Config) -> Gradients:
    plan = plan_for("backward", call, config, grad_o)
    batch, _, heads, dim = call.q.shape
    values = call.v.shape[-1]
    grads = tuple(
        None if value is None else torch.empty_like(value, memory_format=torch.contiguous_format) for value in call[:5]
    )
    dq, dk, dv, dqc, dkc = grads
    weighted = call.normalizer == "softmax_weighted"
    q_content, k_content, cos, sin = _optional(call)
    width = dim * values + dim + values
    sums = totals = extra = extra_total = statistics.state  # not there in a single program
    if plan.splits > 1:
        sums, totals = _scratch(call, plan.splits, batch * heads, width), _scratch(call, batch * heads, width)
        if weighted:
            extra, extra_total = _scratch(call, plan.splits, batch * heads, dim), _scratch(call, batch * heads, dim)

    def sweep(name: str, *sweeps: str) -> None:
        plan.launch(
            name,
            linear_attention_bwd_kernel,
            (plan.programs, 1, 1),
            (
                grad_o, call.q, call.k, call.v, q_content, k_content, cos, sin, *statistics, dq, dk, dv,
                dq if dqc is None else dqc, dk if dkc is None else dkc, sums, totals, extra, extra_total,
                *plan.sizes, *plan.strides, width, call.scale, call.eps,
            ),
            {**plan.meta, **{which: which in sweeps for which in ("SUMS", "KEYS", "GRADS")}},
        )  # fmt: skip

    with torch.cuda.device_of(call.v):
        if plan.splits == 1:
            sweep("whole", "SUMS", "KEYS", "GRADS")
            return grads
        sweep("queries", "SUMS", *([] if weighted else ["GRADS"]))
        _add_up(plan, "sum", sums, totals, 1)
        sweep("keys", "KEYS")
        if weighted:
            _add_up(plan, "weights sum", extra, extra_total, 1)
            sweep("gradients", "GRADS")
    return grads


def _add_up(plan: Plan, name: str, parts: Tensor, total: Tensor, divisor: int) -> None:
    """The sum over the splits, the first axis of ``parts``, over ``divisor``."""
    columns, block = total.numel(), plan.meta["BJ"]
    plan.launch(
        name,
        linear_attention_kernel_sum,
        (-(-columns // block), 1, 1),
        (parts, total, columns, plan.splits, float(divisor)),
        {"BJ": block, "num_warps": 4},
    )


def _optional(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Content features and tables; some tensor where there are none to read."""
    return (
        call.q if call.q_content is None else call.q_content,
        call.k if call.k_content is None else call.k_content,
        call.q if call.cos is None else call.cos,
        call.q if call.sin is None else call.sin,
    )


def _scratch(call: AttentionCall, *shape: int) -> Tensor:
    """Unfilled float32 memory beside v."""
    return call.v.new_empty(shape, dtype=torch.float32)

"""Gated linear attention in Triton: forward and backward, both directions from one read.

Design. Tokens are cut into *chunks* of C rows. A first kernel walks the chunks with one state on chip, from the first
chunk for the forward direction's and from the last for the backward direction's, and leaves at each chunk what enters
it. A second kernel has a program for each chunk: it reads its rows once for both directions and the two states, and
writes the output. Where images and heads are too few to fill the GPU, the walk is cut into *segments* that start from
zero, ``chain`` carries states from segment to segment, and a chunk's state is corrected by exp(sum of log decays since
the segment's start) * entering state. The backward pass is the same with adjoint states besides.

Inside a chunk all pairs of tokens meet in products of tensor cores. Where no channel decays below 2 ** -80 in the
chunk, the decay from row s to row t is a factor of t times the reciprocal of a factor of s. Otherwise pairs are
taken level by level of a binary tree, with factors that are at most 1 (see ``gated_linear_attention_fwd_kernel``).
Which of the two a program does depends on its chunk's gates alone. So nothing overflows, and a decay of exp(-20) or 0
is like any other.

Operands of products are rounded to bfloat16 for bfloat16 arguments, to tf32 for float16 (as many digits, and a state
cannot overflow) and split in three tf32 products for float32. States, decays and sums are float32; between the kernels
states have the operands' precision.
Bytes, floors and measurements: tools/benchmarks/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.ops import _compile, _triton
from subquad.ops._compile import Turn
from subquad.ops.gated_linear_attention._triton_backward import gated_linear_attention_bwd_kernel
from subquad.ops.gated_linear_attention._triton_forward import (
    gated_linear_attention_chain_kernel,
    gated_linear_attention_fwd_kernel,
    gated_linear_attention_states_kernel,
)
from subquad.ops.gated_linear_attention.call import GatedCall, Gradients


class Config(NamedTuple):
    """Launch choices of a pass for a shape class.

    Attributes:
        chunk: tokens of a chunk, a power of two from 16 on.
        keys: most key channels that a program works on at a time.
        values: most columns of v of a program.
        warps: of a program.
        registers: most of a thread.
        waves: programs wanted for each multiprocessor; a sequence with fewer is cut into segments.
    """

    chunk: int
    keys: int
    values: int
    warps: int
    registers: int
    waves: int


_CONFIGS = {
    # No chunks of 64: slower, and the tensor core instructions that triton 3.6 then takes on sm_90 make some kernels
    # wrong (see NOTES.md).
    ("forward", "16-bit operands"): Config(chunk=32, keys=32, values=64, warps=2, registers=255, waves=4),
    ("forward", "32-bit operands"): Config(chunk=32, keys=32, values=64, warps=4, registers=255, waves=4),
    ("forward", "many keys"): Config(chunk=32, keys=32, values=32, warps=4, registers=255, waves=4),
    ("backward", "16-bit operands"): Config(chunk=32, keys=32, values=64, warps=4, registers=255, waves=4),
    ("backward", "32-bit operands"): Config(chunk=16, keys=32, values=64, warps=4, registers=255, waves=4),
    ("backward", "many keys"): Config(chunk=32, keys=16, values=32, warps=4, registers=255, waves=4),
}
"""The one table of launch heuristics; ``SUBQUAD_AUTOTUNE=1`` searches ``_CANDIDATES`` instead."""

_CANDIDATES = [
    Config(chunk, keys, values, warps, 255, waves)
    for chunk, warps in ((16, 2), (16, 4), (32, 2), (32, 4))
    for keys, values in ((16, 64), (32, 32), (32, 64))
    for waves in (4, 8)
]


def _default_config(which: str, call: GatedCall) -> Config:
    """The table's launch choices for the ``"forward"`` or ``"backward"`` pass of a call."""
    if call.q.shape[-1] > 64:
        return _CONFIGS[which, "many keys"]
    return _CONFIGS[which, "16-bit operands" if call.q.dtype == torch.bfloat16 else "32-bit operands"]


def _config_for(which: str, call: GatedCall, run: Callable[[Config], object]) -> Config:
    """The table's launch choices, or with ``SUBQUAD_AUTOTUNE=1`` the fastest candidate."""
    key = ("gated_linear_attention", which, *call.q.shape, call.v.shape[-1], call.q.dtype, call.gate_normalizer)
    return _triton.tuned(key, call.q, _CANDIDATES, _default_config(which, call), run)


class _Plan(NamedTuple):
    """What all calls of one shape class share."""

    chunks: int
    segments: int
    value_blocks: int
    tile_dtype: torch.dtype
    sizes: tuple[int, ...]  # length to groups of every kernel's arguments
    strides: tuple[int, ...]  # of q, k, v and gates
    more_strides: tuple[int, ...]  # of the gradient, or v's
    meta: dict[str, Any]
    states_meta: dict[str, Any]
    launch: _triton.Launcher

    @property
    def two_level(self) -> bool:
        return self.segments > 1


_plans: _triton.Plans[_Plan] = _triton.Plans()


def _plan_for(
    which: str, call: GatedCall, config: Config, *more: Tensor, on_new: Callable[[], None] | None = None
) -> _Plan:
    """The plan of a call's shape class: all that the kernels are compiled for.

    Args:
        which: "forward" or "backward".
        more: tensors besides the call's that the kernels see.
        on_new: see ``Plans.get``.
    """
    key = (which, config, *call[4:], *map(_triton.facts, (*call[:4], *more)))
    return _plans.get(key, call.q, lambda: _make_plan(which, call, config, *more), on_new)


def _make_plan(which: str, call: GatedCall, config: Config, *more: Tensor) -> _Plan:
    batch, length, heads, d_k = call.q.shape
    d_v = call.v.shape[-1]
    # A short sequence in a chunk of its size: padded rows cost as much as others.
    chunk = min(config.chunk, max(16, triton.next_power_of_2(length)))
    values = min(config.values, d_v)
    kinds = 2 if which == "forward" else 4
    chunks, value_blocks = triton.cdiv(length, chunk), d_v // values
    wanted = config.waves * _triton.multiprocessor_count(call.q.device)
    segment_chunks = max(1, min(chunks, round(chunks * batch * heads * kinds * value_blocks / wanted)))
    segments = triton.cdiv(chunks, segment_chunks)
    narrow = call.q.dtype == torch.bfloat16
    meta = {
        "K": d_k,
        "BK": min(config.keys, d_k),
        "V": d_v,
        "BV": values,
        "C": chunk,
        "LEVELS": chunk.bit_length() - 1,
        "TWO_LEVEL": segments > 1,
        "LOGITS": call.gate_normalizer is not None,
        "INVERSE": 1.0 if call.gate_normalizer is None else 1.0 / call.gate_normalizer,
        "SCALE": 0.5 * call.scale,
        # The interpreter cannot multiply bfloat16.
        "DOT": tl.bfloat16 if narrow and not _triton.interpreting() else tl.float32,
        "PRECISION": "tf32x3" if call.q.dtype == torch.float32 else "tf32",
        "num_warps": config.warps,
        "maxnreg": config.registers,
        "num_stages": 1,
    }
    return _Plan(
        chunks=chunks,
        segments=segments,
        value_blocks=value_blocks,
        tile_dtype=torch.bfloat16 if narrow else torch.float32,
        sizes=(length, heads, chunks, segments, segment_chunks, batch * heads),
        strides=_strides(*call[:4]),
        more_strides=_strides(*(more or (call.v,))),
        meta=meta,
        states_meta={**meta, "GRAD": kinds == 4, "num_stages": 2, "maxnreg": 255},
        launch=_triton.Launcher(),
    )


def _compile_ahead(call: GatedCall, config: Config) -> None:
    """Compile all kernels of a call that is about to run for the first time at once, and those of its gradients."""
    meta = _triton.on_meta(call)
    with _compile.compiling_ahead(call.q.device):
        out = _forward(meta, config)
    if any(value.requires_grad for value in call[:4]):
        with _compile.compiling_ahead(call.q.device, Turn.GRADIENTS):
            _backward(meta, out, _default_config("backward", call))


class _Between(NamedTuple):
    """What the kernels hand to each other, for S and P and with gradients for dS and dP.

    Attributes:
        tiles: (kinds, B * H, chunks, d_k * d_v), what enters each chunk when zero enters its segment.
        sums: (kinds, B * H, chunks, d_k), sums of log decays since the segment's start.
        entries: (kinds, B * H, segments, d_k * d_v), what enters each segment.
    """

    tiles: Tensor
    sums: Tensor
    entries: Tensor


def _states(call: GatedCall, grad: Tensor | None, plan: _Plan) -> _Between:
    kinds = 2 if grad is None else 4
    groups, d_k, size = plan.sizes[-1], call.q.shape[-1], call.q.shape[-1] * call.v.shape[-1]
    tiles = call.q.new_empty((kinds, groups, plan.chunks, size), dtype=plan.tile_dtype)
    sums = ends = totals = tiles
    if plan.two_level:
        sums = _scratch(call, kinds, groups, plan.chunks, d_k)
        ends = _scratch(call, kinds, groups, plan.segments, size)
        totals = _scratch(call, kinds, groups, plan.segments, d_k)
    grad = call.v if grad is None else grad
    plan.launch(
        "states",
        gated_linear_attention_states_kernel,
        (groups * plan.segments * kinds, plan.value_blocks, 1),
        (*call[:4], grad, tiles, sums, ends, totals, *plan.strides, *plan.more_strides, *plan.sizes, kinds),
        plan.states_meta,
    )
    if not plan.two_level:
        return _Between(tiles, tiles, tiles)
    entries = torch.empty_like(ends)
    block = 64
    at_once = min(16, triton.next_power_of_2(plan.segments))
    plan.launch(
        "chain",
        gated_linear_attention_chain_kernel,
        (groups, size // block, kinds),
        (ends, totals, entries, plan.segments, groups),
        {"K": d_k, "V": call.v.shape[-1], "BS": at_once, "BJ": block, "num_warps": 2},
    )
    return _Between(tiles, sums, entries)


def forward(call: GatedCall) -> Tensor:
    """Output (B, N, H, d_v) in ``out_dtype``."""
    call = _with_rows(call)
    return _forward(call, _config_for("forward", call, lambda config: _forward(call, config)))


def _forward(call: GatedCall, config: Config) -> Tensor:
    plan = _plan_for("forward", call, config, on_new=lambda: _compile_ahead(call, config))
    out = call.v.new_empty(call.v.shape, dtype=call.out_dtype)
    with torch.cuda.device_of(call.q):
        between = _states(call, None, plan)
        plan.launch(
            "output",
            gated_linear_attention_fwd_kernel,
            (plan.sizes[-1] * plan.chunks, plan.value_blocks, 1),
            (*call[:4], out, *between, *plan.strides, *plan.sizes),
            plan.meta,
        )
    return out


def backward(call: GatedCall, grad: Tensor) -> Gradients:
    """Gradients of q, k, v and gates for the gradient (B, N, H, d_v) of the output, each in its argument's dtype."""
    call = _with_rows(call)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    return _backward(call, grad, _config_for("backward", call, lambda config: _backward(call, grad, config)))


def _backward(call: GatedCall, grad: Tensor, config: Config) -> Gradients:
    plan = _plan_for("backward", call, config, grad)
    grads = [torch.empty_like(value, memory_format=torch.contiguous_format) for value in call[:4]]
    parts = grads.copy()
    if plan.value_blocks > 1:
        for i in (0, 1, 3):
            parts[i] = _scratch(call, plan.value_blocks, *grads[i].shape)
    with torch.cuda.device_of(call.q):
        between = _states(call, grad, plan)
        plan.launch(
            "gradients",
            gated_linear_attention_bwd_kernel,
            (plan.sizes[-1] * plan.chunks, plan.value_blocks, 1),
            (*call[:4], grad, *parts, *between, *plan.strides, *plan.more_strides, *plan.sizes),
            plan.meta,
        )
    if plan.value_blocks > 1:
        for i in (0, 1, 3):
            torch.sum(parts[i], 0, dtype=grads[i].dtype, out=grads[i])
    return grads[0], grads[1], grads[2], grads[3]


def _scratch(call: GatedCall, *shape: int) -> Tensor:
    """Unfilled float32 memory beside the arguments."""
    return call.q.new_empty(shape, dtype=torch.float32)


def _with_rows(call: GatedCall) -> GatedCall:
    """The call with every row of numbers contiguous, as the kernels read them; what is not is copied."""
    if all(value.stride(-1) == 1 for value in call[:4]):
        return call
    q, k, v, gates = (value if value.stride(-1) == 1 else value.contiguous() for value in call[:4])
    return call._replace(q=q, k=k, v=v, gates=gates)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Of all axes but the last, tensor by tensor."""
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:-1])

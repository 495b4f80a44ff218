"""How a call of linear attention is laid out for the Triton kernels: splits, launch choices, inputs as read.

See triton_impl.py for the design.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.ops import _triton
from subquad.ops.linear_attention.call import USES_VALUE_MEAN, AttentionCall

_WIDEST = 2**24  # stride of a token up to which offsets inside a tile fit 32 bits
_FEW_TOKENS = 256  # a sweep too short to be shared


class Config(NamedTuple):
    """Launch choices of a pass for a shape class.

    Attributes:
        tokens: tokens of a tile.
        warps: warps of a program.
        stages: tiles on their way at once.
        programs: programs wanted for each multiprocessor; with fewer images and heads, tokens are split.
    """

    tokens: int
    warps: int
    stages: int
    programs: int


_CONFIGS = {
    ("forward", 16): Config(128, 4, 3, 8),
    ("forward", 32): Config(128, 4, 3, 8),
    ("forward", 64): Config(64, 4, 3, 8),
    ("forward", 128): Config(64, 8, 2, 4),
    ("forward", 256): Config(32, 8, 2, 4),
    ("backward", 16): Config(64, 4, 3, 8),
    ("backward", 32): Config(64, 4, 3, 8),
    ("backward", 64): Config(64, 4, 3, 8),
    ("backward", 128): Config(32, 8, 3, 4),
    ("backward", 256): Config(32, 8, 2, 4),
}
_CROWDED = {("backward", 64): Config(32, 4, 3, 8)}
"""For calls with more on chip: tables, the mean of the values, weights."""
_WIDE_OPERANDS = {
    16: Config(64, 4, 2, 8),
    32: Config(32, 4, 2, 8),
    64: Config(32, 4, 2, 8),
    128: Config(32, 8, 2, 4),
}
"""For float16 and float32, whose operands have 32 bits."""
_WIDEST_OPERANDS = Config(16, 8, 2, 4)
"""For float32 and larger states than ``_SMALL_STATE``, whose parts do not fit on chip: no tensor cores."""
_SMALL_STATE = 128 * 64  # numbers, padded
# The tables of launch heuristics, by the wider of the padded head dimensions; SUBQUAD_AUTOTUNE=1 searches instead:
_CANDIDATES = [
    Config(tokens, warps, stages, programs)
    for tokens in (32, 64, 128)
    for warps in (4, 8)
    for stages in (2, 3)
    for programs in (4, 8, 16)
]


def default_config(which: str, call: AttentionCall) -> Config:
    """The table's launch choices for the ``"forward"`` or ``"backward"`` pass of a call."""
    width = max(_padded(call.q), _padded(call.v))
    if call.v.dtype == torch.float32 and not _has_small_state(call):
        return _WIDEST_OPERANDS
    if call.v.dtype != torch.bfloat16:
        return _WIDE_OPERANDS[width]
    crowded = call.cos is not None or call.normalizer in (*USES_VALUE_MEAN, "softmax_weighted")
    return _CROWDED.get((which, width), _CONFIGS[which, width]) if crowded else _CONFIGS[which, width]


def _has_small_state(call: AttentionCall) -> bool:
    return _padded(call.q) * _padded(call.v) <= _SMALL_STATE


def config_for(which: str, call: AttentionCall, run: Callable[[Config], object]) -> Config:
    """The same, or with ``SUBQUAD_AUTOTUNE=1`` what was fastest when ``run`` did the pass with each candidate."""
    key = (
        "linear_attention", which, *call.q.shape, *call.v.shape[1::2], call.normalizer, call.feature_map,
        call.q_content is not None, call.cos is not None, call.v.dtype,
    )  # fmt: skip
    default = default_config(which, call)
    # without tensor cores larger tiles take minutes to compile
    candidates = [default] if default == _WIDEST_OPERANDS else _CANDIDATES
    return _triton.tuned(key, call.v, candidates, default, run)


def _padded(x: Tensor) -> int:
    """Head dimension of a tile: a power of two that the tensor cores take."""
    return max(16, 1 << (x.shape[-1] - 1).bit_length())  # triton's own function takes as long as a view


class Plan(NamedTuple):
    """What all calls of one shape class share."""

    splits: int
    programs: int
    sizes: tuple[int, ...]  # queries to key_chunk of every kernel's arguments
    strides: tuple[int, ...]  # of tokens, in the backward pass grad_o's first, and of tables
    meta: dict[str, Any]
    launch: _triton.Launcher


_plans: _triton.Plans[Plan] = _triton.Plans()


def plan_for(
    which: str,
    call: AttentionCall,
    config: Config,
    grad_o: Tensor | None = None,
    on_new: Callable[[], None] | None = None,
) -> Plan:
    """The plan of a call's shape class: all that the kernels are compiled for.

    Args:
        which: "forward" or "backward".
        on_new: see ``Plans.get``.
    """
    key = (which, config, call.normalizer, call.feature_map, *map(_triton.facts, (*call[:7], grad_o)))
    return _plans.get(key, call.v, lambda: _make_plan(call, config, grad_o), on_new)


def _make_plan(call: AttentionCall, config: Config, grad_o: Tensor | None) -> Plan:
    batch, queries, heads, _ = call.q.shape
    keys = call.k.shape[1]
    tokens, programs = max(queries, keys), batch * heads
    splits = 1
    if tokens > _FEW_TOKENS and programs < (wanted := config.programs * _triton.multiprocessor_count(call.v.device)):
        splits = min(triton.cdiv(wanted, programs), triton.cdiv(tokens, _FEW_TOKENS))
    chunk = _chunk(tokens, splits, config.tokens)
    splits = triton.cdiv(tokens, chunk)
    exact = call.v.dtype == torch.float32
    narrow = call.v.dtype == torch.bfloat16 and not _triton.interpreting()  # which cannot multiply it
    if exact:
        precision = "tf32x3" if _has_small_state(call) else "ieee"
    else:
        precision = "ieee" if narrow else "tf32"  # which holds all of a float16
    parts = 2 if narrow or (not exact and _has_small_state(call)) else 1
    meta = {
        "D": call.q.shape[-1],
        "E": call.v.shape[-1],
        "BN": config.tokens,
        "BD": _padded(call.q),
        "BE": _padded(call.v),
        "BJ": 512,
        "BV": max(_padded(call.q), _padded(call.v)),
        "KIND": call.normalizer,
        "MAP": call.feature_map,
        "CONTENT": call.q_content is not None,
        "ROTARY": call.cos is not None,
        "DOT": tl.bfloat16 if narrow else tl.float32,
        "PRECISION": precision,
        "PARTS": parts if call.normalizer in USES_VALUE_MEAN else 1,
        "PARTS_Q": parts if call.normalizer != "none" else 1,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    sizes = (
        queries, keys, heads, splits, _chunk(queries, splits, config.tokens), _chunk(keys, splits, config.tokens),
    )  # fmt: skip
    q_content = call.q if call.q_content is None else call.q_content
    k_content = call.k if call.k_content is None else call.k_content
    first = () if grad_o is None else (grad_o,)
    strides = (*_token_strides(*first, *call[:3], q_content, k_content), *_table_strides(call))
    return Plan(splits, programs * splits, sizes, strides, meta, _triton.Launcher())


def _chunk(tokens: int, splits: int, tile: int) -> int:
    """Tokens of a split, whole tiles."""
    return triton.cdiv(triton.cdiv(tokens, splits), tile) * tile


def readable(call: AttentionCall) -> AttentionCall:
    """The call with tensors as the kernels read them; only what is not laid out that way is copied."""
    rows = [None if x is None else as_rows(x) for x in call[:5]]
    tables = [None if x is None else x.float().contiguous() for x in call[5:7]]
    return AttentionCall._make([*rows, *tables, *call[7:]])


def as_rows(x: Tensor) -> Tensor:
    """(B, N, H, .) with adjacent channels."""
    adjacent = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if adjacent and x.stride(1) < _WIDEST else x.contiguous()


def _token_strides(*tensors: Tensor) -> tuple[int, ...]:
    """Strides of an image, a token and a head of each."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def _table_strides(call: AttentionCall) -> tuple[int, int]:
    """Strides of a token and a head of the rotary tables; 0 for all heads alike."""
    if call.cos is None:
        return 0, 0
    return call.cos.stride(0), call.cos.stride(1) if call.cos.shape[1] > 1 else 0

"""Non-causal linear attention: the contract.

Queries i = 1..M, keys and values j = 1..N, for each image and head. Two kinds of features of the queries and keys:

    normaliser features   q_n = phi(q), k_n = phi(k)
    content features      q_c = R q_n, k_c = R k_n with the rotary embedding R; or q_content and k_content as given

From them, with a scale s and a small eps:

    S = (s/N) sum_j k_c[j] v[j]^T    kbar = (1/N) sum_j k_n[j]    vbar = (1/N) sum_j v[j]
    num_i = q_c[i] S                 z_i = s <q_n[i], kbar>

    normaliser          o_i                                            used by
    divide              num_i / (z_i + eps)                            MLLA, NaLaFormer, FLatten, PolaFormer, SLAB
    subtract            num_i + (1 - z_i) vbar                         InLine
    magnitude           num_i (1 + 1 / (z_i + eps)) - z_i vbar         MAViT
    clamp               num_i / max(z_i, eps)                          L2ViT
    none                num_i
    softmax_weighted    divide with s = 1 after k_n[j] <- w_j k_n[j], k_c[j] <- w_j k_c[j], where
                        w_j = N softmax_j(s <qbar, k_n[j]>) and qbar is the mean of q_n        RAVLT

eps is added to the mean over the keys; a normaliser of sums, sum_j <q, k_j> + eps, is ``divide`` with eps / N.
phi is one of ``FEATURE_MAPS``. R turns the channel pair (2t, 2t + 1) of token n by an angle whose cosine and sine are
the tables' entries [n, head, t]: (a, b) -> (a cos - b sin, b cos + a sin). The normaliser never sees it, because the
released models compute it from features that are not rotated; so the weights of MAViT do not sum to 1.

Sources: arXiv 2405.16605 (MLLA, ``divide``), 2412.06590 (InLine), 2507.00698 (MALA, equation of the rectified form),
2411.07635 (RALA, augmented keys), and Katharopoulos et al., arXiv 2006.16236.

Layout is (B, tokens, heads, channels), with any strides. q, k, v and content features share one dtype: float32,
bfloat16, float16 or float64. Autocast casts them all, unless ``feature_map`` is "identity": features that come as they
are, often powers that 16 bits cannot hold, keep their dtype, and v takes it. Features, sums over tokens, softmax, z,
the quotient and the tables are float32 (float64 with float64 inputs), and the output is rounded once at the end.
q, k, v, q_content and k_content are differentiable, the tables are not. Beside its inputs the op keeps only
``Statistics`` for the backward pass: nothing of size N, and nothing of size D x E for each token. Both passes over
tokens are sums and products that an implementation may split: a state reduction over the keys, then an apply over the
queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.ops import _checks, _dispatch, _library, _triton
from subquad.ops.linear_attention import reference
from subquad.ops.linear_attention.call import (
    FEATURE_MAPS,
    NEEDS_POSITIVE_FEATURES,
    NORMALIZERS,
    AttentionCall,
    Statistics,
    empty_statistics,
)

__all__ = ["FEATURE_MAPS", "NORMALIZERS", "AttentionCall", "Statistics", "linear_attention"]

_OP = "linear_attention"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normalizer: str = "divide",
    feature_map: str = "identity",
    rotary: tuple[Tensor, Tensor] | None = None,
    q_content: Tensor | None = None,
    k_content: Tensor | None = None,
    scale: float = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """Attend to all keys in time linear in their number; see the module's docstring for the formula.

    Args:
        q: (B, M, H, D).
        k: (B, N, H, D).
        v: (B, N, H, E).
        normalizer: one of ``NORMALIZERS``.
        feature_map: one of ``FEATURE_MAPS``, applied to q and k.
        rotary: (cos, sin), each (N, 1, D / 2) for all heads alike or (N, H, D / 2); for M = N only.
        q_content, k_content: content features of q's and k's shape, used as they are, in place of rotated ones.
        scale: s, positive where a normaliser divides by z.
        eps: what keeps a division finite; not negative, and 0 only for features of which none is 0.

    Returns:
        (B, M, H, E) in the inputs' dtype (under autocast in the dtype that they are cast to), contiguous.

    Raises:
        TypeError: for a non-tensor or a dtype that is not supported or not shared.
        ValueError: for shapes, devices or options that do not fit, naming the argument, and for features that are
            negative, or with eps = 0 not positive, under a normaliser that divides by their products (on a CPU; on a
            GPU the check would wait for it).
    """
    call = prepare(
        q,
        k,
        v,
        normalizer=normalizer,
        feature_map=feature_map,
        rotary=rotary,
        q_content=q_content,
        k_content=k_content,
        scale=scale,
        eps=eps,
    )
    if _dispatch.requested() == "reference":
        # Outside the operator, so that autograd differentiates the formula itself.
        _check_features(call)
        return reference.attend(call)[0]
    return _operator(*call)[0]


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normalizer: str = "divide",
    feature_map: str = "identity",
    rotary: tuple[Tensor, Tensor] | None = None,
    q_content: Tensor | None = None,
    k_content: Tensor | None = None,
    scale: float = 1.0,
    eps: float = 1e-6,
) -> AttentionCall:
    """Check the public arguments and bring them to canonical form; see ``linear_attention``."""
    _check_options(normalizer, feature_map, scale, eps)
    _checks.check_tensor(_OP, "q", q)
    autocast = _library.autocast_dtype(q.device) if q.dtype != torch.float64 else None
    tables = (None, None) if rotary is None else _pair(rotary)
    trained = any(isinstance(table, Tensor) and table.requires_grad for table in tables)
    key = _checks.shape_class(q, k, v, q_content, k_content, *tables, options=(autocast is None, trained))
    if not _passed.has(key):
        given = {"q": q, "k": k, "v": v, "q_content": q_content, "k_content": k_content}
        for name, value in given.items():
            if value is not None or len(name) == 1:
                _checks.check_tensor(_OP, name, value)
        _check_shapes(q, k, v, q_content, k_content)
        if rotary is not None:
            _check_rotary(tables, q, k, q_content)
        for name, value in given.items():
            if value is not None:
                _checks.check_dtype(_OP, name, value, (q.dtype,) if autocast is None and name != "q" else _DTYPES)
                _checks.check_device(_OP, name, value, q.device)
        _passed.add(key)
    cos, sin = (table if table is None or table.dtype == torch.float64 else table.float() for table in tables)
    if autocast is not None:
        dtype = torch.promote_types(q.dtype, k.dtype) if feature_map == "identity" else autocast
        q, k, v = (value.to(dtype) for value in (q, k, v))
        if q_content is not None and k_content is not None:
            q_content, k_content = q_content.to(dtype), k_content.to(dtype)
    return AttentionCall(q, k, v, q_content, k_content, cos, sin, normalizer, feature_map, float(scale), float(eps))


_passed = _checks.Passed()


def _check_options(normalizer: str, feature_map: str, scale: float, eps: float) -> None:
    if normalizer not in NORMALIZERS:
        raise ValueError(f"{_OP}: unknown normalizer {normalizer!r}, expected one of {list(NORMALIZERS)}")
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"{_OP}: unknown feature_map {feature_map!r}, expected one of {list(FEATURE_MAPS)}")
    _checks.check_factor(_OP, "scale", scale)
    if _checks.check_factor(_OP, "eps", eps) < 0:
        raise ValueError(f"{_OP}: eps must not be negative, got {eps}")
    if normalizer in ("divide", "magnitude", "clamp") and scale <= 0:
        raise ValueError(
            f"{_OP}: the normalizer {normalizer!r} divides by z, which takes the sign of scale: it must be positive, "
            f"got {scale}"
        )
    if normalizer in NEEDS_POSITIVE_FEATURES and feature_map == "relu" and eps == 0:
        raise ValueError(f"{_OP}: the normalizer {normalizer!r} needs eps above 0 for 'relu', whose features may be 0")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, q_content: Tensor | None, k_content: Tensor | None) -> None:
    for name, value in (("q", q), ("k", k), ("v", v)):
        if value.dim() != 4:
            raise ValueError(f"{_OP}: {name} must be (B, tokens, heads, channels), got shape {tuple(value.shape)}")
        if 0 in value.shape[1:]:
            raise ValueError(f"{_OP}: {name} must not be empty but for its batch, got shape {tuple(value.shape)}")
    batch, _, heads, dim = q.shape
    _checks.check_shape(_OP, "k", k, "(B, N, H, D)", (batch, k.shape[1], heads, dim))
    _checks.check_shape(_OP, "v", v, "(B, N, H, E)", (batch, k.shape[1], heads, v.shape[-1]))
    if (q_content is None) != (k_content is None):
        raise ValueError(f"{_OP}: q_content and k_content go together, got only one of them")
    if q_content is not None and k_content is not None:
        _checks.check_shape(_OP, "q_content", q_content, "(B, M, H, D)", q.shape)
        _checks.check_shape(_OP, "k_content", k_content, "(B, N, H, D)", k.shape)


def _pair(rotary: Any) -> tuple[Any, Any]:
    if not isinstance(rotary, tuple | list) or len(rotary) != 2:
        raise TypeError(f"{_OP}: rotary must be a pair of tensors (cos, sin), got {type(rotary).__name__}")
    return rotary[0], rotary[1]


def _check_rotary(tables: tuple[Any, Any], q: Tensor, k: Tensor, q_content: Tensor | None) -> None:
    if q_content is not None:
        raise ValueError(f"{_OP}: rotary and q_content exclude each other: both say what the content features are")
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"{_OP}: rotary needs as many queries as keys, got {q.shape[1]} and {k.shape[1]}")
    tokens, heads, dim = q.shape[1:]
    if dim % 2:
        raise ValueError(f"{_OP}: rotary turns pairs of channels, so D must be even, got {dim}")
    for name, table in zip(("cos", "sin"), tables, strict=True):
        _checks.check_tensor(_OP, name, table)
        own = table.shape[1] if table.dim() == 3 and table.shape[1] == 1 else heads
        _checks.check_shape(_OP, name, table, "(N, 1 or H, D / 2)", (tokens, own, dim // 2))
        _checks.check_dtype(_OP, name, table, _DTYPES)
        _checks.check_device(_OP, name, table, q.device)
        if table.requires_grad:
            raise ValueError(f"{_OP}: the rotary table {name} requires a gradient, but tables are not differentiable")


def _check_features(call: AttentionCall) -> None:
    """Refuse features that can make a divisor vanish; inside the operator, where values exist in every mode."""
    if call.normalizer not in NEEDS_POSITIVE_FEATURES or call.feature_map != "identity" or call.q.device.type != "cpu":
        return
    for name, value in (("q", call.q), ("k", call.k)):
        if value.numel() and ((smallest := value.min().item()) < 0 or smallest == call.eps == 0):
            positive = [name for name in FEATURE_MAPS if name != "identity"]
            others = [name for name in NORMALIZERS if name not in NEEDS_POSITIVE_FEATURES]
            needed = "not be negative" if call.eps > 0 else "be positive with eps = 0"
            raise ValueError(
                f"{_OP}: the normalizer {call.normalizer!r} divides by sums of products of features, which must "
                f"{needed}, but {name} has {smallest:.3g}; apply a feature_map of {positive} or take a normalizer "
                f"of {others}"
            )


# The operator ----------------------------------------------------------------------------------------------------

_CALL_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? q_content, Tensor? k_content, Tensor? cos, Tensor? sin, "
    "str normalizer, str feature_map, float scale, float eps"
)
"""The fields of AttentionCall, in order."""


def _forward(*args: Any) -> tuple[Tensor, ...]:
    call = AttentionCall(*args)
    _check_features(call)
    o, statistics = _dispatch.choose_inside(_OP, call).forward(call)
    return o, *statistics


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    call = AttentionCall(*args)
    return call.v.new_empty((*call.q.shape[:3], call.v.shape[-1])), *empty_statistics(call)


def _backward(grad_o: Tensor, *args: Any) -> Sequence[Tensor | None]:
    statistics, call = Statistics(*args[: len(Statistics._fields)]), AttentionCall(*args[len(Statistics._fields) :])
    return _dispatch.choose_inside(_OP, call).backward(call, statistics, grad_o)


def _flops(*args: Any, out_shape: Any = None) -> int:
    """Two operations a product and sum: S and num, kbar and z, and the softmax's products."""
    shapes = AttentionCall(*args)
    batch, queries, heads, dim = shapes.q
    keys, values = shapes.v[1], shapes.v[-1]
    weights = 2 * dim * keys if shapes.normalizer == "softmax_weighted" else 0
    return batch * heads * (2 * (queries + keys) * dim * values + 2 * queries * dim + weights)


def _backward_flops(*args: Any) -> int:
    """num again, dS and dq_c for a query, dk_c and dv for a key; twice the normaliser's and the softmax's products."""
    shapes = AttentionCall(*args)
    batch, queries, heads, dim = shapes.q
    keys, values = shapes.v[1], shapes.v[-1]
    weights = 4 * dim * keys if shapes.normalizer == "softmax_weighted" else 0
    return batch * heads * ((6 * queries + 4 * keys) * dim * values + 4 * queries * dim + weights)


_operator = _library.define_differentiable(
    _OP,
    schema=_CALL_SCHEMA,
    tensors=7,
    results=["o", *Statistics._fields],
    forward=_forward,
    fake=_forward_fake,
    flops=_flops,
    backward=_backward,
    backward_flops=_backward_flops,
    kept=Statistics._fields,
    fixed=[AttentionCall._fields.index(table) for table in ("cos", "sin")],
)


# Implementations -------------------------------------------------------------------------------------------------


def _why_not_triton(call: AttentionCall) -> str | None:
    """The reason why the Triton kernels cannot serve a call, or None."""
    if (reason := _triton.why_not(call.v)) is not None:
        return reason
    if call.v.dtype == torch.float64:
        return "float64 runs in PyTorch"
    if call.q.shape[0] == 0:
        return "empty batch"
    dim, values = call.q.shape[-1], call.v.shape[-1]
    heads = f"heads of {dim} features and {values} values"
    plain = call.normalizer in ("divide", "clamp", "none") and call.v.dtype == torch.bfloat16
    most = 256 if plain else 128
    if dim > most or values > 128:
        return f"{heads}, the kernels take up to {most} and 128 for {call.normalizer!r} in {call.v.dtype}"
    needed = 0  # bytes of shared memory beyond what every GPU has
    if max(dim, values) > 64:
        needed = 220_000
    elif max(dim, values) > 32 and call.v.dtype == torch.float32:
        needed = 110_000
    if needed > (size := _triton.shared_memory(call.v.device)):
        return f"{heads}, which need {needed} bytes of shared memory, the GPU has {size}"
    return None


_dispatch.register(_OP, prepare, *_dispatch.usual(__name__, _why_not_triton))

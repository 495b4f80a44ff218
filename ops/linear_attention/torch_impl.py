"""Linear attention in plain PyTorch: the path of CPUs, MPS and float64.

Two passes over tokens, a slice of them at a time, so that features, rotated features and products exist for one slice
only, whatever the size of the map:

    1. keys and values   ->  S, kbar, vbar                        (call.Statistics)
    2. queries           ->  num = q_c S, z = s <q_n, kbar>, o

The backward pass walks the same slices, with the features computed again. With G the gradient of o:

    1. queries           ->  dnum and dz from G (``_normalizer_gradients``),  dq_c = S dnum,  dq_n = s dz kbar,
                             dS = sum q_c dnum,  dkbar = s sum dz q_n,  dvbar
    2. keys and values   ->  dk_c = (s/N) dS v,  dk_n = dkbar / N,  dv = (s/N) dS^T k_c + dvbar / N

The weights of ``softmax_weighted`` add a term to dk_n, and to every query the same vector, known after pass 2.
Sums over tokens are float32 (float64); a slice is (images, heads, tokens, channels) inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.linear_attention.call import AttentionCall, Gradients, Statistics, empty_statistics
from subquad.ops.linear_attention.formula import feature_map, normalize

_WORKING_SET_CPU = 2**18
"""Elements of a slice: small enough for a CPU's caches."""
_WORKING_SET = 2**24
"""Elements of a slice on any other device, where a launch must be long to be worth its overhead."""


def forward(call: AttentionCall) -> tuple[Tensor, Statistics]:
    """Output (B, M, H, E) in v's dtype and the statistics that the backward pass needs."""
    batch, tokens, heads, _ = call.q.shape
    o = call.v.new_empty((batch, tokens, heads, call.v.shape[-1]))
    statistics = empty_statistics(call)
    for images in _image_slices(call):
        part, found = _take_images(call, images), Statistics(*(value[images] for value in statistics))
        _reduce(part, found)
        for rows in _token_slices(part, tokens):
            o[images, rows] = _apply(part, found, rows).transpose(1, 2)
    return o, statistics


def backward(call: AttentionCall, statistics: Statistics, grad_o: Tensor) -> Gradients:
    """Gradients of q, k, v and of the content features, each of its argument's shape and dtype; None if absent."""
    grads = tuple(None if value is None else value.new_empty(value.shape) for value in call[:5])
    for images in _image_slices(call):
        part, found = _take_images(call, images), Statistics(*(value[images] for value in statistics))
        slices = tuple(None if value is None else value[images] for value in grads)
        q, k, v, q_content, k_content = slices
        assert q is not None and k is not None and v is not None
        sums = _query_gradients(part, found, grad_o[images], q, q_content)
        to_queries = _key_gradients(part, found, sums, k, v, k_content)
        if to_queries is not None:
            for rows in _token_slices(part, part.q.shape[1]):
                q[:, rows] += _through_map(part, _mapped(part, part.q, rows), to_queries).transpose(1, 2)
    return grads


# Forward ---------------------------------------------------------------------------------------------------------


def _reduce(call: AttentionCall, statistics: Statistics) -> None:
    """Pass 1: fill the statistics."""
    tokens = call.k.shape[1]
    if call.normalizer == "softmax_weighted":
        _weigh(call, statistics)
    for value in (statistics.state, statistics.key_mean, statistics.value_mean):
        value.zero_()
    for rows in _token_slices(call, tokens):
        keys = _features(call, call.k, call.k_content, rows)
        v = _slice(call, call.v, rows)
        if call.normalizer == "softmax_weighted":
            keys = keys.scaled(_weights(call, statistics, keys.normal))
        _add_products(statistics.state, keys.content, v)
        statistics.key_mean.add_(keys.normal.sum(2))
        if statistics.value_mean.numel():
            statistics.value_mean.add_(v.sum(2))
    statistics.state.mul_(call.product_scale / tokens)
    statistics.key_mean.div_(tokens)
    statistics.value_mean.div_(tokens)


def _weigh(call: AttentionCall, statistics: Statistics) -> None:
    """Fill the query mean and the log of the softmax's sum."""
    tokens = call.q.shape[1]
    statistics.query_mean.zero_()
    for rows in _token_slices(call, tokens):
        statistics.query_mean.add_(_mapped(call, call.q, rows).sum(2))
    statistics.query_mean.div_(tokens)
    logits = [_logits(call, statistics, _mapped(call, call.k, rows)) for rows in _token_slices(call, call.k.shape[1])]
    torch.logsumexp(torch.cat(logits, dim=2).squeeze(-1), dim=2, keepdim=True, out=statistics.log_sum)


def _logits(call: AttentionCall, statistics: Statistics, k_n: Tensor) -> Tensor:
    return call.scale * _dot(k_n, statistics.query_mean)


def _weights(call: AttentionCall, statistics: Statistics, k_n: Tensor) -> Tensor:
    """Weights of keys, (b, H, n, 1), of mean 1 over all tokens."""
    return call.k.shape[1] * torch.exp(_logits(call, statistics, k_n) - statistics.log_sum.unsqueeze(-1))


def _apply(call: AttentionCall, statistics: Statistics, rows: slice) -> Tensor:
    """Pass 2 for a slice of queries: (b, H, n, E)."""
    queries = _features(call, call.q, call.q_content, rows)
    numerator, z = _numerator(call, statistics, queries)
    return normalize(call.normalizer, numerator, z, statistics.value_mean.unsqueeze(2), call.eps)


def _numerator(call: AttentionCall, statistics: Statistics, queries: _Features) -> tuple[Tensor, Tensor]:
    return queries.content @ statistics.state, call.product_scale * _dot(queries.normal, statistics.key_mean)


def _dot(x: Tensor, vector: Tensor) -> Tensor:
    """<x_n, vector> for x (b, H, n, D) and one vector (b, H, D) for all n: (b, H, n, 1)."""
    return torch.einsum("bhnd,bhd->bhn", x, vector).unsqueeze(-1)


# Backward --------------------------------------------------------------------------------------------------------


class _Sums(NamedTuple):
    """Gradients of the statistics: of the state, the key mean and the value mean."""

    state: Tensor
    key_mean: Tensor
    value_mean: Tensor


def _query_gradients(
    call: AttentionCall, statistics: Statistics, grad_o: Tensor, grad_q: Tensor, grad_content: Tensor | None
) -> _Sums:
    """Fill the gradients of the queries and sum those of the statistics."""
    sums = _Sums(*(torch.zeros_like(value) for value in statistics[:3]))
    for rows in _token_slices(call, call.q.shape[1]):
        queries = _features(call, call.q, call.q_content, rows)
        numerator, z = _numerator(call, statistics, queries)
        grad = _slice(call, grad_o, rows)
        d_numerator, dz = _normalizer_gradients(call, statistics, grad, numerator, z, sums.value_mean)
        _add_products(sums.state, queries.content, d_numerator)
        dz = dz * call.product_scale
        sums.key_mean.add_((dz * queries.normal).sum(2))
        d_content = d_numerator @ statistics.state.mT
        d_normal = dz * statistics.key_mean.unsqueeze(2)
        _store(call, queries, rows, d_normal, d_content, grad_q, grad_content)
    return sums


def _normalizer_gradients(
    call: AttentionCall, statistics: Statistics, grad: Tensor, numerator: Tensor, z: Tensor, d_value_mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the numerator and of z; adds to that of the value mean."""
    name = call.normalizer
    if name == "subtract":
        d_value_mean.add_(((1 - z) * grad).sum(2))
        return grad, -(grad * statistics.value_mean.unsqueeze(2)).sum(-1, keepdim=True)
    if name == "magnitude":
        d_value_mean.sub_((z * grad).sum(2))
        inverse = 1 / (z + call.eps)
        through_mean = (grad * statistics.value_mean.unsqueeze(2)).sum(-1, keepdim=True)
        return (1 + inverse) * grad, -inverse.square() * (grad * numerator).sum(-1, keepdim=True) - through_mean
    if name == "none":
        return grad, torch.zeros_like(z)
    inverse = 1 / (z.clamp(min=call.eps) if name == "clamp" else z + call.eps)
    d_numerator = inverse * grad
    dz = -inverse * (d_numerator * numerator).sum(-1, keepdim=True)
    return d_numerator, torch.where(z >= call.eps, dz, 0) if name == "clamp" else dz


def _key_gradients(
    call: AttentionCall, statistics: Statistics, sums: _Sums, grad_k: Tensor, grad_v: Tensor, content: Tensor | None
) -> Tensor | None:
    """Fill the gradients of keys and values; what every query's features get through the weights, or None."""
    tokens = call.k.shape[1]
    weighted = call.normalizer == "softmax_weighted"
    share = call.product_scale / tokens
    mean_term = sums.key_mean.unsqueeze(2) / tokens  # (b, H, 1, D)
    to_queries = torch.zeros_like(statistics.query_mean)
    # sum_j w_j / N u_j of the formula of u below
    level = (statistics.key_mean * sums.key_mean).sum(-1) + (statistics.state * sums.state).sum((-1, -2))
    for rows in _token_slices(call, tokens):
        keys = _features(call, call.k, call.k_content, rows)
        v = _slice(call, call.v, rows)
        d_content, d_normal = v @ sums.state.mT * share, mean_term
        used = keys.content
        if weighted:
            weights = _weights(call, statistics, keys.normal)
            used = weights * used
            u = (keys.normal * d_normal + keys.content * d_content).sum(-1, keepdim=True) * tokens
            t = weights / tokens * (u - level[..., None, None])
            to_queries.add_((t * keys.normal).sum(2))
            d_normal = weights * d_normal + call.scale * t * statistics.query_mean.unsqueeze(2)
            d_content = weights * d_content
        dv = used @ sums.state * share
        if sums.value_mean.numel():
            dv = dv + sums.value_mean.unsqueeze(2) / tokens
        grad_v[:, rows] = dv.transpose(1, 2)
        _store(call, keys, rows, d_normal, d_content, grad_k, content)
    return to_queries.unsqueeze(2) * (call.scale / call.q.shape[1]) if weighted else None


def _store(
    call: AttentionCall,
    features: _Features,
    rows: slice,
    d_normal: Tensor,
    d_content: Tensor,
    grad: Tensor,
    grad_content: Tensor | None,
) -> None:
    """From gradients of features to those of queries or keys (and of content features of their own)."""
    if grad_content is not None:
        grad_content[:, rows] = d_content.transpose(1, 2)
    else:
        d_normal = d_normal + _rotate(call, d_content, rows, back=True)
    grad[:, rows] = _through_map(call, features.normal, d_normal).transpose(1, 2)


def _through_map(call: AttentionCall, features: Tensor, grad: Tensor) -> Tensor:
    """The slope of a feature map is a function of the feature itself."""
    if call.feature_map == "elu1":
        return grad * features.clamp(max=1)
    return grad * (features > 0) if call.feature_map == "relu" else grad


# Slices ----------------------------------------------------------------------------------------------------------


class _Features(NamedTuple):
    """Normaliser and content features of a slice, (b, H, n, D); the same tensor where they do not differ."""

    normal: Tensor
    content: Tensor

    def scaled(self, weights: Tensor) -> _Features:
        normal = weights * self.normal
        return _Features(normal, normal if self.content is self.normal else weights * self.content)


def _features(call: AttentionCall, x: Tensor, content: Tensor | None, rows: slice) -> _Features:
    normal = _mapped(call, x, rows)
    return _Features(normal, _rotate(call, normal, rows) if content is None else _slice(call, content, rows))


def _mapped(call: AttentionCall, x: Tensor, rows: slice) -> Tensor:
    return feature_map(_slice(call, x, rows), call.feature_map)


def _slice(call: AttentionCall, x: Tensor, rows: slice) -> Tensor:
    return x[:, rows].transpose(1, 2).to(call.working)


def _rotate(call: AttentionCall, x: Tensor, rows: slice, back: bool = False) -> Tensor:
    """Rotary embedding of a slice, or its inverse: pairs of channels as complex numbers, in one pass over memory."""
    if call.cos is None or call.sin is None:
        return x
    cos, sin = (table[rows].transpose(0, 1).to(x.dtype) for table in (call.cos, call.sin))  # (1 or H, n, D / 2)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, -sin if back else sin)).flatten(-2)


def _add_products(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add sum_n left_n right_n^T, (b, H, D, E), to ``total``."""
    total.add_(left.mT @ right)


def _image_slices(call: AttentionCall) -> Iterator[slice]:
    batch, tokens = call.k.shape[0], max(call.q.shape[1], call.k.shape[1])
    size = max(1, _rows(call) // tokens)
    for start in range(0, batch, size):
        yield slice(start, min(start + size, batch))


def _take_images(call: AttentionCall, images: slice) -> AttentionCall:
    q_content, k_content = (None if value is None else value[images] for value in (call.q_content, call.k_content))
    return call._replace(q=call.q[images], k=call.k[images], v=call.v[images], q_content=q_content, k_content=k_content)


def _token_slices(call: AttentionCall, tokens: int) -> Iterator[slice]:
    size = max(1, _rows(call) // call.k.shape[0])
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def _rows(call: AttentionCall) -> int:
    """Tokens of all images together in a slice."""
    working_set = _WORKING_SET_CPU if call.v.device.type == "cpu" else _WORKING_SET
    return max(1, working_set // (call.v.shape[2] * max(call.k.shape[-1], call.v.shape[-1])))

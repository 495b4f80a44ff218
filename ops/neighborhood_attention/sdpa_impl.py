"""Neighborhood attention as PyTorch's own attention, where windows do not overlap: exact, and the fastest on a CPU.

With n tokens in a dilation group, the windows of an axis are blocks side by side in two cases:

    n = K                      full attention, or with a dilation attention over a grid
    stride K, K divides n      window attention

A map of such axes is a batch of blocks, and the bias a matrix that all of them share. What would need another pass over
the weights goes back to the tiles of ``torch_impl``: gradients of the bias and of lse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.neighborhood_attention import torch_impl
from subquad.ops.neighborhood_attention.call import Gradients, NeighborhoodCall
from subquad.ops.neighborhood_attention.tiles import relative


def why_not(call: NeighborhoodCall) -> str | None:
    """The reason why it cannot serve a call, None if it can."""
    device, dtype = call.q.device.type, call.q.dtype
    if device != "cpu":
        return f"it is the short cut of CPUs, got tensors on {device}"
    if dtype not in (torch.float32, torch.float64):
        return f"PyTorch's attention rounds weights to 16 bits, got {dtype}"
    if call.additional_keys is not None:
        return "additional keys are in no block"
    if call.q.shape[-1] != call.v.shape[-1]:
        return f"queries and values must be alike, got {call.q.shape[-1]} and {call.v.shape[-1]} channels"
    axes = zip(call.size, call.kernel_size, call.dilation, call.stride, call.is_causal, strict=True)
    for axis, (length, kernel, dilation, stride, causal) in enumerate(axes):
        if causal:
            return f"axis {axis} is causal"
        if length % dilation:
            return f"on axis {axis} dilation {dilation} cuts {length} tokens into groups of two sizes"
        tokens = length // dilation
        if tokens != kernel and (stride != kernel or tokens % kernel):
            return (
                f"on axis {axis} windows overlap: kernel_size {kernel} at stride {stride} is neither the {tokens} "
                "tokens of a dilation group nor cuts them into windows side by side"
            )
    return None


def forward(call: NeighborhoodCall) -> tuple[Tensor, Tensor]:
    """Output (B, *S, H, E) and lse (B, *S, H)."""
    q, k, v = _blocks(call, call.q), _blocks(call, call.k), _blocks(call, call.v)
    bias = None if call.rpb is None else _bias(call)
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _rows(q, k), k, v, 0.0, False, attn_mask=bias, scale=call.scale
    )
    return _map(call, o), _map(call, lse.unsqueeze(-1)).squeeze(-1)


def backward(call: NeighborhoodCall, grad_o: Tensor, grad_lse: Tensor, o: Tensor, lse: Tensor) -> Gradients:
    """Gradients of q, k, v, rpb and additional keys and values; None for an absent argument."""
    if call.rpb is not None or grad_lse.any():
        return torch_impl.backward(call, grad_o, grad_lse, o, lse)
    q, k, v = _blocks(call, call.q), _blocks(call, call.k), _blocks(call, call.v)
    grad_o, o = (_rows(_blocks(call, x), k) for x in (grad_o, o))
    lse = _rows(_blocks(call, lse.unsqueeze(-1)), k).squeeze(-1)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_o, _rows(q, k), k, v, o, lse, 0.0, False, scale=call.scale
    )
    return (*(_map(call, grad, x.shape[-2]) for grad, x in zip(grads, call[:3], strict=True)), None, None, None)


def _bias(call: NeighborhoodCall) -> Tensor:
    """The table's entries for all pairs of a block, as rows of ``_rows``: (1, G, H / G n, n)."""
    assert call.rpb is not None
    pattern = tuple((0, kernel, ((0, kernel),) * kernel) for kernel in call.kernel_size)
    bias = call.rpb.to(call.working).flatten(1)[:, relative(call, pattern)]  # (H, n, n)
    return bias.unflatten(0, (call.k.shape[-2], -1)).flatten(1, 2).unsqueeze(0)


def _rows(x: Tensor, k: Tensor) -> Tensor:
    """(blocks, H, n, ...) as (blocks, G, H / G n, ...), the rows that a head of k serves."""
    return x.unflatten(1, (k.shape[1], -1)).flatten(2, 3)


def _counts(call: NeighborhoodCall) -> list[tuple[int, int, int]]:
    """Of each axis the blocks, the tokens of a block and the groups: position ((block K) + token) d + group."""
    axes = zip(call.size, call.kernel_size, call.dilation, strict=True)
    return [(length // (kernel * dilation), kernel, dilation) for length, kernel, dilation in axes]


def _blocks(call: NeighborhoodCall, x: Tensor) -> Tensor:
    """A map (B, *S, heads, C) as (blocks of all images, heads, tokens of a block, C)."""
    axes = len(call.size)
    for axis, counts in reversed(list(enumerate(_counts(call), start=1))):
        x = x.unflatten(axis, counts)
    block, token, group = ([1 + 3 * axis + i for axis in range(axes)] for i in range(3))
    x = x.permute(0, *block, *group, -2, *token, -1)
    return x.flatten(2 * axes + 2, 3 * axes + 1).flatten(0, 2 * axes)


def _map(call: NeighborhoodCall, x: Tensor, heads: int | None = None) -> Tensor:
    """The inverse of ``_blocks``, of rows too; contiguous."""
    axes, counts = len(call.size), _counts(call)
    blocks, tokens, groups = ([count[i] for count in counts] for i in range(3))
    shape = (call.q.shape[0], *blocks, *groups, heads or call.q.shape[-2], *tokens, x.shape[-1])
    x = x.reshape(shape)
    order = [place for axis in range(axes) for place in (1 + axis, 2 + 2 * axes + axis, 1 + axes + axis)]
    x = x.permute(0, *order, 2 * axes + 1, -1)
    return x.reshape(*call.q.shape[:-2], *x.shape[-2:]).contiguous()

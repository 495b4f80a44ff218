"""The one place for torch.library: how an op of ours becomes an operator of PyTorch.

An operator is opaque to ``torch.compile``, ``torch.export``, autocast, FLOP counting and FSDP: one node with a fake
(shape) function, an autograd formula whose backward is an operator of its own, and a FLOP formula for each.

``torch.library.custom_op`` would do the same at three times the host time a call, which is what small maps wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_library = torch.library.Library("subquad", "FRAGMENT")


class Operator:
    """A registered operator; until it gets an autograd formula, a backward pass through it is an error."""

    def __init__(self, name: str, schema: str, function: Callable[..., Any]) -> None:
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, function, "CompositeExplicitAutograd")
        self._name = name
        self._op = getattr(torch.ops.subquad, name).default
        self._formula: tuple[Callable[..., Any], Callable[..., Any]] = (lambda *_: None, self._no_formula)
        _library.impl(name, self._autograd(), "Autograd")

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """Give the operator a gradient, by the two functions of ``torch.library.register_autograd``."""
        self._formula = setup_context, backward

    def _no_formula(self, ctx: Any, *grads: Any) -> NoReturn:
        raise NotImplementedError(f"subquad::{self._name} has no gradient")

    def _autograd(self) -> Callable[..., Any]:
        op = self._op

        def below(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)

        class Formula(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                result = below(*args)
                self._formula[0](ctx, args, result)
                return result

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return self._formula[1](ctx, *grads)

        def autograd(*args: Any) -> Any:
            if torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
                return Formula.apply(*args)
            return below(*args)

        return autograd


def define(
    name: str,
    function: Callable[..., Any],
    *,
    schema: str,
    fake: Callable[..., Any],
    flops: Callable[..., int],
) -> Operator:
    """Register ``function`` as the operator ``subquad::<name>``.

    Autocast policy: the function sees its inputs in the dtypes they have and runs with autocast off. Casting
    activations is the public wrapper's work (``autocast_dtype``), so that parameters and states stay in fp32.

    Args:
        name: operator name without namespace.
        function: eager implementation for every device; returns tensors that share no memory with its arguments.
        schema: arguments and results, as in ``"(Tensor x, int n) -> Tensor"``.
        fake: same arguments; returns empty tensors of the right shapes, dtypes and devices.
        flops: same arguments with shapes in place of tensors, plus ``out_shape``; multiply and add count separately.
    """

    def without_autocast(*args: Any) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))
        if not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    op = Operator(name, schema, without_autocast)
    torch.library.register_fake(f"subquad::{name}", fake, lib=_library)
    register_flop_formula(getattr(torch.ops.subquad, name))(flops)
    return op


def define_differentiable(
    name: str,
    *,
    schema: str,
    tensors: int,
    results: Sequence[str],
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
    backward: Callable[..., Sequence[Tensor | None]],
    backward_flops: Callable[..., int],
    kept: Sequence[str] = (),
    followed: Sequence[str] = (),
    fixed: Sequence[int] = (),
) -> None:
    """Register ``subquad::<name>`` and, for its gradients, ``subquad::<name>_backward``, both opaque.

    Args:
        name: operator name without namespace.
        schema: arguments, as in ``"Tensor x, Tensor? bias, int n"``: first the tensors, then the options.
        tensors: how many arguments are tensors.
        results: names of the tensors that ``forward`` returns.
        forward, fake, flops: see ``define``.
        backward: takes gradients of the ``followed`` results, then the ``kept`` results, then the arguments; returns
            the gradients of the arguments that have one, None for an argument that is absent.
        backward_flops: takes shapes of the arguments alone.
        kept: results that ``backward`` reads.
        followed: results that gradients enter through, from the first on; by default the first one.
        fixed: places of tensor arguments that have no gradient.
    """
    followed = followed or results[:1]
    given = len(followed) + len(kept)
    places = [i for i in range(tensors) if i not in fixed]
    kept_places = [results.index(result) for result in kept]

    def or_empty(grads: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
        return tuple(like.new_empty(0) if grad is None else grad for grad in grads)  # an operator returns no None

    def backward_fake(*args: Any) -> tuple[Tensor, ...]:
        inputs = [args[given + i] for i in places]
        return or_empty([None if x is None else x.new_empty(x.shape) for x in inputs], args[0])

    extra = [f"Tensor grad_{result}" for result in followed] + [f"Tensor {result}" for result in kept]
    define(
        f"{name}_backward",
        lambda *args: or_empty(backward(*args), args[0]),
        schema=f"({', '.join(extra)}, {schema}) -> ({', '.join(['Tensor'] * len(places))})",
        fake=backward_fake,
        flops=lambda *args, out_shape=None: backward_flops(*args[given:]),
    )
    backward_operator = getattr(torch.ops.subquad, f"{name}_backward").default

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(output[i] for i in kept_places), *inputs[:tensors])
        ctx.options = inputs[tensors:]

    def autograd(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        found = backward_operator(*grads[: len(followed)], *saved, *ctx.options)
        by_input: list[Tensor | None] = [None] * (tensors + len(ctx.options))
        for i, grad in zip(places, found, strict=True):
            if saved[len(kept) + i] is not None:
                by_input[i] = grad
        return tuple(by_input)

    returned = f"({', '.join(['Tensor'] * len(results))})" if len(results) > 1 else "Tensor"
    operator = define(name, forward, schema=f"({schema}) -> {returned}", fake=fake, flops=flops)
    operator.register_autograd(autograd, setup_context=setup_context)


def attention_flops(
    products: Callable[..., tuple[int, int, int]],
) -> tuple[Callable[..., int], Callable[..., int]]:
    """FLOP formulas of softmax attention, forward and backward; two operations a product and sum.

    Args:
        products: takes an operator's arguments with shapes in place of tensors; returns the pairs of queries and keys
            over all images and heads, D, and E.
    """

    def forward(*args: Any, out_shape: Any = None) -> int:
        """q k^T and P v."""
        pairs, dim, values = products(*args)
        return 2 * pairs * (dim + values)

    def backward(*args: Any) -> int:
        """The logits again, dP, dq, dk and dv."""
        pairs, dim, values = products(*args)
        return 2 * pairs * (3 * dim + 2 * values)

    return forward, backward


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast asks activations to have on ``device``, or None outside autocast."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None

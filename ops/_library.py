"""The one place for torch.library: how an op of ours becomes an operator of PyTorch.

An operator is opaque to ``torch.compile``, ``torch.export``, autocast, FLOP counting and FSDP: one node with a fake
(shape) function, an autograd formula whose backward is an operator of its own, and a FLOP formula for each.

``torch.library.custom_op`` would do the same at three times the host time a call, which is what small maps wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

_library = torch.library.Library("subquad", "FRAGMENT")


class Operator:
    """A registered operator; until it gets an autograd formula, a backward pass through it is an error.

    Called as a function, it leaves out PyTorch's dispatcher where nobody watches, see ``is_traced``.
    """

    def __init__(self, name: str, schema: str, function: Callable[..., Any]) -> None:
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, function, "CompositeExplicitAutograd")
        self._name = name
        self._op = getattr(torch.ops.subquad, name).default
        self._function = function
        self._tensors = sum("Tensor" in str(argument.type) for argument in self._op._schema.arguments)
        self._formula: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        _library.impl(name, self._autograd, "Autograd")

    def __call__(self, *args: Any) -> Any:
        """What the operator returns: tensors first in its arguments, then options in canonical form."""
        if (
            torch.compiler.is_compiling()
            or torch.autograd.profiler._is_profiler_enabled
            or is_traced(args[: self._tensors])
        ):
            return self._op(*args)
        if torch.is_grad_enabled() and self._needs_gradient(args):
            # Without a formula for the operator to complain of when the gradient is asked for.
            return self._op(*args) if self._formula is None else _Formula.apply(self, self._function, *args)
        return self._function(*args)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """Give the operator a gradient, by the two functions of ``torch.library.register_autograd``."""
        self._formula = setup_context, backward

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep what ``backward`` needs."""
        if self._formula is not None:
            self._formula[0](ctx, inputs, output)

    def backward(self, ctx: Any, *grads: Any) -> Any:
        """The gradients of all arguments."""
        if self._formula is None:
            raise NotImplementedError(f"subquad::{self._name} has no gradient")
        return self._formula[1](ctx, *grads)

    def _needs_gradient(self, args: tuple[Any, ...]) -> bool:
        return any([tensor is not None and tensor.requires_grad for tensor in args[: self._tensors]])  # noqa: C419

    def _has_tangent(self, args: tuple[Any, ...]) -> bool:
        tensors = (tensor for tensor in args[: self._tensors] if tensor is not None)
        return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)

    def _below(self, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self._op(*args)

    def _autograd(self, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and self._has_tangent(args):
            # PyTorch would take the result for a constant.
            raise NotImplementedError(f"subquad::{self._name} has no derivative in forward mode, only backwards")
        if torch.is_grad_enabled() and self._needs_gradient(args):
            return _Formula.apply(self, self._below, *args)
        return self._below(*args)


class _Formula(torch.autograd.Function):
    """The gradient of every operator."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, function: Callable[..., Any], *args: Any) -> Any:
        result = function(*args)
        ctx.operator = operator
        operator.setup_context(ctx, args, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (None, None, *ctx.operator.backward(ctx, *grads))


def _raw(*keys: str) -> int:
    """The bits of dispatch keys."""
    bits = 0
    for key in keys:
        bits |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)).raw_repr()
    return bits


_DEVICES = ("CPU", "CUDA", "XPU")
_AUTOGRAD = _raw("AutogradOther", "AutogradFunctionality")
_UNUSUAL_TENSOR = ~_raw(
    *_DEVICES, "ADInplaceOrView", *(f"Auto{kind}{device}" for kind in ("grad", "cast") for device in _DEVICES)
)
_UNUSUAL_THREAD = ~_raw("BackendSelect", "ADInplaceOrView")


def is_traced(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call goes through PyTorch's dispatcher for anybody but autograd and autocast.

    That is a mode (FLOP counts, fake tensors, tracing, a default device, derivatives in forward mode), a transform of
    ``torch.func``, or a tensor that is not plain: of a subclass, without data, or lazily negated. Every hop of the
    dispatcher takes as long as a small kernel. Profilers, which look on, and compilers, which replace Python, are not
    meant.
    """
    if forward_ad._current_level >= 0:
        return True
    include = torch._C._dispatch_tls_local_include_set().raw_repr()
    if include & _UNUSUAL_THREAD or torch.overrides.has_torch_function(tensors):
        return True
    # Inside other operators' kernels autograd is off in the dispatcher alone; inference mode records nothing anyway.
    if torch._C._dispatch_tls_local_exclude_set().raw_repr() & _AUTOGRAD and torch.is_grad_enabled():
        return True
    for tensor in tensors:
        if tensor is not None and torch._C._dispatch_keys(tensor).raw_repr() & _UNUSUAL_TENSOR:
            return True
    return False


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
        device = args[0].device.type
        if not torch.is_autocast_enabled(device):
            return function(*args)
        torch.set_autocast_enabled(device, False)  # the context manager takes as long as many a kernel
        try:
            return function(*args)
        finally:
            torch.set_autocast_enabled(device, True)

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
) -> Operator:
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
    backward_operator = define(
        f"{name}_backward",
        lambda *args: or_empty(backward(*args), args[0]),
        schema=f"({', '.join(extra)}, {schema}) -> ({', '.join(['Tensor'] * len(places))})",
        fake=backward_fake,
        flops=lambda *args, out_shape=None: backward_flops(*args[given:]),
    )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)  # zeros for every result, to be thrown away
        ctx.save_for_backward(*(output[i] for i in kept_places), *inputs[:tensors])
        ctx.options = inputs[tensors:]
        ctx.results = [(x.shape, x.dtype) for x in (output[: len(followed)] if len(results) > 1 else (output,))]

    def autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        entering = [
            saved[0].new_zeros(shape, dtype=dtype) if grad is None else grad
            for grad, (shape, dtype) in zip(grads, ctx.results, strict=False)
        ]
        found = backward_operator(*entering, *saved, *ctx.options)
        by_input: list[Tensor | None] = [None] * (tensors + len(ctx.options))
        for i, grad in zip(places, found, strict=True):
            if saved[len(kept) + i] is not None:
                by_input[i] = grad
        return tuple(by_input)

    returned = f"({', '.join(['Tensor'] * len(results))})" if len(results) > 1 else "Tensor"
    operator = define(name, forward, schema=f"({schema}) -> {returned}", fake=fake, flops=flops)
    operator.register_autograd(autograd, setup_context=setup_context)
    return operator


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

"""Selective scan over a map along routes: the contract.

For batch b, route k, channel e, state n and step t of the route (channel e belongs to group g = e // (E / G)):

    s_t = dt_weight[k, e] . dt_t + dt_bias[k, e]          (or dt_t[e] + dt_bias[k, e] without ``dt_weight``)
    d_t = softplus(s_t)                                    (identity above 20; s_t itself without ``dt_softplus``)
    h_t[n] = exp(d_t A[k, e, n]) h_{t-1}[n] + d_t B_t[g, n] x_t[e],     h_{-1} = initial_state or 0
    y_t[e] = sum_n C_t[g, n] h_t[n] + D[k, e] x_t[e]

where x_t, dt_t, B_t, C_t are the values at the pixel that route k visits at step t, and y_t is added to the output at
that pixel: the K routes are summed. With a gate z, which is one for all routes, the output is

    scale (sum_k y + addend) silu(z),

as if every route were gated; ``addend`` is another map in front of the same gate, such as the other direction's scan in
Vim (arXiv 2401.09417). This is the recurrence of Mamba (arXiv 2312.00752, equation 2 with the Euler input term, and its
gate) along the routes of VMamba (arXiv 2401.10166, section 4).

Layout is channels last everywhere; nothing is permuted, flipped or copied per route. Activations (x, dt, B, C, z) share
one dtype: float32, bfloat16, float16 or float64; parameters are used in float32 (float64 with float64 activations).
Steps, decays, states, the sum over routes and the gate are float32. The output is rounded once; in front of a gate the
sum of routes may be rounded to bfloat16, if inputs and output are bfloat16. Every tensor of floats is differentiable.
Only inputs and one state in ``CHUNK`` steps are kept for the backward pass, and the sum of routes for z's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.ops import _checks, _dispatch, _library
from subquad.ops.selective_scan import reference
from subquad.ops.selective_scan.call import CHUNK, DIFFERENTIABLE, ScanCall
from subquad.ops.selective_scan.routes import CROSS, ROUTES, route_codes

__all__ = ["CHUNK", "CROSS", "ROUTES", "ScanCall", "selective_scan"]

_OP = "selective_scan"
_ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    z: Tensor | None = None,
    addend: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    routes: Sequence[str] | Tensor = ("row",),
    dt_softplus: bool = True,
    out_dtype: torch.dtype | None = None,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan a map (or a sequence) along K routes and sum the results; see the module's docstring for the formula.

    Args:
        x: (B, H, W, E) map, or (B, L, E) sequence (a map of height 1). Below, ``*`` stands for ``B, H, W`` or ``B, L``.
        dt: step sizes: low-rank (*, K, R) with ``dt_weight``, else (*, K, E).
        A: (K, E, N), negative.
        B, C: (*, K, N), or (*, K, G, N) with G groups of channels.
        D: (K, E) skip weights.
        dt_weight: (K, E, R) expansion of a low-rank ``dt``; the expanded step is never stored.
        dt_bias: (K, E), added to the expanded step.
        z: gate of x's shape, for the sum of all routes; the last states are not gated.
        addend: map of x's shape and any of the dtypes, added to the sum of routes in front of the gate. Needs ``z``.
        scale: factor of the gated output. Needs ``z``.
        initial_state: (B, K, E, N), the state before each route's first step.
        routes: names out of ``ROUTES``, one for each k, or an integer tensor (K, L) whose rows are permutations of the
            row-major pixel indices (not checked on a GPU: that would wait for it).
        dt_softplus: apply softplus to the step.
        out_dtype: dtype of the output, x's by default. float32 keeps a 16-bit sum of routes from overflowing.
        return_last_state: also return the state after each route's last step.

    Returns:
        Output of x's shape, and with ``return_last_state`` the states (B, K, E, N) in float32 (float64).

    Raises:
        TypeError: for a non-tensor or a dtype that is not supported or not shared.
        ValueError: for shapes, devices, routes or sizes that do not fit, naming the argument.
    """
    call = prepare(
        x,
        dt,
        A,
        B,
        C,
        D,
        dt_weight=dt_weight,
        dt_bias=dt_bias,
        z=z,
        addend=addend,
        scale=scale,
        initial_state=initial_state,
        routes=routes,
        dt_softplus=dt_softplus,
        out_dtype=out_dtype,
    )
    if _dispatch.requested() == "reference":
        # Outside the operator, so that autograd differentiates the formula itself.
        y, last_state = reference.scan(call)
    else:
        y, states, _ = _operator(*call)
        last_state = states[:, :, -1] if return_last_state else states
    if x.dim() == 3:
        y = y.squeeze(1)
    if return_last_state:
        return y, last_state
    return y


def prepare(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    z: Tensor | None = None,
    addend: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    routes: Sequence[str] | Tensor = ("row",),
    dt_softplus: bool = True,
    out_dtype: torch.dtype | None = None,
) -> ScanCall:
    """Check the public arguments and bring them to canonical form (see ``selective_scan`` for arguments and errors)."""
    codes = route_codes(routes)
    _checks.check_tensor(_OP, "x", x)
    autocast = _library.autocast_dtype(x.device) if x.dtype != torch.float64 else None
    given = (x, dt, A, B, C, D, dt_weight, dt_bias, z, addend, initial_state)
    if not isinstance(scale, int | float | torch.SymFloat):
        raise TypeError(f"{_OP}: scale must be a number, got {type(scale).__name__}")
    if z is None and (addend is not None or scale != 1):
        raise ValueError(f"{_OP}: addend and scale are those of the gate: expected z with them, got None")
    key = _checks.shape_class(*given, options=(len(codes), autocast is None, out_dtype))
    if not _passed.has(key):
        _check_tensors(*given, out_dtype, len(codes))
        _passed.add(key)
    table = _prepare_table(routes, x) if isinstance(routes, Tensor) else None
    if autocast is not None:
        x, dt, B, C = (value.to(autocast) for value in (x, dt, B, C))
        z = None if z is None else z.to(autocast)
    wide = _parameter_dtype(x)
    if B.dim() == x.dim() + 1:
        B, C = B.unsqueeze(-2), C.unsqueeze(-2)
    if x.dim() == 3:
        x, dt, B, C = (value.unsqueeze(1) for value in (x, dt, B, C))
        z, addend = (None if value is None else value.unsqueeze(1) for value in (z, addend))
    D, dt_weight, dt_bias, initial_state = (
        value if value is None or value.dtype == wide else value.to(wide)
        for value in (D, dt_weight, dt_bias, initial_state)
    )
    return ScanCall(
        x=x,
        dt=dt,
        A=A if A.dtype == wide else A.to(wide),
        B=B,
        C=C,
        D=D,
        dt_weight=dt_weight,
        dt_bias=dt_bias,
        initial_state=initial_state,
        z=z,
        addend=addend,
        table=table,
        routes=codes,
        dt_softplus=bool(dt_softplus),
        out_dtype=out_dtype or x.dtype,
        scale=float(scale),
        keep=z is not None and z.requires_grad and torch.is_grad_enabled(),
    )


_passed = _checks.Passed()


def _check_tensors(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    z: Tensor | None,
    addend: Tensor | None,
    initial_state: Tensor | None,
    out_dtype: torch.dtype | None,
    k: int,
) -> None:
    """Raises TypeError or ValueError, as ``selective_scan`` says, for all but the routes, of which there are k."""
    if x.dim() not in (3, 4):
        raise ValueError(f"{_OP}: x must be (B, H, W, E) or (B, L, E), got shape {tuple(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{_OP}: x must not have an empty map or no channels, got shape {tuple(x.shape)}")
    maps = {"x": x, "dt": dt, "B": B, "C": C, "z": z}
    parameters = {"A": A, "D": D, "dt_weight": dt_weight, "dt_bias": dt_bias, "initial_state": initial_state}
    parameters |= {"addend": addend}  # in a dtype of its own, as these
    for name, value in {**maps, **parameters}.items():
        if value is not None or name in ("dt", "A", "B", "C"):
            _checks.check_tensor(_OP, name, value)
    _check_map_shapes(x, dt, A, B, C, dt_weight, z, addend, k)
    _check_parameter_shapes(x, A, D, dt_bias, initial_state, k)
    _check_dtypes_and_devices(maps, parameters, out_dtype)


def _check_map_shapes(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_weight: Tensor | None,
    z: Tensor | None,
    addend: Tensor | None,
    k: int,
) -> None:
    """Check what has an entry for each pixel, and A and dt_weight, which say how many entries."""
    lead, dim = tuple(x.shape[:-1]), x.shape[-1]
    stars = "B, H, W" if x.dim() == 4 else "B, L"
    state = A.shape[-1] if A.dim() == 3 else 1
    _checks.check_shape(_OP, "A", A, "(K, E, N)", (k, dim, state))
    if state == 0:
        raise ValueError(f"{_OP}: A must have at least one state, got shape {tuple(A.shape)}")
    if dt_weight is None:
        _checks.check_shape(_OP, "dt", dt, f"({stars}, K, E)", (*lead, k, dim))
    else:
        rank = max(1, dt.shape[-1]) if dt.dim() else 1
        _checks.check_shape(_OP, "dt", dt, f"({stars}, K, R)", (*lead, k, rank))
        _checks.check_shape(_OP, "dt_weight", dt_weight, "(K, E, R)", (k, dim, rank))
    if B.dim() == x.dim() + 1:
        _checks.check_shape(_OP, "B", B, f"({stars}, K, N)", (*lead, k, state))
        _checks.check_shape(_OP, "C", C, f"({stars}, K, N)", B.shape)
    else:
        groups = B.shape[-2] if B.dim() == x.dim() + 2 else 0
        if groups == 0 or dim % groups:
            raise ValueError(
                f"{_OP}: B must be ({stars}, K, N) or ({stars}, K, G, N) with G a divisor of E = {dim}, "
                f"got {tuple(B.shape)}"
            )
        _checks.check_shape(_OP, "B", B, f"({stars}, K, G, N)", (*lead, k, groups, state))
        _checks.check_shape(_OP, "C", C, f"({stars}, K, G, N)", B.shape)
    for name, value in (("z", z), ("addend", addend)):
        if value is not None:
            _checks.check_shape(_OP, name, value, f"({stars}, E)", x.shape)


def _check_parameter_shapes(
    x: Tensor, A: Tensor, D: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None, k: int
) -> None:
    dim = x.shape[-1]
    for name, value in (("D", D), ("dt_bias", dt_bias)):
        if value is not None:
            _checks.check_shape(_OP, name, value, "(K, E)", (k, dim))
    if initial_state is not None:
        shape = (x.shape[0], k, dim, A.shape[-1])
        _checks.check_shape(_OP, "initial_state", initial_state, "(B, K, E, N)", shape)


def _check_dtypes_and_devices(
    maps: dict[str, Tensor | None], parameters: dict[str, Tensor | None], out_dtype: torch.dtype | None
) -> None:
    """Activations share x's dtype, unless autocast is about to give them one; parameters may have any of the dtypes."""
    x = maps["x"]
    assert x is not None
    _checks.check_dtype(_OP, "x", x, _ACTIVATION_DTYPES)
    free = _library.autocast_dtype(x.device) is not None and x.dtype != torch.float64
    for name, value in {**maps, **parameters}.items():
        if value is not None:
            shared = name in maps and not free
            _checks.check_dtype(_OP, name, value, (x.dtype,) if shared else _ACTIVATION_DTYPES)
            _checks.check_device(_OP, name, value, x.device)
    if out_dtype is not None and out_dtype not in _ACTIVATION_DTYPES:
        raise TypeError(f"{_OP}: out_dtype must be a floating dtype among {_ACTIVATION_DTYPES}, got {out_dtype}")


def _prepare_table(table: Tensor, x: Tensor) -> Tensor:
    length = x[0, ..., 0].numel()
    _checks.check_shape(_OP, "routes", table, "(K, L)", (table.shape[0], length))
    _checks.check_device(_OP, "routes", table, x.device)
    if table.device.type == "cpu" and not torch.compiler.is_compiling():
        pixels = torch.arange(length, dtype=table.dtype)
        if not torch.equal(table.sort(dim=1).values, pixels.expand_as(table)):
            raise ValueError(f"{_OP}: every row of routes must be a permutation of 0..{length - 1}")
    return table.to(torch.int32)


def _parameter_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# The operator ----------------------------------------------------------------------------------------------------

_CALL_SCHEMA = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_weight, Tensor? dt_bias, "
    "Tensor? initial_state, Tensor? z, Tensor? addend, Tensor? table, int[] routes, bool dt_softplus, "
    "ScalarType out_dtype, float scale, bool keep"
)
"""The fields of ScanCall, in order."""


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = ScanCall(*args)
    return _dispatch.choose_inside(_OP, call).forward(call)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = ScanCall(*args)
    batch, height, width, dim = call.x.shape
    chunks = (height * width + CHUNK - 1) // CHUNK + 1
    y = call.x.new_empty(call.x.shape, dtype=call.out_dtype)
    state_shape = (batch, len(call.routes), chunks, dim, call.A.shape[-1])
    return y, call.x.new_empty(state_shape, dtype=_parameter_dtype(call.x)), call.new_kept()


def _backward(
    grad_y: Tensor, grad_last_state: Tensor | None, states: Tensor, kept: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    call = ScanCall(*args)
    grads = _dispatch.choose_inside(_OP, call).backward(call, states, kept, grad_y, grad_last_state)
    return tuple(call.x.new_empty(0) if grad is None else grad for grad in grads)


def _backward_fake(
    grad_y: Tensor, grad_last_state: Tensor | None, states: Tensor, kept: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    call = ScanCall(*args)
    if not call.keep:
        call = call._replace(z=None)
    inputs = call[:DIFFERENTIABLE]
    return tuple(call.x.new_empty(0) if value is None else value.new_empty(value.shape) for value in inputs)


_TENSORS = DIFFERENTIABLE + 1  # the table is one more
_Z = ScanCall._fields.index("z")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.forgot_sum = inputs[_Z] is not None and inputs[_Z].requires_grad and not inputs[-1]
    ctx.save_for_backward(*output[1:], *inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:]


def _autograd(
    ctx: Any, grad_y: Tensor | None, grad_states: Tensor | None, grad_kept: None
) -> tuple[Tensor | None, ...]:
    states, kept, *tensors = ctx.saved_tensors
    call = ScanCall(*tensors, *ctx.options)
    if ctx.forgot_sum:  # in a program that was traced where no gradients were wanted
        kept, *_ = _operator(*call._replace(z=None, addend=None, out_dtype=call.gate_dtype))
        call = call._replace(keep=True)
    if grad_y is None:
        grad_y = call.x.new_zeros(call.x.shape, dtype=call.out_dtype)
    grad_last_state = None if grad_states is None else grad_states[:, :, -1].contiguous()
    grads = _backward_operator(grad_y, grad_last_state, states, kept, *call)
    if not call.keep:
        tensors[_Z] = None
    by_input = [None if value is None else grad for grad, value in zip(grads, tensors[:DIFFERENTIABLE], strict=True)]
    return (*by_input, *[None] * (1 + len(ctx.options)))


def _flops(*args: Any, out_shape: Any = None) -> int:
    """9 operations a state and step as in upstream's count, 2 for the skip, 2 R for expanding a low-rank step.

    And for an output 4 of the gate (its sigmoid and three products) and 1 for the addend.
    """
    shapes = ScanCall(*args)
    batch, height, width, dim = shapes.x
    outputs = batch * height * width * dim
    rank = shapes.dt[-1] if shapes.dt_weight is not None else 0
    gate = 0 if shapes.z is None else 4 + (shapes.addend is not None)
    return outputs * (len(shapes.routes) * (9 * shapes.A[-1] + 2 + 2 * rank) + gate)


def _backward_flops(
    grad_y: Any, grad_last_state: Any, states: Any, kept: Any, *args: Any, out_shape: Any = None
) -> int:
    """The recomputed forward pass and twice as much for the gradients."""
    return 3 * _flops(*args)


_operator = _library.define(
    _OP, _forward, schema=f"({_CALL_SCHEMA}) -> (Tensor, Tensor, Tensor)", fake=_forward_fake, flops=_flops
)
_operator.register_autograd(_autograd, setup_context=_setup_context)
_backward_operator = _library.define(
    f"{_OP}_backward",
    _backward,
    schema=f"(Tensor grad_y, Tensor? grad_last_state, Tensor states, Tensor kept, {_CALL_SCHEMA}) "
    f"-> ({', '.join(['Tensor'] * DIFFERENTIABLE)})",
    fake=_backward_fake,
    flops=_backward_flops,
)


# Implementations -------------------------------------------------------------------------------------------------


def _why_not_triton(call: ScanCall) -> str | None:
    from subquad.ops import _triton

    if (reason := _triton.why_not(call.x)) is not None:
        return reason
    if call.x.dtype == torch.float64:
        return "float64 runs in PyTorch"
    if call.x.shape[0] == 0:
        return "empty batch"
    if call.B.shape[-2] != 1:
        return f"{call.B.shape[-2]} groups of channels, the kernels have one"
    if call.A.shape[-1] > 16:
        return f"{call.A.shape[-1]} states, the kernels take up to 16"
    if len(call.routes) > 32:
        return f"{len(call.routes)} routes, the kernels take up to 32"
    if call.x.shape[0] > 2**17:
        return f"{call.x.shape[0]} images, the kernels take up to {2**17}"
    if call.x.shape[1] * call.x.shape[2] > 2**30:
        return f"{call.x.shape[1] * call.x.shape[2]} pixels, the kernels take up to {2**30}"
    return None


def _prepare_call(*args: Any, return_last_state: bool = False, **kwargs: Any) -> ScanCall:
    """Arguments of the public function; the last state is always computed."""
    return prepare(*args, **kwargs)


_dispatch.register(_OP, _prepare_call, *_dispatch.usual(__name__, _why_not_triton))

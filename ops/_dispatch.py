"""Which implementation of an op runs, and why: the only place that decides.

An op registers a table of implementations in order of preference. Each says what it does not support; the first that
supports a call wins. An implementation that was asked for by name but cannot serve the call is an error with its
reason, never a silent fallback.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

_ENVIRONMENT_VARIABLE = "SUBQUAD_BACKEND"
# Of the whole process, not of a thread: autograd runs the backward pass of a GPU in a thread of its own.
_override: str | None = None


def _serves_everything(call: Any) -> str | None:
    return None


class Implementation(NamedTuple):
    """One way to compute an op.

    Attributes:
        name: what ``use_backend`` calls it: ``"triton"``, ``"torch"``, ``"reference"`` or another of the op's own.
        module: where it is, imported on first use: triton is optional.
        why_not: given the op's canonical call, the reason why it cannot serve it, or None if it can.
    """

    name: str
    module: str
    why_not: Callable[[Any], str | None] = _serves_everything


class _Op(NamedTuple):
    prepare: Callable[..., Any]
    implementations: tuple[Implementation, ...]


class Explanation(NamedTuple):
    """What ``explain`` found.

    Attributes:
        op: name of the op.
        chosen: the implementation that the call would run, or None if none can.
        passed_over: for every other implementation tried, the reason why it does not run.
    """

    op: str
    chosen: str | None
    passed_over: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen or 'no implementation'}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.passed_over.items()]
        return "\n".join(lines)


_ops: dict[str, _Op] = {}


def register(op: str, prepare: Callable[..., Any], *implementations: Implementation) -> None:
    """Enter an op: ``prepare`` turns the public arguments into the canonical call that implementations judge."""
    _ops[op] = _Op(prepare, implementations)


def usual(package: str, why_not_triton: Callable[[Any], str | None]) -> tuple[Implementation, ...]:
    """What most ops have: Triton for the calls that it serves, PyTorch for the others, and the reference.

    Args:
        package: the op's, whose modules are ``triton_impl``, ``torch_impl`` and ``reference``.
        why_not_triton: see ``Implementation.why_not``.
    """
    return (
        Implementation("triton", f"{package}.triton_impl", why_not_triton),
        Implementation("torch", f"{package}.torch_impl"),
        Implementation("reference", f"{package}.reference"),
    )


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the ``with`` block on the implementation ``name``, in all threads of the process.

    Args:
        name: ``"triton"``, ``"torch"`` or ``"reference"``; of neighborhood attention also ``"sdpa"``, its short cut for
            windows that do not overlap.

    Raises:
        ValueError: for an unknown name here; for a call that the implementation cannot serve, at that call.
    """
    global _override
    previous, _override = _override, _known(name, "use_backend")
    try:
        yield
    finally:
        _override = previous


def requested() -> str | None:
    """The implementation asked for by ``use_backend`` or the environment, or None.

    Raises:
        ValueError: if the environment variable names none that exists.
    """
    if _override is not None:
        return _override
    name = os.environ.get(_ENVIRONMENT_VARIABLE)
    return _known(name, _ENVIRONMENT_VARIABLE) if name else None


def choose(op: str, call: Any) -> Any:
    """The implementation module that serves ``call``.

    Raises:
        ValueError: if the implementation asked for, or none at all, supports the call.
    """
    return _choose(op, call, requested())


def _choose(op: str, call: Any, name: str | None) -> Any:
    for implementation in _ops[op].implementations:
        if (not name or implementation.name == name) and implementation.why_not(call) is None:
            return _module(implementation.module)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in _judge(op, call).passed_over.items())
    raise ValueError(f"{op}: no implementation can serve this call ({reasons})")


_module = cache(importlib.import_module)


def choose_inside(op: str, call: Any) -> Any:
    """As ``choose``, for the operator of ``op``, which its public function calls for all but the reference.

    Raises:
        ValueError: likewise, and if the reference was asked for.
    """
    name = requested()
    if name == "reference":
        raise ValueError(
            f"{op}: the reference is not an operator: it runs and is differentiated through subquad.ops.{op}, "
            "so not in scripted models nor for the gradients of what another implementation computed"
        )
    return _choose(op, call, name)


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which implementation ``op(*args, **kwargs)`` would run, with the reason for each one that was passed over.

    Args:
        op: a public op (``subquad.ops.selective_scan``) or its name.

    Raises:
        ValueError: for an unknown op, and for arguments that the op would refuse before it looks at values.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _ops:
        raise ValueError(f"explain: unknown op {name!r}, expected one of {sorted(_ops)}")
    try:
        call = _ops[name].prepare(*args, **kwargs)
    except TypeError as error:
        raise TypeError(re.sub(r"^prepare\w*\(\)", f"{name}()", str(error))) from None
    return _judge(name, call)


def _judge(op: str, call: Any) -> Explanation:
    implementations = _ops[op].implementations
    name = requested()
    passed_over: dict[str, str] = {}
    for implementation in implementations:
        if name and implementation.name != name:
            passed_over[implementation.name] = f"{name!r} was asked for"
            continue
        reason = implementation.why_not(call)
        if reason is None:
            return Explanation(op, implementation.name, passed_over)
        passed_over[implementation.name] = reason
    return Explanation(op, None, passed_over)


def _known(name: str, source: str) -> str:
    known = sorted({implementation.name for op in _ops.values() for implementation in op.implementations})
    if name not in known:
        raise ValueError(f"{source}: unknown backend {name!r}, expected one of {known}")
    return name

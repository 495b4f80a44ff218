"""Bad arguments of the selective scan: the right exception, naming the argument, what it was and what was expected."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from subquad.ops import selective_scan

Change = Callable[[dict[str, Any]], dict[str, Any]]


def _of(name: str, function: Callable[[Tensor], object]) -> Change:
    return lambda arguments: {name: function(arguments[name])}


def _empty_map(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name][:, :0] for name in ("x", "dt", "B", "C", "z", "addend")}


# name: (what to change in good arguments, exception, fragments of the message)
BAD: dict[str, tuple[Change, type[Exception], tuple[str, ...]]] = {
    # not tensors
    "x_list": (_of("x", lambda x: x.tolist()), TypeError, ("x must be a tensor", "list")),
    "x_array": (_of("x", lambda x: x.numpy()), TypeError, ("x must be a tensor", "ndarray")),
    "dt_none": (_of("dt", lambda _: None), TypeError, ("dt must be a tensor", "NoneType")),
    "A_number": (_of("A", lambda _: -1.0), TypeError, ("A must be a tensor", "float")),
    "B_none": (_of("B", lambda _: None), TypeError, ("B must be a tensor",)),
    "C_none": (_of("C", lambda _: None), TypeError, ("C must be a tensor",)),
    "D_number": (_of("D", lambda _: 1.0), TypeError, ("D must be a tensor", "float")),
    "dt_weight_array": (_of("dt_weight", lambda w: w.numpy()), TypeError, ("dt_weight must be a tensor",)),
    "dt_bias_number": (_of("dt_bias", lambda _: 0), TypeError, ("dt_bias must be a tensor", "int")),
    "z_true": (_of("z", lambda _: True), TypeError, ("z must be a tensor", "bool")),
    "addend_number": (_of("addend", lambda _: 1.0), TypeError, ("addend must be a tensor", "float")),
    "scale_tensor": (lambda _: {"scale": torch.tensor(0.5)}, TypeError, ("scale must be a number", "Tensor")),
    "state_number": (_of("initial_state", lambda _: 0), TypeError, ("initial_state must be a tensor",)),
    # ranks and shapes
    "x_rank": (_of("x", lambda x: x[0, 0]), ValueError, ("x must be (B, H, W, E) or (B, L, E)", "(5, 6)")),
    "x_rank_5": (_of("x", lambda x: x[None]), ValueError, ("x must be", "(1, 2, 4, 5, 6)")),
    "x_map": (_of("x", lambda x: x[:, :3]), ValueError, ("dt must have shape (B, H, W, K, R)", "(2, 3, 5, 4, 2)")),
    "x_channels": (
        _of("x", lambda x: x[..., :5]),
        ValueError,
        ("A must have shape (K, E, N)", "(4, 5, 3)", "(4, 6, 3)"),
    ),
    "dt_rank": (_of("dt", lambda dt: dt[..., 0]), ValueError, ("dt must have shape (B, H, W, K, R)", "(2, 4, 5, 4)")),
    "dt_scalar": (_of("dt", lambda _: torch.tensor(1.0)), ValueError, ("dt must have shape (B, H, W, K, R)", "()")),
    "dt_batch": (_of("dt", lambda dt: dt[:1]), ValueError, ("dt must have shape", "(1, 4, 5, 4, 2)")),
    "dt_no_rank": (
        _of("dt", lambda dt: dt[..., :0]),
        ValueError,
        ("dt must have shape (B, H, W, K, R) = (2, 4, 5, 4, 1)", "(2, 4, 5, 4, 0)"),
    ),
    "dt_full": (
        _of("dt_weight", lambda _: None),
        ValueError,
        ("dt must have shape (B, H, W, K, E)", "(2, 4, 5, 4, 6)"),
    ),
    "A_rank": (_of("A", lambda A: A[..., 0]), ValueError, ("A must have shape (K, E, N)", "(4, 6)")),
    "A_routes": (_of("A", lambda A: A[:3]), ValueError, ("A must have shape (K, E, N) = (4, 6, 3)", "(3, 6, 3)")),
    "A_no_state": (_of("A", lambda A: A[..., :0]), ValueError, ("A must have at least one state", "(4, 6, 0)")),
    "B_rank": (_of("B", lambda B: B[0]), ValueError, ("B must be", "(4, 5, 4, 3)")),
    "B_state": (_of("B", lambda B: B[..., :2]), ValueError, ("B must have shape", "(2, 4, 5, 4, 2)")),
    "B_routes": (_of("B", lambda B: B[..., :3, :]), ValueError, ("B must have shape", "(2, 4, 5, 3, 3)")),
    "B_groups": (
        lambda a: {name: a[name].unsqueeze(-2).expand(-1, -1, -1, -1, 4, -1) for name in ("B", "C")},
        ValueError,
        ("G a divisor of E = 6", "(2, 4, 5, 4, 4, 3)"),
    ),
    "B_no_groups": (_of("B", lambda B: B.unsqueeze(-2)[..., :0, :]), ValueError, ("B must be", "(2, 4, 5, 4, 0, 3)")),
    "C_rank": (_of("C", lambda C: C[0]), ValueError, ("C must", "(4, 5, 4, 3)")),
    "C_groups": (
        lambda a: {"C": a["C"].unsqueeze(-2).expand(-1, -1, -1, -1, 2, -1)},
        ValueError,
        ("C must have shape (B, H, W, K, N) = (2, 4, 5, 4, 3)", "(2, 4, 5, 4, 2, 3)"),
    ),
    "D_shape": (_of("D", lambda D: D.flatten()), ValueError, ("D must have shape (K, E) = (4, 6)", "(24,)")),
    "dt_bias_shape": (_of("dt_bias", lambda b: b[:1]), ValueError, ("dt_bias must have shape (K, E)", "(1, 6)")),
    "dt_weight_shape": (
        _of("dt_weight", lambda w: w.mT),
        ValueError,
        ("dt_weight must have shape (K, E, R) = (4, 6, 2)", "(4, 2, 6)"),
    ),
    "z_shape": (_of("z", lambda z: z[..., :1]), ValueError, ("z must have shape (B, H, W, E)", "(2, 4, 5, 1)")),
    "addend_shape": (
        _of("addend", lambda a: a[:, :1]),
        ValueError,
        ("addend must have shape (B, H, W, E) = (2, 4, 5, 6)", "(2, 1, 5, 6)"),
    ),
    "addend_alone": (lambda _: {"z": None, "scale": 1.0}, ValueError, ("addend and scale", "expected z", "got None")),
    "scale_alone": (lambda _: {"z": None, "addend": None}, ValueError, ("addend and scale", "expected z", "got None")),
    "state_shape": (
        _of("initial_state", lambda s: s[:, 0]),
        ValueError,
        ("initial_state must have shape (B, K, E, N) = (2, 4, 6, 3)", "(2, 6, 3)"),
    ),
    "empty_map": (_empty_map, ValueError, ("x must not have an empty map", "(2, 0, 5, 6)")),
    "no_channels": (_of("x", lambda x: x[..., :0]), ValueError, ("no channels", "(2, 4, 5, 0)")),
    # dtypes
    "x_integer": (_of("x", lambda x: x.long()), TypeError, ("x must be of dtype", "int64")),
    "x_complex": (_of("x", lambda x: x.cfloat()), TypeError, ("x must be of dtype", "complex64")),
    "dt_dtype": (_of("dt", lambda dt: dt.half()), TypeError, ("dt must be of dtype float32", "float16")),
    "B_dtype": (_of("B", lambda B: B.bfloat16()), TypeError, ("B must be of dtype float32", "bfloat16")),
    "C_dtype": (_of("C", lambda C: C.double()), TypeError, ("C must be of dtype float32", "float64")),
    "z_dtype": (_of("z", lambda z: z.half()), TypeError, ("z must be of dtype float32", "float16")),
    "A_dtype": (_of("A", lambda A: A.int()), TypeError, ("A must be of dtype", "int32")),
    "D_dtype": (_of("D", lambda D: D.bool()), TypeError, ("D must be of dtype", "bool")),
    "addend_dtype": (_of("addend", lambda a: a.long()), TypeError, ("addend must be of dtype", "int64")),
    "state_dtype": (_of("initial_state", lambda s: s.long()), TypeError, ("initial_state must be of dtype", "int64")),
    "out_dtype": (lambda _: {"out_dtype": torch.int32}, TypeError, ("out_dtype", "int32")),
    # devices
    "dt_device": (_of("dt", lambda dt: dt.to("meta")), ValueError, ("dt is on meta", "cpu")),
    "A_device": (_of("A", lambda A: A.to("meta")), ValueError, ("A is on meta", "cpu")),
    "z_device": (_of("z", lambda z: z.to("meta")), ValueError, ("z is on meta", "cpu")),
    "addend_device": (_of("addend", lambda a: a.to("meta")), ValueError, ("addend is on meta", "cpu")),
    "state_device": (_of("initial_state", lambda s: s.to("meta")), ValueError, ("initial_state is on meta", "cpu")),
    # routes
    "route_name": (lambda _: {"routes": ("row", "column", "snake", "row")}, ValueError, ("'snake'", "column_reversed")),
    "route_string": (lambda _: {"routes": "row"}, TypeError, ("'row'", "sequence of names")),
    "route_number": (lambda _: {"routes": 4}, TypeError, ("got 4",)),
    "route_array": (lambda _: {"routes": np.zeros((4, 20), dtype=np.int64)}, TypeError, ("routes must be",)),
    "route_not_a_name": (lambda _: {"routes": (0, 1, 2, 3)}, ValueError, ("unknown route 0",)),
    "route_unhashable": (lambda _: {"routes": ([0], [1], [2], [3])}, ValueError, ("unknown route [0]",)),
    "no_routes": (lambda _: {"routes": ()}, ValueError, ("routes is empty",)),
    "routes_count": (lambda _: {"routes": ("row",)}, ValueError, ("A must have shape (K, E, N) = (1, 6, 3)",)),
    "table_rank": (lambda _: {"routes": torch.arange(20)}, ValueError, ("shape (K, L)", "(20,)")),
    "table_empty": (lambda _: {"routes": torch.zeros(0, 20, dtype=torch.int64)}, ValueError, ("(K, L)", "(0, 20)")),
    "table_dtype": (lambda _: {"routes": torch.zeros(4, 20)}, TypeError, ("int32 or int64", "float32")),
    "table_length": (
        lambda _: {"routes": torch.arange(19).expand(4, -1)},
        ValueError,
        ("routes must have shape (K, L) = (4, 20)", "(4, 19)"),
    ),
    "table_twice": (
        lambda _: {"routes": torch.zeros(4, 20, dtype=torch.int64)},
        ValueError,
        ("every row of routes must be a permutation of 0..19",),
    ),
    "table_beyond": (
        lambda _: {"routes": torch.arange(1, 21).expand(4, -1)},
        ValueError,
        ("every row of routes must be a permutation of 0..19",),
    ),
    "table_device": (
        lambda _: {"routes": torch.arange(20).expand(4, -1).to("meta")},
        ValueError,
        ("routes is on meta", "cpu"),
    ),
}


@pytest.mark.parametrize(("change", "exception", "fragments"), BAD.values(), ids=BAD.keys())
def test_bad_arguments(
    change: Change, exception: type[Exception], fragments: tuple[str, ...], make_inputs: Any, convert: Any
) -> None:
    arguments = convert(make_inputs(2, 4, 5, 6, state=3, gate=True, addend=True, initial=True), torch.float32)
    selective_scan(**arguments)
    with pytest.raises(exception) as raised:
        selective_scan(**(arguments | change(arguments)))
    for fragment in fragments:
        assert re.search(re.escape(fragment), str(raised.value)), f"{fragment!r} is not in {raised.value}"


def test_sequences_are_named_in_messages(make_inputs: Any) -> None:
    arguments = make_inputs(2, 4, 5, 6, sequence=True)
    with pytest.raises(ValueError, match=re.escape("dt must have shape (B, L, K, R) = (2, 20, 4, 2)")):
        selective_scan(**(arguments | {"dt": arguments["dt"][:, :7]}))

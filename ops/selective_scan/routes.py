"""Routes: the order in which a selective scan walks through a map, as data.

A route is a name for an order that kernels compute on the fly, or a row of an index table for any other order. Step
``t`` of a route reads and writes pixel ``route_order(...)[t]`` of the row-major map: an address, never a copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COLUMN = 1
REVERSED = 2
TABLE = 4

ROUTES: dict[str, int] = {
    "row": 0,
    "column": COLUMN,
    "row_reversed": REVERSED,
    "column_reversed": COLUMN | REVERSED,
}
"""Route names and their codes. The codes are bit masks: 1 column major, 2 walked from the end, 4 a row of the table."""

CROSS = ("row", "column", "row_reversed", "column_reversed")
"""The four routes of VMamba's cross scan in the order of its parameters (arXiv 2401.10166, section 4)."""


def route_codes(routes: Sequence[str] | Tensor) -> list[int]:
    """Codes of named routes, or one ``TABLE`` code for each row of an index table.

    Raises:
        ValueError: for an unknown name, no routes at all, or a table that is not 2-D.
        TypeError: for anything that is neither a sequence of names nor an integer tensor.
    """
    if isinstance(routes, Tensor):
        if routes.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"routes as a table must be of dtype int32 or int64, got {routes.dtype}")
        if routes.dim() != 2 or routes.shape[0] == 0:
            raise ValueError(f"routes as a table must have shape (K, L) with K > 0, got {tuple(routes.shape)}")
        return [TABLE] * routes.shape[0]
    if isinstance(routes, str) or not isinstance(routes, Sequence):
        raise TypeError(f"routes must be a sequence of names or a (K, L) tensor, got {routes!r}")
    if len(routes) == 0:
        raise ValueError(f"routes is empty, expected at least one of {list(ROUTES)}")
    for route in routes:
        if not isinstance(route, str) or route not in ROUTES:
            raise ValueError(f"unknown route {route!r}, expected one of {list(ROUTES)}")
    return [ROUTES[route] for route in routes]


def route_order(code: int, height: int, width: int, row: Tensor | None, device: torch.device) -> Tensor:
    """Pixel indices of a route, step by step.

    Args:
        code: a route code.
        height, width: size of the map.
        row: the route's row of the index table, (L,), for a ``TABLE`` code.

    Returns:
        (H*W,) int64: row-major index of the pixel that each step visits.
    """
    if code == TABLE:
        assert row is not None
        return row.long()
    pixels = torch.arange(height * width, device=device)
    if code & COLUMN:
        pixels = pixels.view(height, width).t().reshape(-1)
    if code & REVERSED:
        pixels = pixels.flip(0)
    return pixels

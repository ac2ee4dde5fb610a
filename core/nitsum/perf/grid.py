"""A function of two variables as a table: bilinear inside, the last slope beyond the last point, the first value below the first.

A step's time is nearly a + b * tokens + c * batch * context, which is bilinear: so is what lies beyond the table.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

Row = tuple[float, ...]


class Grid:
    """`rows[i][j]` is the value at xs[i], ys[j]. Axes grow strictly; each has at least one point."""

    def __init__(self, xs: Row, ys: Row, rows: tuple[Row, ...]) -> None:
        assert [len(r) for r in rows] == [len(ys)] * len(xs), "a row per x and a column per y"
        if len(xs) == 1:  # one point: the same everywhere
            xs, rows = (xs[0], xs[0] + 1), (rows[0], rows[0])
        if len(ys) == 1:
            ys, rows = (ys[0], ys[0] + 1), tuple((r[0], r[0]) for r in rows)
        self._xs, self._ys, self._last_x, self._last_y = xs, ys, len(xs) - 1, len(ys) - 1
        self._cells = tuple(
            tuple(_cell(xs[i : i + 2], ys[j : j + 2], rows[i][j : j + 2], rows[i + 1][j : j + 2]) for j in range(len(ys) - 1))
            for i in range(len(xs) - 1)
        )

    def at(self, x: float, y: float) -> float:
        xs, ys = self._xs, self._ys
        i, j = bisect_right(xs, x, 1, self._last_x) - 1, bisect_right(ys, y, 1, self._last_y) - 1
        u, v = x - xs[i], y - ys[j]
        a, b, c, d = self._cells[i][j]
        if u <= 0.0:
            return a + c * v if v > 0.0 else a
        return a + b * u + (c + d * u) * v if v > 0.0 else a + b * u

    @cached_property
    def _arrays(self) -> tuple[Any, Any, Any]:
        return np.array(self._xs), np.array(self._ys), np.array(self._cells)

    def many(self, x: Any, y: Any) -> Any:
        """`at` for arrays."""
        xs, ys, cells = self._arrays
        x, y = np.maximum(x, xs[0]), np.maximum(y, ys[0])
        i = np.clip(np.searchsorted(xs, x, side="right") - 1, 0, self._last_x - 1)
        j = np.clip(np.searchsorted(ys, y, side="right") - 1, 0, self._last_y - 1)
        u, v, cell = x - xs[i], y - ys[j], cells[i, j]
        return cell[..., 0] + cell[..., 1] * u + (cell[..., 2] + cell[..., 3] * u) * v


def _cell(x: Sequence[float], y: Sequence[float], low: Sequence[float], high: Sequence[float]) -> tuple[float, float, float, float]:
    """(a, b, c, d) of a + b u + c v + d u v, with u and v counted from the cell's corner."""
    w, h = x[1] - x[0], y[1] - y[0]
    return low[0], (high[0] - low[0]) / w, (low[1] - low[0]) / h, (high[1] - high[0] - low[1] + low[0]) / (w * h)

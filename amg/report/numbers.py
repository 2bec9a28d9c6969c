"""How numbers are written, the same on the page and in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from amg.report.content import Cell, Table


def share_text(count: int, total: int) -> str:
    """A share in percent: whole, one decimal below 10 and above 99, so that few is never none or all."""
    if total == 0:
        return "–"
    percent = 100.0 * count / total
    whole = count in (0, total) or 10.0 <= percent <= 99.0
    return f"{percent:.{0 if whole else 1}f}\u00a0%"  # a no-break space


def table_cells(table: Table) -> list[list[str]]:
    """Every cell as text; floats of a column share their decimals, None is a dash."""
    decimals = [_decimals([row[j] for row in table.rows]) for j in range(len(table.columns))]
    return [[_cell(cell, places) for cell, places in zip(row, decimals, strict=True)] for row in table.rows]


def numeric_columns(table: Table) -> list[bool]:
    """Columns to align right: every cell a number, None, or text that starts with a digit, sign or dash."""
    return [
        bool(table.rows) and all(_is_numeric(row[column]) for row in table.rows)
        for column in range(len(table.columns))
    ]


def _is_numeric(cell: Cell) -> bool:
    if isinstance(cell, str):
        return cell[:1].isdigit() or cell[:1] in "+-−–<>=±." or cell == ""
    return not isinstance(cell, bool)


def _decimals(cells: Sequence[Cell]) -> int:
    largest = max((abs(c) for c in cells if isinstance(c, float) and math.isfinite(c)), default=0.0)
    return 1 if largest >= 100 else 2 if largest >= 10 else 3


def _cell(cell: Cell, decimals: int) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.{decimals}f}" if math.isfinite(cell) else str(cell)
    return str(cell)

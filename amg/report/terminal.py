"""The table of a section as aligned plain text."""

from __future__ import annotations

import unicodedata

from amg.report.content import Table
from amg.report.numbers import numeric_columns, table_cells


def table_text(table: Table) -> str:
    """Columns separated by two spaces, numbers to the right, a rule under the head, the notes below.

    Returns lines without trailing spaces, joined by newlines, no newline at the end.
    """
    cells = [[_plain(cell) for cell in row] for row in (list(table.columns), *table_cells(table))]
    widths = [max(_width(row[j]) for row in cells) for j in range(len(table.columns))]
    right = numeric_columns(table)
    lines = ["  ".join(map(_pad, row, widths, right)).rstrip() for row in cells]
    lines.insert(1, "  ".join("─" * width for width in widths))
    lines.extend(_plain(note) for note in table.notes)
    return "\n".join(lines)


def _plain(text: str) -> str:
    return "".join(" " if unicodedata.category(c).startswith("C") else c for c in str(text))


def _width(text: str) -> int:
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space

"""An audit's figures as files: table.json, table.csv, images.parquet, and the table people read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from amg.commands.audit.environment import COLUMNS as ENVIRONMENT
from amg.commands.audit.folder import Record
from amg.commands.audit.judges import Looked
from amg.commands.audit.measure import Cell, Measure
from amg.extras import needed
from amg.index.store import import_parquet, write_atomically
from amg.replacing import replacing
from amg.report import Table

NOTES = (
    "in brackets: 95 % intervals, bootstrap over prompts (exact binomial where a share is 0 or 100 %)",
    "guided: whether guidance or the final check saw the measure; one that it never saw is the judge",
    "blocked pictures are delivered blank: never memorised, left out of Top5% and Top1, counted in the rest",
)


def table_of(rows: Sequence[Measure], guidances: Sequence[str], notes: Sequence[str] = ()) -> Table:
    """One line per measure, one column per guidance; a missing figure is a dash with its reason below."""
    cells = [[row.label, row.seen, *(_text(row, name) for name in guidances)] for row in rows]
    missing = [f"{row.label}: not measured, {row.missing}" for row in rows if row.missing]
    return Table(("measure", "guided", *guidances), cells, [*NOTES, *notes, *missing])


def _text(row: Measure, guidance: str) -> str:
    cell = row.cells.get(guidance)
    if cell is None or cell.value is None:
        return "–"
    interval = "" if cell.low is None else f" ({cell.low:{row.form}}–{cell.high:{row.form}})"
    return f"{cell.value:{row.form}}{interval}"


def write_json(
    path: Path,
    rows: Sequence[Measure],
    settings: Mapping[str, Any],
    notes: Sequence[str],
    where: Mapping[str, str],
) -> None:
    """Settings, environment and every measure with value, low and high per guidance, or why it is missing."""
    body = {
        "settings": settings,
        "environment": where,
        "notes": [*NOTES, *notes],
        "measures": [
            {
                "key": row.key,
                "label": row.label,
                "guided": row.seen,
                "missing": row.missing,
                "guidances": {name: vars(cell) for name, cell in row.cells.items()},
            }
            for row in rows
        ],
    }
    write_atomically(path, json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(
    path: Path,
    rows: Sequence[Measure],
    columns: Mapping[str, Looked],
    settings: Mapping[str, Any],
    where: Mapping[str, str],
) -> None:
    """One row per guidance: settings, each measure with its interval, the environment, what is missing."""
    named = {name.lstrip("-").replace("-", "_").lower(): value for name, value in settings.items()}
    named.pop("device", None)  # the environment names it
    intervals = [row.key for row in rows if any(cell.low is not None for cell in row.cells.values())]
    heads = ["guidance", "pictures", *named]
    for row in rows:
        heads += [row.key, *((f"{row.key}_low", f"{row.key}_high") if row.key in intervals else ())]
    heads += [*ENVIRONMENT, "not_measured"]
    missing = "; ".join(f"{row.key}: {row.missing}" for row in rows if row.missing)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    for name, looked in columns.items():
        line: list[Any] = [name, len(looked.records), *named.values()]
        for row in rows:
            cell = row.cells.get(name, Cell(None))
            line += [_number(cell.value)]
            line += [_number(cell.low), _number(cell.high)] if row.key in intervals else []
        writer.writerow([*line, *(where[column] for column in ENVIRONMENT), missing])
    write_atomically(path, text.getvalue())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def write_parquet(path: Path, columns: Mapping[str, Looked], where: Mapping[str, str]) -> int:
    """One row per picture and step, a row group per guidance; returns the number of rows.

    `neighbour` is the row of the index nearest at that step; it and `similarity` are null where the step was
    not measured. A picture that went back or was run again has its steps more than once, in order; one that
    guidance let alone (`off`) has a single row whose step is null.
    """
    parquet = import_parquet()
    pyarrow = needed("pyarrow", "an audit")
    schema = _schema(pyarrow, where)
    count = 0
    with replacing(path) as partial, parquet.ParquetWriter(partial, schema) as writer:
        for guidance, looked in columns.items():
            lines = [line for record in looked.records for line in _steps(guidance, record)]
            writer.write_table(pyarrow.Table.from_pylist(lines, schema))
            count += len(lines)
    return count


def _steps(guidance: str, record: Record) -> Iterator[dict[str, Any]]:
    verdict = record.verdict
    picture = {
        "guidance": guidance,
        "picture": record.number,
        "prompt": record.prompt.caption,
        "kind": record.prompt.kind,
        "seed": record.seed,
        "final_similarity": verdict.similarity,
        "final_neighbour": verdict.neighbour.id,
        "final_guard": None if verdict.guard is None else verdict.guard.similarity,
        "memorized": verdict.memorized,
        "blocked": verdict.blocked,
        "rewinds": verdict.rewinds,
        "retries": verdict.retries,
        "nsfw": record.nsfw,
    }
    if not verdict.trace:
        yield {**picture, "order": 0}
    for order, step in enumerate(verdict.trace):
        yield {
            **picture,
            "order": order,
            "step": step.step,
            "t": step.t,
            "similarity": step.similarity,
            "threshold": step.threshold,
            "neighbour": step.neighbour,
            "terms": list(step.terms),
            "signals": None if step.signals is None else list(step.signals),
        }


def _schema(pyarrow: Any, where: Mapping[str, str]) -> Any:
    kinds = {
        "guidance": pyarrow.string(),
        "picture": pyarrow.int64(),
        "prompt": pyarrow.string(),
        "kind": pyarrow.string(),
        "seed": pyarrow.int64(),
        "order": pyarrow.int32(),
        "step": pyarrow.int32(),
        "t": pyarrow.float64(),
        "similarity": pyarrow.float64(),
        "threshold": pyarrow.float64(),
        "neighbour": pyarrow.int64(),
        "terms": pyarrow.list_(pyarrow.string()),
        "signals": pyarrow.list_(pyarrow.float64()),
        "final_similarity": pyarrow.float64(),
        "final_neighbour": pyarrow.string(),
        "final_guard": pyarrow.float64(),
        "memorized": pyarrow.bool_(),
        "blocked": pyarrow.bool_(),
        "rewinds": pyarrow.int32(),
        "retries": pyarrow.int32(),
        "nsfw": pyarrow.bool_(),
    }
    return pyarrow.schema(list(kinds.items()), metadata={key: str(value) for key, value in where.items()})

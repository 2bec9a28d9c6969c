"""What is recorded and what the tables say; knows no model."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from protocol import commit, percentiles, processor

COLUMNS = (
    *("date", "commit", "device", "torch", "diffusers", "threads", "loop", "row", "case", "contestant"),
    *("metric", "rounds", "p20", "p50", "p80", "low", "high", "note", "conditions"),
)
KEY = ("device", "threads", "row", "case", "contestant", "metric")
SAMPLER_REFUSES = "the Sampler refuses"
Line = dict[str, str]
# Row -> what the page says above its figures.
TITLES = {
    "loop": "The loop's own time a step",
    "fixed": "What a call costs beside its steps",
    "reads": "Host reads of tensor values in a call",
    "stream": "A stream of requests",
    "ordinary": "Ordinary prompts in batches of 16",
    "ceiling": "The costliest image",
    "schedulers": "Schedulers: `off` against the pipeline",
    "alone": "A request alone and among others",
}


@dataclass(frozen=True)
class Figure:
    """One number of a row: `values` of the rounds, whose percentiles are recorded, or a single one that was
    counted; `interval` of the median; `note` in place of a number, or beside it."""

    row: str
    case: str
    contestant: str
    metric: str
    values: tuple[float, ...] = ()
    interval: tuple[float, float] | None = None
    note: str = ""


def lines_of(figures: Sequence[Figure], loop: str, conditions: str) -> list[dict[str, object]]:
    """One line per figure, in the order of COLUMNS; `conditions` are the whole run's."""
    import diffusers

    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    run = (now, commit(), processor(), torch.__version__, diffusers.__version__, torch.get_num_threads())
    lines = []
    for figure in figures:
        spread = tuple(f"{value:.4g}" for value in percentiles(figure.values)) if figure.values else ("",) * 3
        if len(figure.values) == 1:
            spread = ("", spread[1], "")
        ends = tuple(f"{value:.4g}" for value in figure.interval or ()) or ("", "")
        head = (*run, loop, figure.row, figure.case, figure.contestant, figure.metric)
        values = (*head, len(figure.values), *spread, *ends, figure.note, conditions)
        lines.append(dict(zip(COLUMNS, values, strict=True)))
    return lines


def cell(line: Line | None) -> str:
    """A figure with its spread: 20th to 80th percentile, or the interval of the median in brackets."""
    if line is None:
        return "–"
    if not line["p50"]:
        return line["note"].replace("|", "\\|")
    if line["low"]:
        return f"{line['p50']} [{line['low']}, {line['high']}]"
    return line["p50"] + (f" ({line['p20']} – {line['p80']})" if line["p20"] else "")


def tables(path: Path) -> str:
    """Markdown of the last figures in the CSV: a section per device and row, a column per loop."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    latest = {(*(line[name] for name in KEY), line["loop"]): line for line in lines}
    parts = []
    for device, threads in dict.fromkeys((line["device"], line["threads"]) for line in lines):
        parts.append(f"### {device}, {threads} thread{'s' * (threads != '1')}")
        own = {key[2:]: line for key, line in latest.items() if key[:2] == (device, threads)}
        parts += [_section(row, own) for row in TITLES if any(key[0] == row for key in own)]
    return "\n\n".join(parts)


def _section(row: str, latest: dict[tuple[str, ...], Line]) -> str:
    mine = {key: line for key, line in latest.items() if key[0] == row}
    loops = list(dict.fromkeys(key[-1] for key in mine))
    names = ("loop", "commit", "date", "conditions")
    made = dict.fromkeys(tuple(line[name] for name in names) for line in mine.values())
    said = "; ".join(
        f"{loop}: commit {at}, {date[:10]}" + (f", {conditions}" if conditions else "")
        for loop, at, date, conditions in made
    )
    if row == "schedulers":
        table = "\n\n".join(_grouped(loop, mine) for loop in loops)
    else:
        body = [
            [*key, *(cell(mine.get((row, *key, loop))) for loop in loops)]
            for key in dict.fromkeys(key[1:-1] for key in mine)
        ]
        table = markdown(["case", "who", "figure", *loops], body)
    return f"**{TITLES[row]}** ({said})\n\n{table}"


def _grouped(loop: str, mine: dict[tuple[str, ...], Line]) -> str:
    """Schedulers by what came of them; reasons are told of those that only `Sampler` refuses."""
    groups: dict[str, list[str]] = {}
    for key, line in mine.items():
        if key[-1] == loop:
            told = cell(line)
            refused = told if told.startswith(SAMPLER_REFUSES) else told.split(":")[0]
            groups.setdefault(refused if line["note"] else f"{told} grey levels", []).append(key[1])
    return markdown([loop, "schedulers"], [[said, ", ".join(names)] for said, names in groups.items()])


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def aligned(lines: Sequence[dict[str, object]]) -> str:
    """This run's figures as an aligned table."""
    shown = [{name: str(value) for name, value in line.items()} for line in lines]
    rows = [("row", "case", "who", "figure", "value")]
    rows += [
        (*(line[name] for name in ("row", "case", "contestant", "metric")), cell(line)) for line in shown
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([*(part.ljust(width) for part, width in zip(row, widths, strict=False)), row[4]])
        for row in rows
    )

"""Markdown tables out of the CSV of the CIFAR-10 benchmark, and their place in docs/cifar.md."""

from __future__ import annotations

import csv
import math
from pathlib import Path

SHARES = ("< 1.4 %", "< 1.6 %", "luminance judge %", "ResNet-20 judge %")
COLUMNS = (
    *("Top5% nL2", "Top1 nL2", *SHARES, "FID", "class accuracy %"),
    *("before the final check %", "rewinds/image", "retries/image", "evaluations/image", "s/image"),
)
DIGITS = {"Top5% nL2": 2, "Top1 nL2": 2, "FID": 2, "rewinds/image": 2, "retries/image": 2, "s/image": 2}
ORDER = (
    *("real, not trained on", "off", "off, its copies left out", "main", "strong", "main, a second index"),
    *("main, paper's terms", "strong, paper's terms", "main, the preset as it is"),
    *("paper's form", "paper's terms and rewinds", "rewinds only", "ours"),
)
TITLES = {
    ("main", "unconditional"): "Unconditional (the paper's Table 2)",
    ("main", "class"): "Class-conditional (the paper's Table 3)",
    ("ablation", "unconditional"): "Ablations, unconditional (the paper's Table 5)",
    ("ablation", "class"): "Ablations, class-conditional (the paper's Table 5)",
}


def tables(csv_path: str | Path) -> str:
    """Every table of a CSV written by bench_cifar.py, as Markdown; of two lines with one key the later one
    counts."""
    with Path(csv_path).open(newline="") as file:
        lines = list(csv.DictReader(file))
    groups: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for line in lines:
        group = groups.setdefault((line["table"], line["condition"]), {})
        group[line["guidance"]] = line
    places = sorted(groups, key=lambda place: list(TITLES).index(place) if place in TITLES else len(TITLES))
    return "\n\n".join(_table(*place, _sorted(list(groups[place].values()))) for place in places) + "\n"


def _sorted(lines: list[dict[str, str]]) -> list[dict[str, str]]:
    """In ORDER, a row's variants ("NAME, with that") after it as they stand in the CSV."""
    return sorted(lines, key=lambda line: _place(line["guidance"]))


def _place(name: str) -> int:
    if name in ORDER:
        return ORDER.index(name)
    starts = [place for place, start in enumerate(ORDER) if name.startswith(f"{start}, ")]
    return starts[-1] if starts else len(ORDER)


def _table(table: str, condition: str, lines: list[dict[str, str]]) -> str:
    shown = [name for name in COLUMNS if any(not math.isnan(float(line[name])) for line in lines)]
    title = TITLES.get((table, condition), f"{table}, {condition}")
    rows = [["guidance", *shown], ["---", *["---:"] * len(shown)]]
    rows += [[line["guidance"], *(_cell(line, name) for name in shown)] for line in lines]
    body = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"### {title}\n\n{_protocol(lines)}\n\n{body}"


def _protocol(lines: list[dict[str, str]]) -> str:
    first = max(lines, key=lambda line: (int(line["steps"]), int(line["images"])))
    scale = f", guidance scale {first['guidance scale']}" if first["condition"] == "class" else ""
    seeds = f"{first['images']} images from seed {first['first seed']}"
    left = {int(line["images"]) for line in lines} - {int(first["images"])}
    seeds += f" ({', '.join(map(str, sorted(left)))} with the copies left out)" if left else ""
    dates, commits = ({line[name][:10] for line in lines} for name in ("date", "commit"))
    return (
        f"{seeds}; {first['steps']} steps{scale}; torch {first['torch']}, {first['machine']}, "
        f"{first['threads']} thread; {', '.join(sorted(dates))}, commit {', '.join(sorted(commits))}."
    )


def _cell(line: dict[str, str], name: str) -> str:
    value = float(line[name])
    if math.isnan(value):
        return ""
    text = f"{value:.{DIGITS.get(name, 1)}f}"
    if name in SHARES:
        text += f" [{float(line[name + ' low']):.1f}, {float(line[name + ' high']):.1f}]"
    return text


def between(text: str, name: str, body: str) -> str:
    """`text` with what lies between the markers `<!-- name: begin -->` and `<!-- name: end -->` replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"`text` must have one pair of the markers {begin} and {end}")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{body}{end}{rest.split(end)[1]}"


def rewrite(page: Path, reported: Path, validation: Path) -> None:
    """Put the tables of both CSVs into docs/cifar.md."""
    text = between(page.read_text(), "cifar", tables(reported))
    page.write_text(between(text, "cifar-validation", tables(validation)))

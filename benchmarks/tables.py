"""Writes every table of README.md and docs/*.md from the committed CSVs; no figure in them is typed.

    make tables                             # or: python benchmarks/tables.py; --check only says what differs

A section stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`; `SECTIONS` says what makes it.
Charts are drawn by benchmarks/charts.py.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import charts
from protocol import RESULTS, ROOT
from sampling import waterfall

from amg.report import Table
from amg.report.numbers import table_cells

Line = dict[str, str]
SECTION = re.compile(r"<!-- (?P<name>[^>:]+): begin -->\n(?P<body>.*?)<!-- (?P=name): end -->", re.DOTALL)
BEGIN = re.compile(r"<!-- ([^>:]+): begin -->")
DEMO_TEXT = ("guidance",)
DEMO_FIXED = {"evaluations/image": ("evaluations", ".1f"), "s/image": ("s/image", ".2f")}


def by(module: str, file: str) -> Callable[[], str]:
    """The Markdown that `tables(path)` of a neighbouring module makes of a CSV in results, or of them all."""

    def make() -> str:
        path = RESULTS / file
        return importlib.import_module(module).tables(path) if path.exists() else charts.NOTHING

    return make


def whole(file: str) -> Callable[[], str]:
    """A CSV in results as it is, as Markdown."""

    def make() -> str:
        if not (RESULTS / file).exists():
            return charts.NOTHING
        with (RESULTS / file).open(newline="", encoding="utf-8") as opened:
            lines = list(csv.DictReader(opened))
        return markdown(list(lines[0]), [list(line.values()) for line in lines])

    return make


def kernel_figures() -> str:
    """Each device's kernels, the chart first."""
    return _charted("kernels", charts.KEY, charts.table)


def sampler_figures() -> str:
    """Each device's waterfall, the chart first."""
    return _charted("sampler", waterfall.KEY, waterfall.table)


def _charted(stem: str, key: tuple[str, ...], table: Callable[[list[Line], Path], str]) -> str:
    found = []
    for path in sorted(RESULTS.glob(f"{stem}*.csv")):
        device = path.stem.removeprefix(stem).strip("-_") or "cpu"
        found.append(table(charts.latest(path, key), Path(f"{stem}-{device}.png")))
    return "\n\n".join(found) or charts.NOTHING


def demo(model: str) -> str:
    """One model's rows of `amg demo --csv`, rounded as on its page."""
    path = RESULTS / "demo.csv"
    if not path.exists():
        return charts.NOTHING
    with path.open(newline="", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["model"] == model]
    names = list(lines[0])
    names = names[names.index("guidance") : names.index("s/image") + 1]
    rows = [[_demo_cell(name, line[name]) for name in names] for line in lines]
    heads = [DEMO_FIXED[name][0] if name in DEMO_FIXED else name for name in names]
    return markdown(heads, table_cells(Table(heads, rows)))


def _demo_cell(name: str, text: str) -> str | float:
    if name in DEMO_TEXT:
        return text
    return f"{float(text):{DEMO_FIXED[name][1]}}" if name in DEMO_FIXED else float(text)


def audit() -> str:
    """An audit's table.csv, one row per measure, with its interval where it has one."""
    path = RESULTS / "audit.csv"
    if not path.exists():
        return charts.NOTHING
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    names = list(lines[0])
    names = names[names.index("guidance_scale") + 1 : names.index("date")]
    names = [name for name in names if not name.endswith(("_low", "_high"))]
    rows = [[f"`{name}`", *(_audit_cell(line, name) for line in lines)] for name in names]
    first = lines[0]
    made = f"{first['device']}, {first['threads']} thread, torch {first['torch']}, diffusers "
    made += f"{first['diffusers']}, commit {first['commit']}, recorded {first['date'][:10]}.\n\n"
    return made + markdown(["column", *(line["guidance"] for line in lines)], rows)


def _audit_cell(line: Line, name: str) -> str:
    if not line[name]:
        return "–"
    value, low, high = (line.get(name + end, "") for end in ("", "_low", "_high"))
    return f"{float(value):.4g}" + (f" ({float(low):.3g}–{float(high):.3g})" if low else "")


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


SECTIONS: dict[str, Callable[[], str]] = {
    "figures": kernel_figures,
    "sampler figures": sampler_figures,
    "demo photos-ddpm": partial(demo, "photos-ddpm"),
    "demo photos-sd": partial(demo, "photos-sd"),
    "audit": audit,
    "detection": by("detection", "detection.csv"),
    "adversarial": by("adversarial", "adversarial.csv"),
    "mitigations": by("frontier", ""),
    "cifar": by("cifar.report", "cifar.csv"),
    "cifar-validation": by("cifar.report", "cifar_validation.csv"),
    "serving": by("bench_serving", "serving.csv"),
    "guard": by("bench_guard", "guard.csv"),
    "own-loop": whole("own_loop.csv"),
    "pipelines": whole("pipelines.csv"),
    "index": whole("index.csv"),
    "ray": whole("ray.csv"),
    "flow": by("bench_flow", "flow.csv"),
    "flow-detection": by("bench_flow", "flow_detection.csv"),
    "diffusers-tests": whole("diffusers_tests.csv"),
    "later-tries": by("bench_later_tries", "later_tries.csv"),
    "guard-threshold": by("bench_guard_threshold", "guard_threshold.csv"),
    "guard-views": whole("guard_views.csv"),
    "engine": by("bench_engine", "engine.csv"),
    "engine-gpu": by("bench_engine_gpu", "engine-nvidia-h200.csv"),
    "panels": whole("panels.csv"),
    "whitebox": whole("whitebox.csv"),
    "interval": by("bench_interval", "interval.csv"),
}


def pages(root: Path = ROOT) -> list[Path]:
    """README.md and the pages of docs."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def filled(text: str, sections: dict[str, Callable[[], str]] = SECTIONS) -> str:
    """A page's text with every section made anew; ValueError for a marker without a generator or an end."""

    def fill(found: re.Match[str]) -> str:
        name = found["name"]
        return f"<!-- {name}: begin -->\n{sections[name]().rstrip()}\n<!-- {name}: end -->"

    begun, whole = BEGIN.findall(text), [found["name"] for found in SECTION.finditer(text)]
    for name in begun:
        if name not in sections:
            raise ValueError(f"`{name}` must be one of {sorted(sections)}: no table is made for this marker")
        if name not in whole:
            raise ValueError(f"`{name}` must have an end marker after its begin marker, got none")
    return SECTION.sub(fill, text)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the tables of README.md and docs/ from the CSVs.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page differs")
    parser.add_argument("pages", nargs="*", type=Path, help="only these (default: all)")
    options = parser.parse_args()
    differ = []
    for page in [page.resolve() for page in options.pages] or pages():
        old = page.read_text(encoding="utf-8")
        new = filled(old)
        if new != old:
            differ.append(page.relative_to(ROOT))
            if not options.check:
                page.write_text(new, encoding="utf-8")
    print(
        "\n".join(f"{page}: {'differs' if options.check else 'written'}" for page in differ) or "up to date"
    )
    return 1 if options.check and differ else 0


if __name__ == "__main__":
    sys.exit(main())

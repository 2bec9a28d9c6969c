"""Draws the charts and fills docs/performance.md from benchmarks/results/{kernels,sampler}*.csv alone.

    python benchmarks/charts.py   # docs/kernels-*.png, docs/sampler-*.png, tables between the page's markers

A figure is the last one recorded of its case, provider and metric, or of its case and contestant.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from protocol import OURS, RESULTS, ROOT
from sampling import waterfall

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
KEY = ("kernel", "case", "threads", "provider", "metric")
NOTHING = "No figures are recorded yet."
INK, OURS_COLOUR, RIVAL_COLOUR = "#222222", "#d1495b", "#9db4c0"
Line = dict[str, str]
Groups = dict[tuple[str, str, str], dict[str, Line]]  # (kernel, case, threads) -> provider -> line


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the kernels' figures and fill the page with them.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of kernels*.csv")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/performance.md", help="charts go beside it")
    options = parser.parse_args()
    tables = []
    for path in sorted(options.results.glob("kernels*.csv")):
        lines = latest(path)
        chart = options.page.parent / f"kernels-{path.stem.removeprefix('kernels').strip('-_') or 'cpu'}.png"
        draw(lines, chart)
        tables.append(table(lines, chart))
        print(f"{chart}: {len(lines)} figures")
    fill(options.page, "\n\n".join(tables) or NOTHING, BEGIN, END)
    tables = []
    for path in sorted(options.results.glob("sampler*.csv")):
        lines = latest(path, waterfall.KEY)
        chart = options.page.parent / f"sampler-{path.stem.removeprefix('sampler').strip('-') or 'cpu'}.png"
        waterfall.draw(lines, chart)
        tables.append(waterfall.table(lines, chart))
        print(f"{chart}: {len(lines)} figures")
    fill(options.page, "\n\n".join(tables) or NOTHING, waterfall.BEGIN, waterfall.END)


def latest(path: Path, key: tuple[str, ...] = KEY) -> list[Line]:
    """Return the last line with the same columns `key`, in the file's order of cases."""
    found: dict[tuple[str, ...], Line] = {}
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            found[tuple(line[name] for name in key)] = line
    return list(found.values())


def grouped(lines: list[Line], metric: str) -> Groups:
    groups: Groups = defaultdict(dict)
    for line in lines:
        if line["metric"] == metric:
            groups[line["kernel"], line["case"], line["threads"]][line["provider"]] = line
    return groups


def is_yardstick(provider: str) -> bool:
    """Copying and reading are no contestants: they show the memory's bandwidth."""
    return provider.startswith(("copy:", "read:"))


def draw(lines: list[Line], path: Path) -> None:
    """One panel a case: each provider's time as a multiple of ours, on a logarithmic axis."""
    groups = {
        key: {name: line for name, line in providers.items() if not is_yardstick(name)}
        for key, providers in grouped(lines, "ms").items()
    }
    groups = {key: providers for key, providers in groups.items() if OURS in providers and len(providers) > 1}
    columns = 2
    rows = math.ceil(len(groups) / columns)
    most = max(len(providers) for providers in groups.values())
    figure, axes = plt.subplots(rows, columns, figsize=(13, rows * (0.9 + 0.27 * most)), squeeze=False)
    for axis, (key, providers) in zip(axes.flat, groups.items(), strict=False):
        panel(axis, key, providers)
    for axis in list(axes.flat)[len(groups) :]:
        axis.axis("off")
    title = "Median time as a multiple of amg's on a logarithmic scale, shorter is better"
    figure.suptitle(
        f"{title}\n{lines[0]['device']}, torch {lines[0]['torch']}",
        x=0.01,
        y=0.995,
        ha="left",
        va="top",
        fontsize=12,
        color=INK,
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.45 / (rows * (0.9 + 0.27 * most))), w_pad=3, h_pad=1.8)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def panel(axis: Axes, key: tuple[str, str, str], providers: dict[str, Line]) -> None:
    """Horizontal bars, fastest on top, with the time itself beside each."""
    order = sorted(providers, key=lambda name: -float(providers[name]["p50"]))
    ours = float(providers[OURS]["p50"])
    ratios = [float(providers[name]["p50"]) / ours for name in order]
    floor = min(1.0, *ratios) / 1.6
    colours = [OURS_COLOUR if name == OURS else RIVAL_COLOUR for name in order]
    axis.barh(order, [ratio - floor for ratio in ratios], left=floor, color=colours, height=0.68)
    axis.set_xscale("log")
    axis.set_xlim(floor, max(ratios) * 6)
    for at, (name, ratio) in enumerate(zip(order, ratios, strict=True)):
        text = f"{time_text(float(providers[name]['p50']))}" + ("" if name == OURS else f"   {ratio:.1f}×")
        axis.text(ratio * 1.06, at, text, va="center", fontsize=8.5, color=INK)
    kernel, case, threads = key
    where = f", {threads} thread{'s' if threads != '1' else ''}" if threads not in ("", "0") else ""
    axis.set_title(f"{kernel}  {case}{where}", loc="left", fontsize=9.5, color=INK)
    axis.axvline(1, color=INK, linewidth=0.6)
    axis.tick_params(axis="y", length=0, labelsize=9)
    axis.xaxis.set_visible(False)
    for side in ("top", "right", "bottom", "left"):
        axis.spines[side].set_visible(False)


def time_text(milliseconds: float) -> str:
    return f"{milliseconds * 1e3:.3g} µs" if milliseconds < 1 else f"{milliseconds:.3g} ms"


def table(lines: list[Line], chart: Path) -> str:
    """Return one device's figures as Markdown, the chart first."""
    first = lines[0]
    memory = grouped(lines, "extra MiB")
    made = f"torch {first['torch']}, recorded {first['date'][:10]}"
    head = f"### {first['device']}\n\n{made}\n\n![Times]({chart.name})\n"
    text = [
        head,
        "| case | threads | provider | median | 20–80 % | × amg | GB/s | note |",
        "|---|---|---|--:|--:|--:|--:|---|",
    ]
    for key, providers in grouped(lines, "ms").items():
        ours = float(providers[OURS]["p50"])
        for name, line in providers.items():
            p20, p50, p80 = (float(line[column]) for column in ("p20", "p50", "p80"))
            extra = memory.get(key, {}).get(name)
            note = line["note"] + (f"; {float(extra['p50']):.1f} MiB extra" if extra else "")
            ratio = "" if is_yardstick(name) else f"{p50 / ours:.2f}"
            spread = f"{time_text(p20)} – {time_text(p80)}"
            cells = (
                f"{key[0]} {key[1]}",
                key[2],
                name,
                time_text(p50),
                spread,
                ratio,
                line["gb_per_s"],
                note,
            )
            text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def fill(page: Path, figures: str, begin: str, end: str) -> None:
    """Replace what stands between two of the page's markers."""
    before, rest = page.read_text().split(begin)
    after = rest.split(end)[1]
    page.write_text(f"{before}{begin}\n{figures}\n{end}{after}")


if __name__ == "__main__":
    main()

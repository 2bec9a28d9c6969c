"""The waterfall chart and the page's tables of benchmarks/results/sampler*.csv."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

BEGIN, END = "<!-- sampler figures: begin -->", "<!-- sampler figures: end -->"
KEY = ("model", "prompts", "batch", "images", "contestant")
PLAIN = "plain"
INK, BAR, PLAIN_BAR = "#222222", "#d1495b", "#9db4c0"
SHOWN = {
    "unet_evaluations": "U-Net",
    "vae_decodes": "decodes",
    "embeddings": "embeddings",
    "searches": "searches",
    "gradients": "gradients",
    "unet_gradients": "U-Net gradients",
    "rewinds": "rewinds",
    "retries": "retries",
    "memorised_pct": "memorised %",
    "judged_copies_pct": "judged copies %",
    "changed_pct": "changed %",
    "extra_mib": "MiB",
}
Line = dict[str, str]


def cases(lines: list[Line]) -> dict[tuple[str, ...], list[Line]]:
    """Lines by model, prompts, batch and images, in order, only those with a plain contestant."""
    found: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        found.setdefault(tuple(line[name] for name in KEY[:-1]), []).append(line)
    keys = sorted(found, key=lambda key: (key[0], int(key[2]), int(key[3]), key[1]))
    return {key: found[key] for key in keys if any(line["contestant"] == PLAIN for line in found[key])}


def multiples(own: list[Line]) -> list[float]:
    """Each contestant's median as a multiple of plain's."""
    plain = next(float(line["p50"]) for line in own if line["contestant"] == PLAIN)
    return [float(line["p50"]) / plain for line in own]


def title(key: tuple[str, ...]) -> str:
    return f"{key[0]}, {key[1]} prompts, batch {key[2]}, {key[3]} images"


def draw(lines: list[Line], path: Path) -> None:
    """One panel a case: seconds per image as a multiple of plain's, one bar per contestant, top to bottom."""
    found = cases(lines)
    columns = 3
    rows = max(1, -(-len(found) // columns))
    figure, axes = plt.subplots(rows, columns, figsize=(15, 2.5 * rows + 0.6), squeeze=False)
    for axis, (key, own) in zip(axes.flat, found.items(), strict=False):
        panel(axis, title(key), own)
    for axis in list(axes.flat)[len(found) :]:
        axis.axis("off")
    heading = "Median seconds per image as a multiple of plain diffusers, shorter is better"
    heading = f"{heading}\n{lines[0]['device']}, torch {lines[0]['torch']}, {lines[0]['steps']} steps"
    figure.suptitle(heading, x=0.01, ha="left", fontsize=12, color=INK)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.1 / rows), w_pad=2, h_pad=1.5)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def panel(axis: Axes, heading: str, own: list[Line]) -> None:
    """Horizontal bars in the order of the waterfall, with the multiple and the seconds beside each."""
    own, ratios = own[::-1], multiples(own)[::-1]
    names = [line["contestant"] for line in own]
    axis.barh(names, ratios, color=[PLAIN_BAR if name == PLAIN else BAR for name in names], height=0.68)
    for at, (line, ratio) in enumerate(zip(own, ratios, strict=True)):
        text = f" {ratio:.2f}×   {float(line['p50']):.3g} s"
        axis.text(ratio, at, text, va="center", fontsize=8.5, color=INK)
    axis.set_xlim(0, max(ratios) * 1.4)
    axis.axvline(1, color=INK, linewidth=0.6)
    axis.set_title(heading, loc="left", fontsize=9.5, color=INK)
    axis.tick_params(axis="y", length=0, labelsize=8.5)
    axis.xaxis.set_visible(False)
    for side in ("top", "right", "bottom", "left"):
        axis.spines[side].set_visible(False)


def table(lines: list[Line], chart: Path) -> str:
    """Every case as Markdown, the chart first; counts are per image."""
    first = lines[0]
    made = f"torch {first['torch']}, {first['threads']} threads, {first['steps']} steps"
    text = [f"### {first['device']}\n\n{made}, recorded {first['date'][:10]}\n\n![Waterfall]({chart.name})"]
    for key, own in cases(lines).items():
        text.append(f"\n**{title(key)}**, {own[0]['note']}\n")
        text.append(f"| contestant | s/image | 20–80 % | × plain | {' | '.join(SHOWN.values())} |")
        text.append(f"|---|{'--:|' * (3 + len(SHOWN))}")
        for line, ratio in zip(own, multiples(own), strict=True):
            p20, p50, p80 = (f"{float(line[name]):.3g}" for name in ("p20", "p50", "p80"))
            work = " | ".join(line[name] for name in SHOWN)
            text.append(f"| {line['contestant']} | {p50} | {p20} – {p80} | {ratio:.2f} | {work} |")
    return "\n".join(text)

"""The mitigations' tables, frontier plots and contact sheet, from benchmarks/results/mitigations*.csv alone.

`tables(folder)` is the text between the markers of docs/mitigations.md; `write(folder)` fills the page and
draws docs/frontier.png. The sheet, docs/mitigations.png, is put together from the strips that
`bench_mitigations.py --sheet` keeps.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from mitigations.measure import Prompts
from mitigations.methods import ABLATION, ALL, BY_NAME, METHODS, OURS, Method
from mitigations.records import GRID, SECONDS, SHARE, TEST, Row, chosen, point_text, read
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/mitigations.md"
BEGIN, END = "<!-- mitigations: begin -->", "<!-- mitigations: end -->"
INK, OURS_COLOUR, RIVAL_COLOUR, PLAIN_COLOUR = "#222222", "#d1495b", "#5b7f95", "#222222"
REACHED = 1.0  # percent: "reaches zero" in the comparison
SHARES = (
    (SHARE.removesuffix(" %"), "memorised by the embedder that guides ours, %"),
    ("network", "copies by the judge no method saw, %"),
)
KEPT = {"memorised": 24, "ordinary": 12}
SHOWN = {"memorised": 8, "ordinary": 4}
TILE = 64


def write(folder: Path, strips: Path | None = None) -> None:
    """Fill the page and draw the plots; with `strips` the contact sheet too."""
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{tables(folder)}\n{END}{rest.split(END)[1]}")
    plot(folder, PAGE.parent / "frontier.png")
    if strips is not None:
        sheet(folder, strips, PAGE.parent / "mitigations.png")


def tables(folder: Path) -> str:
    """The tables of the CSVs in `folder`, as Markdown; a pure function of them."""
    rows, seconds = _by_method(folder), seconds_of(folder)
    if not rows:
        return "No figures are recorded yet."
    first = next(iter(rows.values()))
    head = (
        f"{first['images']} test images a method, {first['steps']} DDIM steps, guidance scale 7.5, "
        f"seeds from {first['first seed']}; brackets are 95 % intervals. torch {first['torch']}."
    )
    compared = [method for method in METHODS if method.group != ABLATION or method.name == ALL]
    ablations = [BY_NAME["plain"], *(method for method in METHODS if method.group == ABLATION)]
    parts = [
        head,
        "### Copies",
        _table(COPIES, compared, rows, seconds),
        "### Quality and cost",
        _table(QUALITY, compared, rows, seconds),
        "### Who wins where",
        _verdicts(rows, seconds),
        "### The three terms, in the paper's form",
        _table(TERMS, [*ablations, BY_NAME["ours, main"]], rows, seconds),
        "### The grids, on validation",
        _grid(read(folder / GRID)),
    ]
    return "\n\n".join(parts)


def seconds_of(folder: Path) -> dict[str, float]:
    """Seconds per image by method: the median over the timing's rounds."""
    times: dict[str, list[float]] = {}
    for row in read(folder / SECONDS):
        times.setdefault(row["method"], []).append(float(row["seconds"]))
    return {method: statistics.median(values) for method, values in times.items()}


def _by_method(folder: Path) -> dict[str, Row]:
    return {row["method"]: row for row in read(folder / TEST)}


def _share(name: str) -> str:
    return f"{{{name} %:.1f}} [{{{name} low:.1f}}, {{{name} high:.1f}}]"


COPIES = {
    "method": "{method}",
    "options": "{options}",
    "> 0.5 %": _share("cosine > 0_5"),
    "> 0.4 %": "{cosine > 0_4 %:.1f}",
    "> 0.7 %": "{cosine > 0_7 %:.1f}",
    "Top5%": "{Top5%:.3f}",
    "Top1": "{Top1:.3f}",
    "before the check %": "{before the check %:.1f}",
    "network judge %": _share("network"),
    "luminance judge %": _share("luminance"),
}
QUALITY = {
    "method": "{method}",
    "FID": "{FID:.0f} [{FID low:.0f}, {FID high:.0f}]",
    "KID": "{KID:.1f}",
    "alignment": "{alignment:.3f} [{alignment low:.3f}, {alignment high:.3f}]",
    "memorised / ordinary": "{alignment memorised:.3f} / {alignment ordinary:.3f}",
    "subject %": "{subject %:.0f}",
    "diversity": "{diversity memorised:.2f} / {diversity ordinary:.2f}",
    "evaluations": "{evaluations:.0f}",
    "s/image": "{timed}",
    "blocked %": "{blocked %:.1f}",
}
TERMS = {
    "method": "{method}",
    "options": "{options}",
    "> 0.5 %": _share("cosine > 0_5"),
    "network judge %": _share("network"),
    "luminance judge %": "{luminance %:.1f}",
    "FID": "{FID:.0f}",
    "alignment": "{alignment:.3f}",
    "evaluations": "{evaluations:.0f}",
}


def _table(
    columns: dict[str, str], methods: Sequence[Method], rows: dict[str, Row], seconds: dict[str, float]
) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{'|'.join('---' if c in WORDS else '--:' for c in columns)}|"]
    for method in methods:
        if method.name not in rows:
            continue
        row = rows[method.name]
        # a dot in a field's name would be an attribute to `str.format`
        values: dict[str, Any] = {name.replace(".", "_"): _number(value) for name, value in row.items()}
        values["options"] = options_text(row["options"])
        values["timed"] = f"{seconds[method.name]:.2f}" if method.name in seconds else "–"
        cells = [template.format(**values) for template in columns.values()]
        if method.group == OURS:
            cells = [f"**{cell}**" if cell else cell for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


WORDS = ("method", "options")


def options_text(options: str) -> str:
    """A point of a grid, readably."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in json.loads(options).items())


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _verdicts(rows: dict[str, Row], seconds: dict[str, float]) -> str:
    """Which rivals reach zero, by either measure, and where each of them is better than ours."""
    lines = []
    for own in (method.name for method in METHODS if method.group == OURS and method.name in rows):
        for share, what in SHARES:
            reach = [
                method.name
                for method in METHODS
                if (method.group != OURS and (method.group != ABLATION or method.name == ALL))
                and method.name in rows
                and float(rows[method.name][f"{share} %"]) <= REACHED
            ]
            said = [f"{name} ({_better(rows, seconds, name, own) or 'nowhere'})" for name in reach]
            own_share = float(rows[own][f"{share} %"])
            lines.append(
                f"- **{own}**, {own_share:.1f} {what}. At most {REACHED:g} % there: "
                + ("; ".join(said) + " — in brackets where it is better than ours." if said else "no rival.")
            )
    return "\n".join(lines)


def _better(rows: dict[str, Row], seconds: dict[str, float], rival: str, own: str) -> str:
    """Axes on which `rival` is strictly better than `own`, with both figures."""
    found = []
    for name, sign, places in (("FID", -1, 0), ("alignment", 1, 3)):
        theirs, mine = float(rows[rival][name]), float(rows[own][name])
        if sign * (theirs - mine) > 0:
            found.append(f"{name} {theirs:.{places}f} against {mine:.{places}f}")
    if rival in seconds and own in seconds and seconds[rival] < seconds[own]:
        found.append(f"{seconds[rival]:.2f} s against {seconds[own]:.2f} s")
    return ", ".join(found)


def _grid(rows: Sequence[Row]) -> str:
    lines = [
        "| method | point | memorised % | network judge % | FID | alignment | chosen |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for row in sorted(rows, key=lambda row: list(BY_NAME).index(row["method"])):
        mark = "yes" if point_text(chosen(rows, row["method"])) == row["options"] else ""
        figures = f"{float(row[SHARE]):.1f} | {float(row['network %']):.1f} | {float(row['FID']):.0f}"
        lines.append(
            f"| {row['method']} | {options_text(row['options']) or 'as published'} | {figures} | "
            f"{float(row['alignment']):.3f} | {mark} |"
        )
    return "\n".join(lines)


def plot(folder: Path, path: Path) -> None:
    """Two columns of panels, one share of copies each, against FID, alignment and seconds per image."""
    rows, seconds = _by_method(folder), seconds_of(folder)
    methods = [
        method
        for method in METHODS
        if method.name in rows and (method.group != ABLATION or method.name == ALL)
    ]
    if not methods:
        return
    figure, axes = plt.subplots(3, 2, figsize=(15, 17), squeeze=False)
    for column, (share, title) in enumerate(SHARES):
        for line, (name, better) in enumerate(
            (("FID", "lower"), ("alignment", "higher"), ("seconds", "lower"))
        ):
            axis = axes[line][column]
            panel(axis, methods, rows, seconds, share, name)
            axis.set_xlabel(title, fontsize=10, color=INK)
            unit = {"seconds": "seconds per image", "alignment": "text alignment"}.get(name, name)
            axis.set_ylabel(f"{unit} ({better} is better)", fontsize=10, color=INK)
    figure.suptitle(
        "Mitigations on photos-sd: copies against quality and time, with 95 % intervals. "
        "Ours in red; further left is better.",
        x=0.01,
        ha="left",
        fontsize=13,
        color=INK,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.985), h_pad=2)
    for axis in axes.flat:
        label(axis)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def panel(
    axis: Axes,
    methods: Sequence[Method],
    rows: dict[str, Row],
    seconds: dict[str, float],
    share: str,
    name: str,
) -> None:
    """One point a method with its interval bars; the share's axis is a square root, to part the low ones."""
    for method in methods:
        row = rows[method.name]
        if name == "seconds" and method.name not in seconds:
            continue
        x = float(row[f"{share} %"])
        y = seconds[method.name] if name == "seconds" else float(row[name])
        wide = [[max(x - float(row[f"{share} low"]), 0)], [max(float(row[f"{share} high"]) - x, 0)]]
        tall = None
        if name != "seconds":
            tall = [[max(y - float(row[f"{name} low"]), 0)], [max(float(row[f"{name} high"]) - y, 0)]]
        colour = (
            OURS_COLOUR if method.group == OURS else PLAIN_COLOUR if method.name == "plain" else RIVAL_COLOUR
        )
        axis.errorbar(
            [x], [y], xerr=wide, yerr=tall, fmt="none", color=colour, elinewidth=0.7, alpha=0.35, zorder=2
        )
        marker = "D" if method.group == OURS else "o"
        axis.plot([x], [y], marker, color=colour, markersize=8 if method.group == OURS else 6, zorder=3)
        axis.annotate(method.label, (x, y), fontsize=9, color=colour, zorder=4)
    axis.set_xscale("function", functions=(_root, _square))
    axis.set_xlim(-0.3, 100)
    axis.set_xticks([0, 1, 2, 5, 10, 20, 40, 60, 80, 100])
    if name == "seconds":
        axis.set_yscale("log")
    axis.grid(color="#e6e6e6", linewidth=0.6)
    axis.tick_params(labelsize=9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _root(x: Any) -> Any:
    return torch.as_tensor(x).clamp_min(0).sqrt().numpy() - torch.as_tensor(x).clamp_max(0).abs().numpy()


def _square(x: Any) -> Any:
    return (torch.as_tensor(x).clamp_min(0) ** 2).numpy()


def label(axis: Axes) -> None:
    """Move each label to the first place around its point that covers no point and no other label."""
    figure = axis.get_figure()
    assert figure is not None
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    texts = [text for text in axis.texts if isinstance(text, Annotation)]
    points = [axis.transData.transform(text.xy) for text in texts]
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    frame = axis.get_window_extent(renderer)
    for text, (x, y) in zip(texts, points, strict=True):
        size = text.get_window_extent(renderer)
        box = _free(x, y, size.width, size.height, taken, frame)
        taken.append(box)
        text.set_position(_at(axis, box.x0, box.y0))
        text.set_verticalalignment("bottom")
        if max(abs(box.x0 - x), abs(box.y0 - y)) > 40 or box.x1 < x - 12:
            axis.annotate(
                "",
                _at(axis, min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)),
                text.xy,
                arrowprops={"arrowstyle": "-", "color": text.get_color(), "linewidth": 0.5, "alpha": 0.7},
            )


def _at(axis: Axes, x: float, y: float) -> tuple[float, float]:
    """Pixels of the figure in the axis's own units."""
    left, low = axis.transData.inverted().transform((x, y))
    return float(left), float(low)


def _free(x: float, y: float, width: float, height: float, taken: Sequence[Bbox], frame: Bbox) -> Bbox:
    """The nearest free box of this size around (x, y) inside `frame`; the nearest of all if none is free."""
    places = [
        (x + across, y + up)
        for distance in (9, 16, 26, 38, 52, 68, 86, 106, 128)
        for across, up in (
            (distance, -height / 2),
            (-distance - width, -height / 2),
            (-width / 2, distance),
            (-width / 2, -distance - height),
            (distance, distance - height / 2),
            (distance, -distance - height / 2),
            (-distance - width, distance - height / 2),
            (-distance - width, -distance - height / 2),
        )
    ]
    boxes = [Bbox.from_bounds(left, low, width, height) for left, low in places]
    for box in boxes:
        inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        if inside and not box.count_overlaps(taken):
            return box
    return boxes[0]


def keep(images: Tensor, prompts: Prompts, path: Path) -> None:
    """A strip of the first pictures, float [N, 3, H, W] in [0, 1]: memorised prompts, then ordinary ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    strip = Image.new("RGB", (sum(KEPT.values()) * TILE, TILE), "white")
    left = 0
    for kind, rows in (("memorised", prompts.specific), ("ordinary", ~prompts.specific)):
        for number, image in enumerate(images[rows][: KEPT[kind]]):
            strip.paste(_tile(image), ((left + number) * TILE, 0))
        left += KEPT[kind]
    strip.save(path)


def strip_path(folder: Path, split: str, method: str, options: str) -> Path:
    """Where the strip of one method at one point is kept."""
    return folder / split / f"{method} {options}.png".replace('"', "")


def _tile(image: Tensor) -> Image.Image:
    array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array).resize((TILE, TILE), Image.Resampling.NEAREST)


def sheet(folder: Path, strips: Path, path: Path, margin: int = 190) -> None:
    """A row per method: 8 memorised prompts of the test set, 4 ordinary ones; the label on the left."""
    rows = _by_method(folder)
    kept = [
        (method, strip_path(strips, "test", method.name, rows[method.name]["options"]))
        for method in METHODS
        if method.name in rows
    ]
    lines = [(method, Image.open(file)) for method, file in kept if file.exists()]
    columns = [*range(SHOWN["memorised"]), *range(KEPT["memorised"], KEPT["memorised"] + SHOWN["ordinary"])]
    page = Image.new("RGB", (margin + len(columns) * (TILE + 2), len(lines) * (TILE + 2)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for top, (method, strip) in enumerate(lines):
        pen.text((4, top * (TILE + 2) + TILE // 2 - 8), method.label, fill=INK, font=font)
        for left, column in enumerate(columns):
            tile = strip.crop((column * TILE, 0, (column + 1) * TILE, TILE))
            page.paste(tile, (margin + left * (TILE + 2), top * (TILE + 2)))
    page.save(path)

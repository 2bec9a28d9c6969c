"""What the tables say: figures by contestant, the waterfall, and the issue's bars; knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sampling.contestants import LITERAL, OURS, PLAIN
from sampling.counting import COUNTED

SPREAD = ("p20", "p50", "p80")  # seconds per image
COLUMNS = (
    *("date", "commit", "device", "torch", "threads", "model", "steps", "prompts", "batch", "images"),
    *("rounds", "contestant", *SPREAD, *COUNTED, "rewinds", "retries", "blocked", "memorised_pct"),
    *("judged_copies_pct", "changed_pct", "extra_mib", "note"),
)
Line = dict[str, object]


@dataclass(frozen=True)
class Bar:
    """One bar: `figure` of a case's lines by contestant, at most or at least `limit`; None: not measured."""

    label: str
    prompts: str
    limit: float
    figure: Callable[[dict[str, Line]], float | None]
    at_least: bool = False
    model: str = ""  # of this model's cases alone
    images: int = 0  # of cases with at least as many images


def seconds(over: str, under: str) -> Callable[[dict[str, Line]], float | None]:
    """The ratio of two contestants' medians, None where one did not run."""

    def ratio(lines: dict[str, Line]) -> float | None:
        if over not in lines or under not in lines:
            return None
        return float(lines[over]["p50"]) / float(lines[under]["p50"])

    return ratio


def of_ours(column: str) -> Callable[[dict[str, Line]], float | None]:
    """A column of our own line, None where it is empty."""
    return lambda lines: number(lines.get(OURS, {}).get(column))


def judged_against_literal(lines: dict[str, Line]) -> float | None:
    """By how many percentage points the judge sees more copies in ours than in the literal method's."""
    ours, theirs = (number(lines.get(name, {}).get("judged_copies_pct")) for name in (OURS, LITERAL))
    return None if ours is None or theirs is None else ours - theirs


def number(value: object) -> float | None:
    return None if value in (None, "") else float(str(value))


BARS = (
    Bar("ordinary prompts, ours / plain", "ordinary", 1.05, seconds(OURS, PLAIN)),
    Bar("memorised prompts, ours / plain", "memorised", 1.6, seconds(OURS, PLAIN)),
    Bar("literal / ours", "memorised", 3.5, seconds(LITERAL, OURS), at_least=True, model="sd-proportions"),
    Bar("memorised % delivered, 256 images", "memorised", 0, of_ours("memorised_pct"), images=256),
    Bar("copies a judge sees, ours less literal", "memorised", 0, judged_against_literal, images=256),
    Bar("ordinary images changed %", "ordinary", 1, of_ours("changed_pct"), images=100),
)


def waterfall(lines: Sequence[Line]) -> str:
    """One case: seconds per image, as a multiple of plain, and the work behind it, per image."""
    first = lines[0]
    plain = next((float(line["p50"]) for line in lines if line["contestant"] == PLAIN), None)
    named = (*COUNTED, "rewinds", "retries", "memorised_pct", "judged_copies_pct", "changed_pct", "extra_mib")
    heads = ("unet", "decode", "embed", "search", "grad", "unet grad")
    heads = (*heads, "rewind", "retry", "memorised %", "judged %", "changed %", "MiB")
    rows = [("contestant", "s/image", "20-80 %", "x plain", *heads)]
    for line in lines:
        p20, p50, p80 = (float(line[name]) for name in SPREAD)
        ratio = f"{p50 / plain:.2f}" if plain else ""
        spread = f"{p20:.3g}-{p80:.3g}"
        rows.append((line["contestant"], f"{p50:.3g}", spread, ratio, *(str(line[name]) for name in named)))
    title = f"{first['model']}, {first['prompts']} prompts, batch {first['batch']}, {first['images']} images"
    return f"\n{title}, {first['steps']} steps, {first['note']}\n{aligned(rows)}"


def judged(lines: Sequence[Line]) -> str:
    """Every bar of every case: what was measured, and whether it is met."""
    cases: dict[tuple[object, ...], dict[str, Line]] = {}
    for line in lines:
        key = tuple(line[name] for name in ("model", "prompts", "batch", "images"))
        cases.setdefault(key, {})[str(line["contestant"])] = line
    rows = [("bar", "case", "figure", "limit", "met")]
    for bar in BARS:
        limit = f"{'>=' if bar.at_least else '<='} {bar.limit:g}"
        found = [
            (f"{model}, batch {batch}", bar.figure(by_name))
            for (model, prompts, batch, images), by_name in cases.items()
            if prompts == bar.prompts and bar.model in (model, "") and int(str(images)) >= bar.images
        ]
        found = [(case, figure) for case, figure in found if figure is not None]
        for case, figure in found:
            met = figure >= bar.limit if bar.at_least else figure <= bar.limit
            rows.append((bar.label, case, f"{figure:.3g}", limit, "yes" if met else "NO"))
        if not found:
            rows.append((bar.label, "not run", "", limit, "-"))
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell, a rule under the first row."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    padded = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join(padded)

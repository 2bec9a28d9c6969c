"""Histograms of similarity, a row per column on a shared axis: geometry in percent, drawn by the template."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BINS = 40  # about this many over the whole axis


@dataclass(frozen=True)
class Bar:
    left: float  # all in percent of the row
    width: float
    height: float
    warm: bool  # beyond the memorisation threshold
    count: int


@dataclass(frozen=True)
class Mark:
    left: float
    label: str


@dataclass(frozen=True)
class Row:
    column: str
    bars: tuple[Bar, ...]
    lines: tuple[Mark, ...]
    closer: int  # values beyond the first line of the row
    total: int


@dataclass(frozen=True)
class Histogram:
    title: str
    note: str
    rows: tuple[Row, ...]
    ticks: tuple[Mark, ...]


def histogram(
    title: str,
    note: str,
    values: Mapping[str, Sequence[float]],
    thresholds: Mapping[str, float],
    negated: bool = False,
) -> Histogram:
    """Bins of sigma per column; bin edges fall on the first threshold, so that colour and count agree.

    values: sigma of the delivered images per column (larger = closer). thresholds: sigma by name; one whose
    name is a column's is drawn in that row only. negated: the axis is labelled with -sigma (nL2).
    """
    lines = _lines(values, thresholds)
    origin = next(iter(thresholds.values()))
    everything = [v for column in values.values() for v in column] + list(thresholds.values())
    width = _nice((max(everything) - min(everything)) / BINS or 0.01)
    first = math.floor((min(everything) - origin) / width) - 1
    last = math.ceil((max(everything) - origin) / width) + 1
    counts = {column: _counts(column_values, origin, width) for column, column_values in values.items()}
    tallest = max((count for bins in counts.values() for count in bins.values()), default=1)

    def left(value: float) -> float:
        return 100.0 * ((value - origin) / width - first) / (last - first)

    rows = tuple(
        Row(
            column=column,
            bars=_bars(counts[column], first, last, tallest),
            lines=tuple(Mark(left(t), _label(t, negated)) for t in lines[column].values()),
            closer=sum(value > origin for value in column_values),
            total=len(column_values),
        )
        for column, column_values in values.items()
    )
    ticks = _ticks(origin + first * width, origin + last * width, negated)
    return Histogram(title, note, rows, tuple(Mark(left(t), _label(t, negated)) for t in ticks))


def nice_step(span: float, steps: int) -> float:
    """The round number (1, 2, 2.5, 5 times a power of ten) nearest above span / steps."""
    return _nice(span / steps)


def _nice(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return next(
        factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= value * (1 - 1e-9)
    )


def _lines(
    values: Mapping[str, Sequence[float]], thresholds: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    shared = {name: value for name, value in thresholds.items() if name not in values}
    return {c: shared | {c: thresholds[c]} if c in thresholds else shared for c in values}


def _counts(values: Sequence[float], origin: float, width: float) -> dict[int, int]:
    counts: dict[int, int] = {}
    for value in values:
        bin_number = (
            math.ceil((value - origin) / width) - 1
        )  # bins are (edge, edge]: "memorised" is strictly above
        if (value > origin) != (bin_number >= 0):
            bin_number = 0 if value > origin else -1
        counts[bin_number] = counts.get(bin_number, 0) + 1
    return counts


def _bars(counts: Mapping[int, int], first: int, last: int, tallest: int) -> tuple[Bar, ...]:
    width = 100.0 / (last - first)
    return tuple(
        Bar((number - first) * width, width, 100.0 * count / tallest, number >= 0, count)
        for number, count in sorted(counts.items())
    )


def _ticks(low: float, high: float, negated: bool) -> list[float]:
    step = nice_step(high - low, 7)
    start = math.ceil(low / step + 1e-9)
    return [number * step for number in range(start, math.floor(high / step - 1e-9) + 1)]


def _label(value: float, negated: bool) -> str:
    return f"{(-value if negated else value) + 0.0:.6g}"

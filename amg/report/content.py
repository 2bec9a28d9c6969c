"""What a report holds: tables, samples with their verdicts, sections of one model each, the whole page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amg.verdict import Verdict

Cell = str | float | int | bool | None
Picture = Any  # uint8 [H, W], [H, W, 1] or [H, W, 3] array, or a PIL image


@dataclass(frozen=True)
class Table:
    """Columns, rows of cells, notes; strings are shown as given, floats with the decimals of their column."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"`rows` must have {len(self.columns)} cells each, got {len(row)} in row {number}"
                )


@dataclass(frozen=True)
class Sample:
    """One seed and prompt, drawn once per column.

    `images`, `verdicts` and `nearest` (the training image nearest to that column's image) are keyed by
    column. `kind` names the group to filter by ("specific", "ordinary", "class", "unconditional"). `judges`
    holds, per judge that guidance never saw, its value per column (larger = closer to a training image).
    """

    kind: str
    prompt: str
    seed: int
    images: Mapping[str, Picture]
    verdicts: Mapping[str, Verdict]
    nearest: Mapping[str, Picture] = field(default_factory=dict)
    judges: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """One model: its samples, table and thresholds. The first of `columns` is the unguided baseline.

    `metric` is "cosine" or "nl2". `thresholds` are in sigma units (nL2 1.4 is -1.4): the first one says what
    counts as memorised; one whose name is a column's is drawn for that column only. `judges` gives, per judge
    named in the samples, the value above which it calls a picture a copy.
    """

    title: str
    model: str
    description: str
    metric: str
    thresholds: Mapping[str, float]
    columns: Sequence[str]
    samples: Sequence[Sample]
    table: Table | None = None
    judges: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.metric not in ("cosine", "nl2"):
            raise ValueError(f'`metric` must be "cosine" or "nl2", got {self.metric!r}')
        if not self.thresholds:
            raise ValueError("`thresholds` must name at least the memorisation threshold, got none")
        if len(set(self.columns)) != len(self.columns) or not self.columns:
            raise ValueError(f"`columns` must be distinct and at least one, got {list(self.columns)}")
        for number, sample in enumerate(self.samples):
            missing = [c for c in self.columns if c not in sample.images or c not in sample.verdicts]
            if missing:
                raise ValueError(
                    f"`samples` must have an image and a verdict per column, {number} lacks {missing}"
                )


@dataclass(frozen=True)
class Report:
    """The page: sections, and what it takes to make it again. `summary` replaces the generated sentences."""

    title: str
    sections: Sequence[Section]
    configuration: Mapping[str, Any]
    versions: Mapping[str, str]
    command: str
    created: str
    summary: str = ""

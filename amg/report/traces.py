"""Traces and facts of one image for the page's plots, as small JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amg.report.content import Sample, Section
from amg.report.pictures import PictureStore
from amg.verdict import METRIC_NAMES, similarity_text, threshold_text

if TYPE_CHECKING:
    from amg.verdict import TraceStep, Verdict

TERMS = ("despecification", "deduplication", "dissimilarity", "rewind")


class TraceStore:
    """Schedules (step, t, threshold of every trace entry), each distinct one kept once."""

    def __init__(self) -> None:
        self.schedules: list[list[list[float]]] = []
        self._numbers: dict[tuple[tuple[float, ...], ...], int] = {}

    def add(self, trace: tuple[TraceStep, ...]) -> int:
        """Number of the schedule that the trace follows."""
        key = (
            tuple(entry.step for entry in trace),
            tuple(round(float(entry.t), 2) for entry in trace),
            tuple(round(entry.threshold, 4) for entry in trace),
        )
        if key not in self._numbers:
            self._numbers[key] = len(self.schedules)
            self.schedules.append([list(row) for row in key])
        return self._numbers[key]


def panel_data(
    sample: Sample, column: str, section: Section, pictures: PictureStore, traces: TraceStore
) -> dict[str, Any]:
    """What the page shows of one image when its sample is opened; sigma rounded to four decimals."""
    verdict = sample.verdicts[column]
    nearest = sample.nearest.get(column)
    trace = verdict.trace
    return {
        "column": column,
        "picture": pictures.add(sample.images[column]),
        "nearest": None if nearest is None else pictures.add(nearest),
        "state": "blocked" if verdict.blocked else "warm" if verdict.memorized else "cool",
        "value": f"{METRIC_NAMES.get(verdict.metric, verdict.metric)} "
        + similarity_text(verdict.metric, verdict.similarity),
        "final": round(verdict.similarity, 4),
        "promise": round(verdict.threshold, 4),
        "facts": facts(sample, column, section),
        "schedule": traces.add(trace) if trace else None,
        "values": [None if entry.similarity is None else round(entry.similarity, 4) for entry in trace],
        "terms": [_bits(entry.terms) for entry in trace],
    }


def _bits(terms: tuple[str, ...]) -> int:
    unknown = set(terms) - set(TERMS)
    if unknown:
        raise ValueError(f"`terms` of a trace must be among {list(TERMS)}, got {sorted(unknown)}")
    return sum(1 << TERMS.index(term) for term in set(terms))


def facts(sample: Sample, column: str, section: Section) -> list[tuple[str, str]]:
    """Label and text of everything the verdict says, besides its trace."""
    verdict = sample.verdicts[column]
    found = [
        ("verdict", outcome(verdict)),
        ("memorised if", threshold_text(verdict.metric, verdict.threshold)),
        ("nearest", neighbour_text(verdict)),
        ("rewinds", str(verdict.rewinds)),
        ("re-runs", str(verdict.retries)),
        ("evaluations", str(verdict.evaluations)),
    ]
    if verdict.guard is not None:
        guard = verdict.guard
        told = f"{guard.similarity:.3f}, memorised if > {guard.threshold:g}, row {guard.neighbour.row}"
        found.append(("guard", told))
    for other in verdict.also:
        name = METRIC_NAMES.get(other.metric, other.metric)
        limit = threshold_text(other.metric, other.threshold)
        value = similarity_text(other.metric, other.similarity)
        found.append((f"also {name}", f"{value}, memorised if {limit}, row {other.neighbour.row}"))
    for judge, values in sample.judges.items():
        if column in values:
            limit = f", copy if > {section.judges[judge]:g}" if judge in section.judges else ""
            found.append((judge, f"{values[column]:.3f}{limit}"))
    return found


def outcome(verdict: Verdict) -> str:
    """One word for the reader."""
    if verdict.blocked:
        return "withheld: a blank image was delivered"
    return "memorised" if verdict.memorized else "clear"


def neighbour_text(verdict: Verdict) -> str:
    """Caption, id and row of the nearest training image."""
    neighbour = verdict.neighbour
    caption = f"“{neighbour.caption}”, " if neighbour.caption else ""
    return f"{caption}{neighbour.id}, row {neighbour.row}"

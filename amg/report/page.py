"""The report as one HTML file: no request leaves it, pictures and traces travel inside."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from amg.extras import needed
from amg.replacing import replacing
from amg.report.content import Report, Sample, Section
from amg.report.histogram import Histogram, histogram
from amg.report.numbers import numeric_columns, share_text, table_cells
from amg.report.pictures import PictureStore
from amg.report.traces import TraceStore, panel_data
from amg.verdict import METRIC_NAMES, similarity_text, threshold_text


def write(report: Report, path: str | os.PathLike[str]) -> Path:
    """Write the report as one self-contained HTML file and return its path.

    path: a file ending in .html, or a folder that then gets index.html; missing parents are made. The file is
    written beside its place and renamed, so that an interrupted run leaves no half page.
    """
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        target = target / "index.html"
    page = render(report)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        partial.write_text(page, encoding="utf-8")
    return target


def render(report: Report) -> str:
    """The page as text. Everything given is escaped; needs Jinja2 and Pillow (the extra `report`)."""
    pictures, traces = PictureStore(), TraceStore()
    sections = [_section(i, section, pictures, traces) for i, section in enumerate(report.sections)]
    tiled = {number for section in sections for number in section["tiled"]}
    data = {
        "pictures": {n: uri for n, uri in enumerate(pictures.uris) if n not in tiled},
        "schedules": traces.schedules,
        "sections": [section.pop("data") for section in sections],
    }
    shown: set[int] = set()

    def first(number: int) -> bool:
        """True the first time a picture is placed on the page: there it carries its bytes."""
        new = number not in shown
        shown.add(number)
        return new

    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            report=report,
            summary=report.summary or _summary(report.sections),
            sections=sections,
            uris=pictures.uris,
            first=first,
            configuration=list(_flat(report.configuration)),
            data=data,
        )
    )


def _environment() -> Any:
    jinja2 = needed("jinja2", "the report")
    folder = resources.files("amg.report")
    loader = jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8"))
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {
        "separators": (",", ":"),
        "allow_nan": False,
        "ensure_ascii": False,
    }
    return environment


def _section(number: int, section: Section, pictures: PictureStore, traces: TraceStore) -> dict[str, Any]:
    samples = [_sample(sample, section, pictures) for sample in section.samples]
    hero = _hero(section)
    return {
        "id": f"model-{number + 1}",
        "given": section,
        "condition": threshold_text(section.metric, next(iter(section.thresholds.values()))),
        "thresholds": [(name, threshold_text(section.metric, v)) for name, v in section.thresholds.items()],
        "bars": [_column_share(section, column) for column in section.columns],
        "hero": None if hero is None else samples[hero],
        "hero_number": hero,
        "samples": samples,
        "kinds": _kinds(section.samples),
        "seeds": _ranges(sorted({sample.seed for sample in section.samples})),
        "histograms": _histograms(section) if section.samples else [],
        "table": section.table,
        "cells": table_cells(section.table) if section.table else [],
        "numeric": numeric_columns(section.table) if section.table else [],
        "tiled": {tile["picture"] for sample in samples for tile in sample["tiles"]},
        "data": {
            "metric": section.metric,
            "samples": [
                {
                    "title": sample.prompt or sample.kind,
                    "kind": sample.kind,
                    "seed": sample.seed,
                    "panels": [
                        panel_data(sample, column, section, pictures, traces) for column in section.columns
                    ],
                }
                for sample in section.samples
            ],
        },
    }


def _sample(sample: Sample, section: Section, pictures: PictureStore) -> dict[str, Any]:
    tiles = []
    for column in section.columns:
        verdict = sample.verdicts[column]
        tiles.append(
            {
                "label": column,
                "picture": pictures.add(sample.images[column]),
                "value": similarity_text(verdict.metric, verdict.similarity),
                "unit": "cos"
                if verdict.metric == "cosine"
                else METRIC_NAMES.get(verdict.metric, verdict.metric),
                "state": "blocked" if verdict.blocked else "warm" if verdict.memorized else "cool",
                "badges": badges(verdict),
                "alt": f"{column}: {sample.prompt or sample.kind}, seed {sample.seed}",
            }
        )
        if column == section.columns[0] and column in sample.nearest:
            caption = verdict.neighbour.caption or verdict.neighbour.id
            tiles.append(
                {
                    "label": "nearest training image",
                    "picture": pictures.add(sample.nearest[column]),
                    "value": "",
                    "state": "training",
                    "badges": [],
                    "alt": f"Training image nearest to {column}: {caption}",
                }
            )
    memorized = sample.verdicts[section.columns[0]].memorized
    return {"given": sample, "tiles": tiles, "memorized": memorized}


def badges(verdict: Any) -> list[tuple[str, str]]:
    """(class, text) of what happened to an image: memorised or blocked, resampled, rewound."""
    found = []
    if verdict.blocked:
        found.append(("blocked", "blocked"))
    elif verdict.memorized:
        found.append(("memorised", "memorised"))
    if verdict.retries:
        found.append(("resampled", "resampled" + (f" ×{verdict.retries}" if verdict.retries > 1 else "")))
    if verdict.rewinds:
        found.append(("rewound", "rewound" + (f" ×{verdict.rewinds}" if verdict.rewinds > 1 else "")))
    return found


def _column_share(section: Section, column: str) -> dict[str, Any]:
    verdicts = [sample.verdicts[column] for sample in section.samples]
    delivered = [verdict for verdict in verdicts if not verdict.blocked]
    copies = sum(verdict.memorized for verdict in delivered)
    closest = max((verdict.similarity for verdict in delivered), default=None)
    return {
        "column": column,
        "copies": copies,
        "total": len(verdicts),
        "share": share_text(copies, len(verdicts)),
        "percent": 100.0 * copies / len(verdicts) if verdicts else 0.0,
        "judged": ", ".join(dict.fromkeys(threshold_text(v.metric, v.threshold) for v in verdicts)),
        "closest": "–" if closest is None else similarity_text(section.metric, closest),
        "rewound": sum(verdict.rewinds > 0 for verdict in verdicts),
        "resampled": sum(verdict.retries > 0 for verdict in verdicts),
        "blocked": sum(verdict.blocked for verdict in verdicts),
    }


def _hero(section: Section) -> int | None:
    """The sample that shows most: memorised by the baseline, clear in the last column without a block."""

    def worth(number: int) -> tuple[bool, bool, float]:
        verdicts = section.samples[number].verdicts
        baseline, others = verdicts[section.columns[0]], [verdicts[c] for c in section.columns[1:]]
        clean = not any(verdict.blocked for verdict in others) and bool(others) and not others[-1].memorized
        return clean, baseline.memorized, baseline.similarity

    return max(range(len(section.samples)), key=worth, default=None)


def _summary(sections: Sequence[Section]) -> str:
    if not any(section.samples for section in sections):
        return "This report holds tables only."
    first, *guided = sections[0].columns
    shares = []
    for column in (first, *guided):
        having = [section for section in sections if column in section.columns]
        counts = [_column_share(section, column) for section in having]
        shares.append((column, share_text(sum(c["copies"] for c in counts), sum(c["total"] for c in counts))))
    what = (
        "Each row below is one seed sampled several times, with and without anti-memorization guidance, "
        "beside the training image it comes closest to. "
    )
    rest = ", ".join(f"with {column} {share}" for column, share in shares[1:])
    baseline = f"With “{first}”, {shares[0][1]} of the pictures are memorised training images"
    return what + baseline + (f"; {rest}." if rest else ".")


def _histograms(section: Section) -> list[Histogram]:
    negated = section.metric == "nl2"
    name = "nL2" if negated else "Cosine similarity"
    values = {
        column: [s.verdicts[column].similarity for s in section.samples if not s.verdicts[column].blocked]
        for column in section.columns
    }
    limit = threshold_text(section.metric, next(iter(section.thresholds.values())))
    note = f"delivered pictures; right of the line ({limit}) is memorised"
    found = [histogram(f"{name} to the nearest training image", note, values, section.thresholds, negated)]
    for judge, threshold in section.judges.items():
        seen = {
            column: [
                sample.judges[judge][column]
                for sample in section.samples
                if column in sample.judges.get(judge, {}) and not sample.verdicts[column].blocked
            ]
            for column in section.columns
        }
        title, note = f"{judge}, a judge guidance never saw", f"right of the line (> {threshold:g}) is a copy"
        found.append(histogram(title[:1].upper() + title[1:], note, seen, {"copy": threshold}))
    return found


def _kinds(samples: Sequence[Sample]) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for sample in samples:
        counts[sample.kind] = counts.get(sample.kind, 0) + 1
    return list(counts.items())


def _ranges(seeds: Sequence[int]) -> str:
    """Sorted seeds as "0–63, 100"."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][1] + 1:
            runs[-1][1] = seed
        else:
            runs.append([seed, seed])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield (
                f"{prefix}{key}",
                ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value),
            )

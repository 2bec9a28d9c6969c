"""An audit as the HTML report: the table, the pictures beside their nearest training images, the plots."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amg.commands import info
from amg.commands.audit.bundled import COPY
from amg.commands.audit.folder import read_picture
from amg.commands.audit.judges import Judges, Looked
from amg.commands.audit.plan import Plan
from amg.commands.audit.references import SHOWN_SIZE, Seen, cover, within
from amg.evaluate.judges import MEMORIZED_CORRELATION
from amg.report import Report, Sample, Section, Table, write
from amg.report.numbers import share_text


def write_page(
    path: Path,
    model: str,
    plan: Plan,
    columns: Mapping[str, Looked],
    seen: Seen | None,
    judges: Judges,
    table: Table,
    settings: Mapping[str, Any],
    command: str,
    most: int,
) -> Path:
    """Write the report of an audit; at most `most` pictures per guidance are shown, evenly taken."""
    order = sorted(columns, key=lambda name: name != "off")  # the report's first column is the baseline
    total = len(plan.jobs)
    shown = _evenly(total, most)
    part = "" if len(shown) == total else f"; {len(shown)} of {total} pictures per guidance are shown"
    section = Section(
        title=f"{model}: {total} pictures per guidance",
        model=model,
        description=f"{settings['--scheduler'].split()[0]}, {plan.steps} steps, "
        f"guidance scale {settings['--guidance-scale']:g}{part}.",
        metric=judges.index.metric,
        thresholds={name: columns[name].records[0].verdict.threshold for name in order},
        columns=order,
        samples=[_sample(position, order, columns, seen, judges) for position in shown],
        table=table,
        judges=_limits(seen, judges),
    )
    versions = {name: str(value) for name, value in info.info().items() if not isinstance(value, Mapping)}
    report = Report(
        title=f"Audit of {model}",
        sections=[section],
        configuration={**settings, **{one.name: _chosen(one.config) for one in plan.guidances}},
        versions=versions,
        command=command,
        created=time.strftime("%Y-%m-%d %H:%M"),
        summary=_summary(order, columns),
    )
    return write(report, path)


def _evenly(total: int, most: int) -> list[int]:
    return sorted({position * total // min(total, most) for position in range(min(total, most))})


def _sample(
    position: int, order: Sequence[str], columns: Mapping[str, Looked], seen: Seen | None, judges: Judges
) -> Sample:
    records = {name: columns[name].records[position] for name in order}
    first = records[order[0]]
    nearest = {} if seen is None else seen.nearest
    return Sample(
        kind=first.prompt.kind,
        prompt=first.prompt.caption,
        seed=first.seed,
        images={name: _thumbnail(read_picture(record.path)) for name, record in records.items()},
        verdicts={name: record.verdict for name, record in records.items()},
        nearest={
            name: _thumbnail(nearest[record.verdict.neighbour.id])
            for name, record in records.items()
            if record.verdict.neighbour.id in nearest
        },
        judges=_said(position, order, columns, seen, judges),
    )


def _said(
    position: int, order: Sequence[str], columns: Mapping[str, Looked], seen: Seen | None, judges: Judges
) -> dict[str, dict[str, float]]:
    found = {}
    if seen is not None:
        found["luminance"] = {name: seen.structure[name][position].item() for name in order}
    for judge, _ in judges.copies:
        found[judge] = {name: columns[name].copies[judge][position].item() for name in order}
    for judge, _ in judges.further:
        found[judge] = {name: columns[name].by_index[judge][position].item() for name in order}
    return found


def _limits(seen: Seen | None, judges: Judges) -> dict[str, float]:
    limits = {} if seen is None else {"luminance": MEMORIZED_CORRELATION}
    limits |= {name: COPY for name, _ in judges.copies}
    return limits | {name: 0.5 if one.metric == "cosine" else -1.4 for name, one in judges.further}


def _thumbnail(image: Tensor) -> Any:
    """uint8 [3, H, W] as uint8 [h, w, 3], its longer side at most `SHOWN_SIZE`."""
    size = (image.shape[1], image.shape[2])
    if within(size, SHOWN_SIZE) != size:
        image = (cover(image, within(size, SHOWN_SIZE)) * 255).round().to(torch.uint8)
    return image.permute(1, 2, 0).contiguous().numpy()


def _summary(order: Sequence[str], columns: Mapping[str, Looked]) -> str:
    shares = []
    for name in order:
        verdicts = [record.verdict for record in columns[name].records]
        marked = sum(verdict.memorized and not verdict.blocked for verdict in verdicts)
        shares.append(f"{share_text(marked, len(verdicts))} with {name}")
    return (
        f"Delivered pictures marked as memorised: {', '.join(shares)}. Each row below is one prompt and seed "
        "drawn several times, beside the training image it comes closest to. A measure that guides is no "
        "judge: see in the table what those say that guidance never saw."
    )


def _chosen(config: Any) -> dict[str, str]:
    """A config's fields, those left open out."""
    return {key: str(value) for key, value in asdict(config).items() if value is not None}

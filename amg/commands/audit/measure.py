"""The figures of an audit: one row per measure, one cell per guidance, an interval on every share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from amg.commands.audit.judges import Judges, Looked, judge_name
from amg.commands.audit.references import Seen
from amg.evaluate.diversity import diversity
from amg.evaluate.fid import fid_of_features, kid_of_features
from amg.evaluate.judges import MEMORIZED_CORRELATION
from amg.evaluate.shares import bootstrap_interval, share_interval, top1, top5
from amg.verdict import threshold_text

THRESHOLDS = {"cosine": (0.4, 0.5, 0.7), "nl2": (-1.4, -1.6)}
GUIDED, UNSEEN = "yes", "never"  # whether guidance or the final check saw the measure
BOOTSTRAP_SEED = 0
KID_SUBSET = 50


@dataclass(frozen=True)
class Cell:
    """A figure and its 95 % interval where it has one; None: there is no figure."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Measure:
    """One row: `key` names it in files, `label` for people; `form` formats its figures.

    `seen` is "yes", "never" or "" (quality and cost); `missing` says why there are no figures.
    """

    key: str
    label: str
    seen: str
    form: str
    cells: Mapping[str, Cell] = field(default_factory=dict)
    missing: str = ""


Columns = Mapping[str, Looked]


def measures(columns: Columns, seen: Seen | None, judges: Judges) -> list[Measure]:
    """Every row of the table, in its order."""
    return [
        *_guided(columns, judges),
        *_unseen(columns, seen, judges),
        *_quality(columns, seen, judges),
        *_flagged(columns),
        *_cost(columns),
    ]


def _flagged(columns: Columns) -> list[Measure]:
    """What the pipeline's safety checker said, where it has one."""
    flags = {name: [record.nsfw for record in one.records] for name, one in columns.items()}
    if any(flag is None for own in flags.values() for flag in own):
        return []
    cells = {name: _share_cell(one, torch.tensor(flags[name])) for name, one in columns.items()}
    return [Measure("flagged", "flagged by the safety checker %", "", ".1f", cells)]


def _guided(columns: Columns, judges: Judges) -> list[Measure]:
    rows = [
        _share("promise_broken", "marked as memorised %", GUIDED, columns, lambda one: _marked(one).float()),
        *_similarity("", judge_name(judges.index), judges.index.metric, columns, GUIDED, None),
    ]
    for name, index in judges.also:
        rows += _similarity(_key(name) + "_", name, index.metric, columns, GUIDED, name)
    return rows


def _unseen(columns: Columns, seen: Seen | None, judges: Judges) -> list[Measure]:
    label = f"structure: luminance correlation > {MEMORIZED_CORRELATION:g} %"
    if seen is None:
        rows = [Measure("structural", label, UNSEEN, ".1f", missing=judges.missing["references"])]
    else:
        rows = [
            Measure(
                "structural",
                label,
                UNSEEN,
                ".1f",
                {
                    name: _share_cell(one, seen.structure[name] > MEMORIZED_CORRELATION)
                    for name, one in columns.items()
                },
            )
        ]
    for name, _ in judges.copies:
        rows.append(
            _share(
                _key(name),
                f"{name}: a copy %",
                UNSEEN,
                columns,
                lambda one, name=name: _copies(one.copies[name]),  # type: ignore[misc]
            )
        )
    for name, index in judges.further:
        rows += _similarity(_key(name) + "_", name, index.metric, columns, UNSEEN, name)
    if "another embedder" in judges.missing:
        rows.append(
            Measure(
                "another_embedder",
                "another embedder",
                UNSEEN,
                ".1f",
                missing=judges.missing["another embedder"],
            )
        )
    return rows


def _quality(columns: Columns, seen: Seen | None, judges: Judges) -> list[Measure]:
    name = judges.network[0] if judges.network else "no network"
    reason = judges.missing.get("network") or judges.missing.get("references", "")
    rows = [
        Measure("fid", f"FID ({name})", "", ".1f", missing=reason),
        Measure("kid", f"KID ({name})", "", ".4f", missing=reason),
    ]
    if seen is not None and seen.features is not None:
        least = min(len(seen.features), *(len(one.records) for one in columns.values()))
        rows = _distances(columns, seen.features, name, least)
    if judges.alignment is None:
        rows.append(Measure("alignment", "text alignment", "", ".3f", missing=judges.missing["alignment"]))
    else:
        cells = {guidance: _mean_cell(one, one.alignment) for guidance, one in columns.items()}
        label = f"text alignment ({judges.alignment.name}{_scored(columns)})"
        rows.append(Measure("alignment", label, "", ".3f", cells))
    rows.append(_diversity(columns, judges))
    return rows


def _scored(columns: Columns) -> str:
    """How many pictures the scorer could judge, where not all."""
    scores = [one.alignment for one in columns.values() if one.alignment is not None]
    known, total = sum(int((~own.isnan()).sum()) for own in scores), sum(len(own) for own in scores)
    return "" if known == total else f", {known} of {total} pictures scored"


def _distances(columns: Columns, reference: Tensor, name: str, least: int) -> list[Measure]:
    if least < 2:
        reason = f"needs 2 pictures per guidance and 2 training images, got {least}"
        return [
            Measure("fid", f"FID ({name})", "", ".1f", missing=reason),
            Measure("kid", f"KID ({name})", "", ".4f", missing=reason),
        ]
    subset = min(KID_SUBSET, least)
    fids, kids = {}, {}
    for guidance, one in columns.items():
        assert one.features is not None
        fids[guidance] = Cell(fid_of_features(one.features, reference))
        mean, _ = kid_of_features(one.features, reference, subset_size=subset, seed=BOOTSTRAP_SEED)
        kids[guidance] = Cell(mean)
    return [
        Measure("fid", f"FID ({name})", "", ".1f", fids),
        Measure("kid", f"KID ({name}, subsets of {subset})", "", ".4f", kids),
    ]


def _diversity(columns: Columns, judges: Judges) -> Measure:
    """Mean distance of the guiding embeddings: unit vectors, or for pixels the RMS over their values."""
    scale = 1.0 if judges.index.metric == "cosine" else math.sqrt(judges.index.dimension)
    label = f"diversity: mean distance of pairs ({judge_name(judges.index)})"
    if any(len(one.records) < 2 for one in columns.values()):
        return Measure("diversity", label, "", ".3f", missing="needs 2 pictures per guidance, got 1")
    cells = {name: Cell(diversity(one.vectors) / scale) for name, one in columns.items()}
    return Measure("diversity", label, "", ".3f", cells)


def _cost(columns: Columns) -> list[Measure]:
    def mean(values: Callable[[Looked], Sequence[float]]) -> dict[str, Cell]:
        return {name: Cell(sum(values(one)) / len(one.records)) for name, one in columns.items()}

    batches = sorted({record.batch for one in columns.values() for record in one.records})
    sizes = str(batches[0]) if len(batches) == 1 else f"{batches[0]} to {batches[-1]}"
    rows = [
        _share("rewound", "rewound %", "", columns, lambda one: _flag(one, "rewinds")),
        _share("resampled", "run again %", "", columns, lambda one: _flag(one, "retries")),
        _share("blocked", "blocked %", "", columns, lambda one: _flag(one, "blocked")),
        Measure(
            "evaluations",
            "network evaluations/image",
            "",
            ".1f",
            mean(lambda one: [record.verdict.evaluations for record in one.records]),
        ),
        Measure(
            "seconds",
            f"seconds/image, batches of {sizes}",
            "",
            ".3g",
            mean(lambda one: [record.seconds for record in one.records]),
        ),
    ]
    peaks = {name: [record.peak_mib for record in one.records] for name, one in columns.items()}
    label = f"peak memory MiB, batches of {sizes}"
    if any(peak is None for own in peaks.values() for peak in own):
        why = "this system does not let a process reset its memory's high-water mark"
        rows.append(Measure("peak_mib", label, "", ".0f", missing=why))
    else:
        cells = {name: Cell(max(peak for peak in own if peak is not None)) for name, own in peaks.items()}
        rows.append(Measure("peak_mib", label, "", ".0f", cells))
    return rows


def _similarity(
    prefix: str, name: str, metric: str, columns: Columns, seen: str, index: str | None
) -> list[Measure]:
    """Shares over the usual thresholds, Top5% and Top1 under one index, of the pictures not blocked."""

    def values(one: Looked) -> Tensor:
        return one.similarity if index is None else one.by_index[index]

    sign = -1 if metric == "nl2" else 1
    rows = []
    for threshold in THRESHOLDS[metric]:
        key = f"{prefix}{'below' if sign < 0 else 'above'}_{abs(threshold):g}"
        label = f"{name}: {threshold_text(metric, threshold)} %"
        cells = {
            guidance: _share_cell(one, (values(one) > threshold) & ~one.blocked)
            for guidance, one in columns.items()
        }
        rows.append(Measure(key, label, seen, ".1f", cells))
    for key, statistic in (("top5", top5), ("top1", top1)):
        cells = {}
        for guidance, one in columns.items():
            own = values(one)[~one.blocked]
            cells[guidance] = Cell(sign * statistic(own) if len(own) else None)
        short = "Top5%" if key == "top5" else "Top1"
        rows.append(Measure(f"{prefix}{key}", f"{name}: {short}", seen, ".3f", cells))
    return rows


def _share(key: str, label: str, seen: str, columns: Columns, hits: Callable[[Looked], Tensor]) -> Measure:
    return Measure(
        key, label, seen, ".1f", {name: _share_cell(one, hits(one)) for name, one in columns.items()}
    )


def _share_cell(one: Looked, hits: Tensor) -> Cell:
    """A share in percent; its interval resamples prompts, whose pictures resemble one another."""
    per_prompt = _per_prompt(one, hits.double())
    low, high = share_interval(per_prompt, BOOTSTRAP_SEED)
    return Cell(100 * hits.double().mean().item(), 100 * low, 100 * high)


def _mean_cell(one: Looked, values: Tensor | None) -> Cell:
    """A mean over the pictures that could be scored, and its bootstrap interval over prompts."""
    assert values is not None
    known = ~values.isnan()
    if not known.any():
        return Cell(None)
    per_prompt = _per_prompt(one, values.double(), known)
    low, high = bootstrap_interval(per_prompt, lambda drawn: drawn.mean().item(), BOOTSTRAP_SEED)
    return Cell(values[known].double().mean().item(), low, high)


def _per_prompt(one: Looked, values: Tensor, known: Tensor | None = None) -> Tensor:
    groups: dict[int, list[float]] = {}
    for position, record in enumerate(one.records):
        if known is None or known[position]:
            groups.setdefault(record.prompt_number, []).append(values[position].item())
    return torch.tensor([sum(own) / len(own) for own in groups.values()], dtype=torch.float32)


def _marked(one: Looked) -> Tensor:
    return torch.tensor([record.verdict.memorized and not record.verdict.blocked for record in one.records])


def _flag(one: Looked, name: str) -> Tensor:
    found = [float(bool(getattr(record.verdict, name))) for record in one.records]
    return torch.tensor(found, dtype=torch.float32)


def _copies(copies: Tensor) -> Tensor:
    from amg.commands.audit.bundled import COPY

    return (copies > COPY).float()


def _key(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)

"""The promise: every finished image is checked once more, exactly, and what is still too close is not
delivered."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.guidance.flight import Flight
from amg.guidance.predict import Denoiser
from amg.verdict import GuardVerdict, Neighbour, Verdict

RANGE_TOLERANCE = 1e-3


@torch.no_grad()
def check(
    images: Tensor, index: Any, also: Sequence[Any], config: AMGConfig, flights: Sequence[Flight]
) -> list[Verdict]:
    """One verdict per image, from the full embedder, exact search and the guard, under `index` and each of
    `also`.

    `images` float [B, 3, H, W] in [0, 1]; each is looked at as it is and rounded to 8 bits, the closer
    counts. `also` are held to their metric's threshold of the same preset. Raises where a check cannot be
    made (values that are not finite or not in [0, 1], a corrupt index): never an unchecked image. The host
    reads once of the images and once under each index.
    """
    as_bytes = _require_pictures(images, len(flights))
    images = images.float()
    shown = [images] if as_bytes else [images, _to_8_bits(images)]
    verdicts = _under(shown, index, config)
    others = [_under(shown, judge, config.under(judge.metric)) for judge in also]
    finished = []
    for row, (verdict, flight) in enumerate(zip(verdicts, flights, strict=True)):
        more = tuple(other[row] for other in others)
        finished.append(
            replace(
                verdict,
                also=more,
                memorized=verdict.memorized or flight.exhausted or any(one.memorized for one in more),
                exhausted=flight.exhausted,
                rewinds=flight.total_rewinds,
                retries=flight.retries,
                evaluations=flight.evaluations,
                trace=tuple(flight.trace),
                caption=flight.caption,
                remembered=flight.remembered,
                optimised=flight.lowered is not None and flight.lowered.embedding is not None,
            )
        )
    return finished


@torch.no_grad()
def decode(denoiser: Denoiser, sample: Tensor) -> Tensor:
    """The finished picture, float32 [B, 3, H, W] in [0, 1], rounded to the 8 bits it will be delivered in;
    NaN where it is not finite, which no check lets pass."""
    images = denoiser.decode(sample).float()
    return _to_8_bits(torch.where(images.isfinite(), images, torch.nan))  # an infinity would become white


def summary(verdicts: Sequence[Verdict]) -> str:
    """One line: how many images were rewound, resampled, blocked or are still marked."""
    rewound, resampled = sum(v.rewinds > 0 for v in verdicts), sum(v.retries > 0 for v in verdicts)
    blocked, marked = sum(v.blocked for v in verdicts), sum(v.memorized and not v.blocked for v in verdicts)
    return (
        f"{len(verdicts)} images: {rewound} rewound, {resampled} resampled, {blocked} blocked, "
        f"{marked} delivered marked as memorised"
    )


def _require_pictures(images: Any, count: int) -> bool:
    """What is checked must be what is seen: a copy in other units is far from every training image. Returns
    whether the images are their own rounding to 8 bits."""
    wanted = f"`images` must be a float tensor [{count}, 3, H, W] in [0, 1] to be checked"
    if not isinstance(images, Tensor):
        raise TypeError(f"{wanted}, got {type(images).__name__}")
    if images.shape[:2] != (count, 3) or images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"{wanted}, got {list(images.shape)} {images.dtype}")
    if not images.is_floating_point() or images.layout != torch.strided or images.is_meta:
        raise ValueError(f"{wanted}, got {images.dtype} {images.layout} on {images.device}")
    values, kept = images.flatten(1), images.float() == _to_8_bits(images.float())
    found = torch.stack([values.amin(1).double(), values.amax(1).double(), kept.flatten(1).all(1).double()])
    least, most, rounded = found.tolist()
    _require_finite_rows("images", zip(least, most, strict=True), images.shape)
    if min(least) < -RANGE_TOLERANCE or max(most) > 1 + RANGE_TOLERANCE:
        raise ValueError(f"{wanted}, got values from {min(least):g} to {max(most):g}")
    return all(rounded)


def _under(shown: Sequence[Tensor], index: Any, config: AMGConfig) -> list[Verdict]:
    """Verdicts under one index of what is `shown`, the images and their rounding: whichever is closer."""
    looks = [index.closest(one) for one in shown]
    found = [(look.similarity, look.row) for look in looks]
    guarded = config.guard_threshold is not None and index.guard is not None
    alike = [(look.guard.similarity, look.guard.row) for look in looks] if guarded else []
    columns = torch.stack([part.double() for pair in (*found, *alike) for part in pair]).tolist()
    pairs = [[*zip(*pair, strict=True)] for pair in zip(columns[::2], columns[1::2], strict=True)]
    nearest = _largest("similarity", pairs[: len(looks)])
    most_alike = _largest("guard", pairs[len(looks) :]) if guarded else [None] * len(nearest)
    return [
        _verdict(index, config, *sample, guard) for sample, guard in zip(nearest, most_alike, strict=True)
    ]


def _largest(name: str, looks: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, int]]:
    """The largest similarity of several looks at the same images, and its row. FloatingPointError on NaN."""
    samples = [*zip(*looks, strict=True)]
    _require_finite_rows(name, ([value for value, _ in sample] for sample in samples), (len(samples),))
    largest = (max(sample, key=lambda look: look[0]) for sample in samples)
    return [(similarity, int(row)) for similarity, row in largest]


def _verdict(
    index: Any, config: AMGConfig, similarity: float, row: int, alike: tuple[float, int] | None
) -> Verdict:
    assert config.threshold is not None
    guard = None
    if alike is not None and config.guard_threshold is not None:
        neighbour, rate = _neighbour(index, alike[1]), config.guard_false_alarm_rate
        guard = GuardVerdict(alike[0], config.guard_threshold, neighbour, rate)
    return Verdict(
        index.metric,
        similarity,
        config.threshold,
        _neighbour(index, row),
        memorized=similarity > config.threshold or (guard is not None and guard.memorized),
        guard=guard,
        coverage=getattr(index, "coverage", 1.0),
        verified=getattr(index, "verified", True),
        trust=getattr(index, "trust", "hashes"),
    )


def _require_finite_rows(name: str, rows: Iterable[Sequence[float]], shape: Sequence[int]) -> None:
    """`require_finite` of values that the host has read already: those of each row."""
    bad = [row for row, values in enumerate(rows) if not all(map(math.isfinite, values))]
    if bad:
        raise FloatingPointError(
            f"`{name}` must be finite, got NaN or infinity in rows {bad} of {list(shape)}"
        )


def _neighbour(index: Any, row: int) -> Neighbour:
    return Neighbour(row, index.ids[row], index.captions[row])


def memorized_row(verdict: Verdict) -> int | None:
    """The training image that the metric, or else the guard, names, or a checkpoint that gave the image up;
    None where none does."""
    if verdict.similarity > verdict.threshold or verdict.exhausted:
        return verdict.neighbour.row
    if verdict.guard is not None and verdict.guard.memorized:
        return verdict.guard.neighbour.row
    return None


def _to_8_bits(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round() / 255


def began_again(flight: Flight, config: AMGConfig, total: int) -> None:
    """Note that a sample runs again from its first step; despecified up to the first checkpoint."""
    flight.suspected = flight.exhausted = False
    flight.retries, flight.rewinds = flight.retries + 1, 0
    flight.despecified_until = past_first_checkpoint(config, total)


def past_first_checkpoint(config: AMGConfig, total: int) -> int:
    """The step up to which a whole run is despecified that begins as a later try."""
    return round(min(config.rewind_at or (0.5,)) * (total - 1)) + 1


@functools.lru_cache(64)
def strong(config: AMGConfig) -> AMGConfig:
    """What re-runs are guided by: the preset `strong`, ungated by any calibration, and never weaker than
    `config`."""
    assert config.metric is not None
    strong = AMGConfig.preset(
        "strong",
        guidance_scale=config.guidance_scale,
        gradient=config.gradient,
        guard_threshold=config.guard_threshold,
        rewind_prompt=config.rewind_prompt,
        max_evaluations=config.max_evaluations,
    ).for_metric(config.metric)
    strong = replace(strong, max_rewinds=max(config.max_rewinds or 0, strong.max_rewinds or 0))
    if not config.active:
        return strong
    names = ("threshold", "lambda_min", "lambda_max", "rewind_threshold")
    own = {name: getattr(config, name) for name in names}
    return replace(strong, **{k: min(v, getattr(strong, k)) for k, v in own.items() if v is not None})

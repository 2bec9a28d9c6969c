"""The promise: every finished image is checked once more, exactly, and what is still too close is not
delivered."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.guidance.flight import Flight
from amg.guidance.predict import Denoiser
from amg.guidance.terms import require_finite
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
    made (values that are not finite or not in [0, 1], a corrupt index): never an unchecked image.
    """
    _require_pictures(images, len(flights))
    verdicts = _under(images, index, config)
    others = [_under(images, judge, config.under(judge.metric)) for judge in also]
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
            )
        )
    return finished


@torch.no_grad()
def decode(denoiser: Denoiser, sample: Tensor) -> Tensor:
    """The finished picture, float32 [B, 3, H, W] in [0, 1], rounded to the 8 bits it will be delivered in."""
    images = denoiser.decode(sample).float()
    require_finite("images", images)  # before clamping turns an infinity into white
    return _to_8_bits(images)


def summary(verdicts: Sequence[Verdict]) -> str:
    """One line: how many images were rewound, resampled, blocked or are still marked."""
    rewound, resampled = sum(v.rewinds > 0 for v in verdicts), sum(v.retries > 0 for v in verdicts)
    blocked, marked = sum(v.blocked for v in verdicts), sum(v.memorized and not v.blocked for v in verdicts)
    return (
        f"{len(verdicts)} images: {rewound} rewound, {resampled} resampled, {blocked} blocked, "
        f"{marked} delivered marked as memorised"
    )


def _require_pictures(images: Any, count: int) -> None:
    """What is checked must be what is seen: a copy in other units is far from every training image."""
    wanted = f"`images` must be a float tensor [{count}, 3, H, W] in [0, 1] to be checked"
    if not isinstance(images, Tensor):
        raise TypeError(f"{wanted}, got {type(images).__name__}")
    if images.shape[:2] != (count, 3) or images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"{wanted}, got {list(images.shape)} {images.dtype}")
    if not images.is_floating_point() or images.layout != torch.strided or images.is_meta:
        raise ValueError(f"{wanted}, got {images.dtype} {images.layout} on {images.device}")
    require_finite("images", images)
    low, high = (float(bound) for bound in images.aminmax())
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise ValueError(f"{wanted}, got values from {low:g} to {high:g}")


def _under(images: Tensor, index: Any, config: AMGConfig) -> list[Verdict]:
    """Verdicts of `images` under one index: whichever is closer, the image or its rounding to 8 bits."""
    images = images.float()
    rounded = _to_8_bits(images)
    shown = [images] if torch.equal(images, rounded) else [images, rounded]
    looks = [index.closest(one) for one in shown]
    similarity, row = _largest([(look.similarity, look.row) for look in looks])
    require_finite("similarity", similarity)
    assert config.threshold is not None
    guards: Sequence[GuardVerdict | None] = [None] * len(images)
    if config.guard_threshold is not None and index.guard is not None:
        alike = _largest([look.guard for look in looks])
        require_finite("guard", alike[0])
        guards = [
            GuardVerdict(value, config.guard_threshold, _neighbour(index, found))
            for value, found in zip(*(part.tolist() for part in alike), strict=True)
        ]
    return [
        Verdict(
            index.metric,
            value,
            config.threshold,
            _neighbour(index, found),
            memorized=value > config.threshold or (guard is not None and guard.memorized),
            guard=guard,
        )
        for value, found, guard in zip(similarity.tolist(), row.tolist(), guards, strict=True)
    ]


def _largest(looks: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The largest similarity [B] of several looks at the same images, and its row [B]."""
    similarity, which = torch.stack([similarity for similarity, _ in looks]).max(dim=0)
    row = torch.stack([row for _, row in looks]).gather(0, which[None])[0]
    return similarity, row


def _neighbour(index: Any, row: int) -> Neighbour:
    return Neighbour(row, index.ids[row], index.captions[row])


def memorized_row(verdict: Verdict) -> int | None:
    """The training image that the metric, or else the guard, names; None where neither does."""
    if verdict.similarity > verdict.threshold:
        return verdict.neighbour.row
    if verdict.guard is not None and verdict.guard.memorized:
        return verdict.guard.neighbour.row
    return None


def _to_8_bits(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round() / 255


def began_again(flight: Flight, config: AMGConfig, total: int) -> None:
    """Note that a sample runs again from its first step; despecified up to the first checkpoint."""
    checkpoint = round(min(config.rewind_at or (0.5,)) * (total - 1))
    flight.suspected = flight.exhausted = False
    flight.retries, flight.rewinds, flight.despecified_until = flight.retries + 1, 0, checkpoint + 1


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
        max_evaluations=config.max_evaluations,
    ).for_metric(config.metric)
    strong = replace(strong, max_rewinds=max(config.max_rewinds or 0, strong.max_rewinds or 0))
    if not config.active:
        return strong
    names = ("threshold", "lambda_min", "lambda_max", "rewind_threshold")
    own = {name: getattr(config, name) for name in names}
    return replace(strong, **{k: min(v, getattr(strong, k)) for k, v in own.items() if v is not None})

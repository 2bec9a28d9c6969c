"""The promise: every finished image is checked once more, exactly, and what is still too close is not
delivered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.flight import Flight
from amg.group import Group
from amg.guidance import require_finite
from amg.ordinary import despecify
from amg.predict import Conditions
from amg.rewind import pristine
from amg.sampler import Run, denoise
from amg.verdict import MemorizedError, Neighbour, Verdict


class Delivery(NamedTuple):
    """`images` float32 [B, 3, H, W] in [0, 1], the samples they were decoded from, their verdicts, and the
    rows whose image was replaced by a re-run or a blank."""

    images: Tensor
    sample: Tensor
    verdicts: list[Verdict]
    replaced: list[int]


@torch.no_grad()
def check(
    images: Tensor, index: Any, also: Sequence[Any], config: AMGConfig, flights: Sequence[Flight]
) -> list[Verdict]:
    """One verdict per image, from the full embedder and exact search, under `index` and each of `also`.

    `images` float [B, 3, H, W] in [0, 1]. `also` are held to their metric's threshold of the same preset.
    Raises where a check cannot be made (non-finite values, a corrupt index): never an unchecked image.
    """
    require_finite("images", images)
    verdicts = _under(images, index, config)
    others = [_under(images, judge, config.under(judge.metric)) for judge in also]
    finished = []
    for row, (verdict, flight) in enumerate(zip(verdicts, flights, strict=True)):
        more = tuple(other[row] for other in others)
        finished.append(
            replace(
                verdict,
                also=more,
                memorized=verdict.memorized or any(one.memorized for one in more),
                rewinds=flight.total_rewinds,
                retries=flight.retries,
                evaluations=flight.evaluations,
                trace=tuple(flight.trace),
            )
        )
    return finished


def deliver(
    images: Tensor,
    sample: Tensor,
    run: Run,
    conditions: Conditions,
    flights: Sequence[Flight],
    also: Sequence[Any] = (),
    safety: Callable[[Tensor, Sequence[int]], Tensor] | None = None,
) -> Delivery:
    """Check finished images and do what `on_memorized` says with those that break the promise.

    "resample": each is run again alone with the `strong` preset and fresh noise of its own, at most
    `max_retries` times, then blocked; "block": a blank image; "flag": delivered, marked; "raise":
    `MemorizedError`. `safety` is shown what replaces an image, (images, rows) -> what is delivered of them.
    """
    config, index = run.guide.config, run.guide.index
    verdicts = check(images, index, also, config, flights)
    bad = [row for row, verdict in enumerate(verdicts) if verdict.memorized]
    if config.on_memorized == "raise" and bad:
        raise MemorizedError(verdicts)
    if config.on_memorized == "flag" or not bad:
        return Delivery(images, sample, verdicts, [])
    images, sample, replaced = images.clone(), sample.clone(), list(bad)
    attempts = config.max_retries if config.on_memorized == "resample" else 0
    for _ in range(attempts):
        where, mine = torch.tensor(bad, device=sample.device), [flights[row] for row in bad]
        for row in bad:
            if verdicts[row].similarity > verdicts[row].threshold:
                despecify(config, index, run.guide.denoiser, flights[row], verdicts[row].neighbour.row)
        sample[where] = start_over(run, conditions.take(where), mine, sample[where], _strong(config)).to(
            sample.dtype
        )
        again = decode(run, sample[where])
        images[where] = (again if safety is None else safety(again, bad)).to(images.dtype)
        for row, verdict in zip(bad, check(images[where], index, also, config, mine), strict=True):
            verdicts[row] = verdict
        bad = [row for row in bad if verdicts[row].memorized]
        if not bad:
            break
    for row in bad:
        images[row], sample[row] = 0.0, 0.0
        verdicts[row] = replace(verdicts[row], blocked=True)
    if safety is not None and bad:
        images[bad] = safety(images[bad].float(), bad).to(images.dtype)
    return Delivery(images, sample, verdicts, replaced)


def start_over(
    run: Run, conditions: Conditions, flights: Sequence[Flight], like: Tensor, strong: AMGConfig
) -> Tensor:
    """Whole re-runs with fresh noise under `strong`, ungated, one per row of `like`; despecified up to the
    first checkpoint."""
    guide = replace(run.guide, config=strong, gate=None)
    again, scheduler = replace(run, guide=guide), pristine(run.scheduler)
    checkpoint = round(min(strong.rewind_at or (0.5,)) * (run.count - 1))
    for flight in flights:
        flight.suspected = False
        flight.retries, flight.rewinds, flight.despecified_until = flight.retries + 1, 0, checkpoint + 1
    noise = torch.stack([flight.noise(row) for flight, row in zip(flights, like, strict=True)])
    group = Group(scheduler, noise * scheduler.init_noise_sigma, [*range(len(flights))])
    return denoise(again, group, conditions, flights)


@torch.no_grad()
def decode(run: Run, sample: Tensor) -> Tensor:
    """The finished picture, float32 [B, 3, H, W] in [0, 1], rounded to the 8 bits it will be delivered in."""
    images = run.guide.denoiser.decode(sample).float()
    require_finite("images", images)  # before clamping turns an infinity into white
    return (images.clamp(0, 1) * 255).round() / 255


def summary(verdicts: Sequence[Verdict]) -> str:
    """One line: how many images were rewound, resampled, blocked or are still marked."""
    rewound, resampled = sum(v.rewinds > 0 for v in verdicts), sum(v.retries > 0 for v in verdicts)
    blocked, marked = sum(v.blocked for v in verdicts), sum(v.memorized and not v.blocked for v in verdicts)
    return (
        f"{len(verdicts)} images: {rewound} rewound, {resampled} resampled, {blocked} blocked, "
        f"{marked} delivered marked as memorised"
    )


def _under(images: Tensor, index: Any, config: AMGConfig) -> list[Verdict]:
    similarity, row, _ = index.with_searcher("exact").nearest(index.embed(images.float()))
    require_finite("similarity", similarity)
    assert config.threshold is not None
    return [
        Verdict(
            index.metric,
            value,
            config.threshold,
            Neighbour(found, index.ids[found], index.captions[found]),
            memorized=value > config.threshold,
        )
        for value, found in zip(similarity.tolist(), row.tolist(), strict=True)
    ]


def _strong(config: AMGConfig) -> AMGConfig:
    assert config.metric is not None
    strong = AMGConfig.preset(
        "strong",
        guidance_scale=config.guidance_scale,
        gradient=config.gradient,
        check_at=(),
    ).for_metric(config.metric)
    strong = replace(strong, max_rewinds=max(config.max_rewinds or 0, strong.max_rewinds or 0))
    if not config.active:
        return strong
    names = ("threshold", "lambda_min", "lambda_max", "rewind_threshold")
    own = {name: getattr(config, name) for name in names}
    return replace(strong, **{k: min(v, getattr(strong, k)) for k, v in own.items() if v is not None})

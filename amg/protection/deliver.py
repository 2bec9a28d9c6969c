"""What a pipeline of somebody else's loop hands out: checked, and replaced where it breaks the promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.engine.drive import pristine
from amg.engine.plan import noise_scale
from amg.guidance.checkpoint import affords
from amg.guidance.flight import Flight
from amg.guidance.ordinary import despecify
from amg.guidance.predict import Conditions
from amg.promise import began_again, check, decode, memorized_row, strong
from amg.protection.catch_up import Run, denoise
from amg.protection.group import Group
from amg.verdict import MemorizedError, Verdict


class Delivery(NamedTuple):
    """`images` float32 [B, 3, H, W] in [0, 1], the samples they were decoded from, their verdicts, and the
    rows whose image was replaced by a re-run or a blank."""

    images: Tensor
    sample: Tensor
    verdicts: list[Verdict]
    replaced: list[int]


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
    `max_retries` times and while `max_evaluations` allows, then blocked; "block": a blank image; "flag":
    delivered, marked; "raise": `MemorizedError`. `safety` is shown what replaces an image,
    (images, rows) -> what is delivered of them.
    """
    config, index = run.guide.config, run.guide.index
    verdicts = check(images, index, also, config, flights)
    bad = [row for row, verdict in enumerate(verdicts) if verdict.memorized]
    if config.on_memorized == "raise" and bad:
        raise MemorizedError(verdicts)
    if config.on_memorized == "flag" or not bad:
        return Delivery(images, sample, verdicts, [])
    images, sample = images.clone(), sample.clone()
    attempts = config.max_retries if config.on_memorized == "resample" else 0
    plain = run.count * (1 if conditions.uncond is None else 2)
    for _ in range(attempts):
        again = [
            row for row in bad if verdicts[row].memorized and affords(config, flights[row], plain, plain)
        ]
        if not again:
            break
        mine, wanted = [flights[row] for row in again], conditions.take(torch.tensor(again))
        _despecify(run, [(flights[row], verdicts[row]) for row in again])
        drawn = start_over(run, wanted, mine, sample[again], strong(config))
        sample[again] = drawn.to(sample.dtype)
        pictures = decode(run.guide.denoiser, sample[again])
        images[again] = (pictures if safety is None else safety(pictures, again)).to(images)
        for row, verdict in zip(again, check(images[again], index, also, config, mine), strict=True):
            verdicts[row] = verdict
    blocked = [row for row in bad if verdicts[row].memorized]
    for row in blocked:
        images[row], sample[row] = 0.0, 0.0
        verdicts[row] = replace(verdicts[row], blocked=True)
    if safety is not None and blocked:
        images[blocked] = safety(images[blocked].float(), blocked).to(images)
    return Delivery(images, sample, verdicts, bad)


def start_over(
    run: Run, conditions: Conditions, flights: Sequence[Flight], like: Tensor, config: AMGConfig
) -> Tensor:
    """Whole re-runs with fresh noise under `config`, ungated, one per row of `like`."""
    again, scheduler = (
        replace(run, guide=replace(run.guide, config=config, gate=None)),
        pristine(run.scheduler),
    )
    for flight in flights:
        began_again(flight, config, run.count)
    noise = torch.stack([flight.noise(row) for flight, row in zip(flights, like, strict=True)])
    group = Group(scheduler, noise * noise_scale(scheduler), [*range(len(flights))])
    return denoise(again, group, conditions, flights)


def _despecify(run: Run, found: Sequence[tuple[Flight, Verdict]]) -> None:
    """Give re-runs an ordinary caption near the image that the metric, or else the guard, named."""
    guide = run.guide
    named = [(flight, guide.config, memorized_row(verdict)) for flight, verdict in found]
    samples = [(flight, config, row) for flight, config, row in named if row is not None]
    despecify(guide.index, guide.denoiser, guide.tools.ordinary, samples)

"""Finished samples: decoded and checked together, delivered, run again or blocked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from amg.engine.job import Job
from amg.engine.lives import Done, recaption
from amg.engine.slots import Slot
from amg.guidance.checkpoint import affords
from amg.guidance.ordinary import despecify
from amg.promise import began_again, check, decode, memorized_row, strong
from amg.verdict import MemorizedError, Verdict


@torch.no_grad()
def finish(done: Sequence[Done]) -> list[tuple[Slot, Tensor]]:
    """Decode and check samples of one slot set and one promise; those to be run again, with fresh noise."""
    job = done[0].slot.job
    sample = torch.cat([one.sample for one in done])
    images = decode(job.tools.denoiser, sample)
    images = torch.cat([_shown(one.slot, images[at : at + 1]) for at, one in enumerate(done)])
    flights = [one.slot.flight for one in done]
    verdicts = check(images, job.tools.index, job.also, job.config, flights)
    verdicts = [_from_input(one.slot.job, verdict) for one, verdict in zip(done, verdicts, strict=True)]
    again = []
    for at, (one, verdict) in enumerate(zip(done, verdicts, strict=True)):
        if _runs_again(one.slot, verdict):
            again.append(_again(one.slot, verdict, one.sample))
            continue
        _keep(one, images[at : at + 1], verdict)
    return again


def conclude(job: Job) -> None:
    """Hand out what a request asked for, all its images being finished."""
    from amg.engine.output import output_of

    verdicts = [job.verdicts[place] for place in range(len(job))]
    if not job.claim():
        return
    if job.config.on_memorized == "raise" and any(_withheld(job, verdict) for verdict in verdicts):
        job.future.set_exception(MemorizedError(verdicts))
        return
    try:
        result = output_of(job, verdicts)
    except Exception as error:  # whatever it is, it is the future's
        job.future.set_exception(error)
        return
    job.future.set_result(result)


def _shown(slot: Slot, image: Tensor) -> Tensor:
    """What the request's safety checker lets through of its image."""
    safety = slot.job.safety
    return image if safety is None else safety(image, [slot.place])


def _from_input(job: Job, verdict: Verdict) -> Verdict:
    """The verdict, marked where its training image is what the user put in."""
    return replace(verdict, from_input=verdict.memorized and memorized_row(verdict) in job.own)


def _withheld(job: Job, verdict: Verdict) -> bool:
    return verdict.memorized and (job.config.block_input_copies or not verdict.from_input)


def _runs_again(slot: Slot, verdict: Verdict) -> bool:
    """Whether a re-run is allowed, affordable, and likely to be done in time."""
    config, flight, job = slot.job.config, slot.flight, slot.job
    if (
        not _withheld(job, verdict)
        or config.on_memorized != "resample"
        or flight.retries >= config.max_retries
    ):
        return False
    plain = job.steps * (1 if slot.conditions.uncond is None else 2)
    if not affords(config, flight, plain, plain):
        return False
    now = time.monotonic()
    return now + (now - job.began) * plain / max(flight.evaluations, 1) <= job.late_at


def _again(slot: Slot, verdict: Verdict, like: Tensor) -> tuple[Slot, Tensor]:
    """A whole re-run with fresh noise under `strong`, despecified up to the first checkpoint."""
    job, flight = slot.job, slot.flight
    row = memorized_row(verdict)
    if row is not None:
        despecify(job.tools.index, job.tools.denoiser, job.tools.ordinary, [(flight, job.config, row)])
    config = strong(job.config)
    began_again(flight, config, slot.plan.total)
    plan = job.course.plan(config)
    conditions = job.conditions_of(slot.place)
    begun = job.again(slot.place, job.course.noise_scale, like)
    fresh = Slot(job, slot.place, flight, plan, 0, False, conditions, begun.kept)
    recaption(job.tools.denoiser, [fresh])
    return fresh, begun.sample


def _keep(one: Done, image: Tensor, verdict: Verdict) -> None:
    job, place, sample = one.slot.job, one.slot.place, one.sample
    if _withheld(job, verdict) and job.config.on_memorized in ("resample", "block"):
        image, sample = _shown(one.slot, torch.zeros_like(image)), torch.zeros_like(sample)
        verdict = replace(verdict, blocked=True)
    if job.memory is not None and (verdict.rewinds or verdict.retries):
        job.memory.remember(one.slot.flight, job.course)
    job.images[place], job.samples[place], job.verdicts[place] = image, sample, verdict

"""Admit -> step -> look -> retire, on one thread: any number of requests in one batch.

A request is admitted whole, first come first served, as soon as there is room, and each of its samples is a
slot from then on: a finished one is refilled at once. Samples that go back stay in their slots, those that
are run again come before new requests, and the slot set with the oldest request steps next.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Hashable, Sequence, Set

import torch
from torch import Tensor

from amg.engine.finish import conclude, finish
from amg.engine.job import Job
from amg.engine.lives import Done, broken_at, leave, recaption, send_back
from amg.engine.slots import Slot, Slots
from amg.engine.step import step

AT_ONCE = 8  # finished samples decoded and checked between two steps, while others are in flight


class Engine:
    """What a `Queue` lets in is run here, on the queue's thread."""

    def __init__(self) -> None:
        self._sets: dict[Hashable, Slots] = {}
        self._again: list[tuple[Slot, Tensor]] = []
        self._done: list[Done] = []
        self._finished: list[Job] = []

    @property
    def busy(self) -> int:
        """Images that are in flight, or about to be."""
        return sum(len(slots) for slots in self._sets.values()) + len(self._again)

    def admit(self, job: Job) -> None:
        """Start a request."""
        job.began = time.monotonic()
        self._guarded(job, lambda: self._join(first_slots(job), job.sample))

    def forget(self, over: Set[Job]) -> None:
        """Let go of the samples of requests that are over."""
        for slots in self._sets.values():
            rows = [at for at, slot in enumerate(slots.slots) if slot.job in over]
            if rows:
                slots.leave(rows)
        self._again = [(slot, sample) for slot, sample in self._again if slot.job not in over]
        self._done = [one for one in self._done if one.slot.job not in over]
        for key in [key for key, slots in self._sets.items() if not len(slots)]:
            del self._sets[key]

    def turn(self) -> None:
        """One step of one slot set, and some of what is finished."""
        again, self._again = self._again, []
        for slot, sample in again:
            self._guarded(slot.job, functools.partial(self._join, [slot], sample))
        stepping = [slots for slots in self._sets.values() if len(slots)]
        if stepping:
            self._step(min(stepping, key=lambda slots: min(slot.job.began for slot in slots.slots)))
        self._finish(self._due())
        for job in list(dict.fromkeys(self._finished)):
            conclude(job)
        self._finished.clear()

    def _join(self, slots: Sequence[Slot], sample: Tensor) -> None:
        job = slots[0].job
        if job.key not in self._sets:
            self._sets[job.key] = Slots(job.tools.denoiser, sample, job.dtype)
        self._sets[job.key].join(slots, sample)

    def _step(self, slots: Slots) -> None:
        jobs = list(dict.fromkeys(slot.job for slot in slots.slots))
        try:
            with torch.no_grad(), jobs[0].modes():
                broken = step(slots)
                for row in broken:
                    slots.slots[row].job.fail(_not_finite(slots.slots[row], broken_at(slots, row)))
                if slots.tick > slots.event:  # that step was one with something to do
                    self._settle(slots)
        except Exception as error:
            self._part(slots, jobs, error)
        for job in jobs:
            if job.bar is not None:
                _show(job, slots)

    def _settle(self, slots: Slots) -> None:
        """After a step with something to do: back to an early step, or out."""
        send_back(slots)
        rows = [at for at, slot in enumerate(slots.slots) if slots.row_of(slot) == len(slot.plan.steps)]
        if rows:
            self._done += leave(slots, rows)
        slots.event = slots.tick if slots.changed else slots.tick + slots.ahead

    def _part(self, slots: Slots, jobs: Sequence[Job], error: Exception) -> None:
        """A step failed: the fault is the request's that fails alone, and from now on each runs alone."""
        if len(jobs) == 1:
            jobs[0].fail(error)
            return
        warnings.warn(f"a step of {len(jobs)} requests failed, each goes on alone: {error!r}", stacklevel=2)
        for job in jobs:
            job.key = (job.key, id(job))
            self._sets[job.key] = slots.part(job)
        slots.leave(range(len(slots)))

    def _due(self) -> list[Done]:
        """The finished samples to decode and check now: a bounded number, those first whose requests have
        nothing in flight any more; others wait for company."""
        flying = {slot.job for slots in self._sets.values() for slot in slots.slots}
        ready = [one for one in self._done if one.slot.job not in flying]
        if not flying or len(self._done) >= AT_ONCE:
            ready += [one for one in self._done if one.slot.job in flying]
        return ready[:AT_ONCE] if flying else ready

    def _finish(self, now: Sequence[Done]) -> None:
        """Decode and check finished samples, those of one slot set and promise together."""
        if not now:
            return
        self._done = [one for one in self._done if one not in now]
        groups: dict[Hashable, list[Done]] = {}
        for one in now:
            job = one.slot.job
            if one.broken is not None:
                job.fail(_not_finite(one.slot, one.broken))
            elif not job.future.done():
                groups.setdefault((job.key, id(job.tools.index), job.also, job.config), []).append(one)
        for group in groups.values():
            self._finish_together(group)

    def _finish_together(self, group: Sequence[Done]) -> None:
        jobs = list(dict.fromkeys(one.slot.job for one in group))
        try:
            with jobs[0].modes():
                self._again += finish(group)
            self._finished += [job for job in jobs if job.complete]
        except Exception as error:
            if len(group) == 1:
                jobs[0].fail(error)
                return
            for one in group:
                if not one.slot.job.future.done():
                    self._finish_together([one])

    def _guarded(self, job: Job, work: Callable[[], None]) -> None:
        try:
            with torch.no_grad(), job.modes():
                work()
        except Exception as error:
            job.fail(error)


def first_slots(job: Job) -> list[Slot]:
    """A slot for every image of a request, at the beginning of its run."""
    plan = job.course.plan(job.config)
    slots = [
        Slot(job, place, flight, plan, 0, True, job.conditions_of(place), job.kept and job.kept.row(place))
        for place, flight in enumerate(job.flights)
    ]
    recaption(job.tools.denoiser, slots)  # those whose prompt is remembered
    return slots


def _not_finite(slot: Slot, step: int) -> FloatingPointError:
    return FloatingPointError(
        f"`output` must be finite, got NaN or infinity for image {slot.place} of the request, step {step}"
    )


def _show(job: Job, slots: Slots) -> None:
    """Move a request's progress bar on by a step."""
    left = [len(slot.plan.steps) - slots.row_of(slot) for slot in slots.slots if slot.job is job]
    job.bar.total = job.bar.n + 1 + max(left, default=0)
    job.bar.update()

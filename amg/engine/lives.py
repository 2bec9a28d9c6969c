"""What happens to a sample between two steps: it goes back to an early one, or it is done and leaves."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amg.engine.slots import Segment, Slot, Slots
from amg.guidance.flight import Flight, seeded
from amg.guidance.lower import TEXT, Start, lower
from amg.guidance.note import Note
from amg.guidance.predict import Denoiser, captioned, encoded, mapped
from amg.guidance.read import read_all
from amg.verdict import TraceStep


@dataclass(frozen=True, eq=False)
class Done:
    """A sample whose steps are all made: x [1, ...], and the step from which on it is not finite, if so."""

    slot: Slot
    sample: Tensor
    broken: int | None


def send_back(slots: Slots) -> None:
    """Samples marked at a checkpoint or by an alarm go back to an early step.

    They start from fresh noise alone, as large as x_t is there. Re-noising x0_hat instead would leave
    sqrt(alpha_bar)·x0_hat in it, and at a latent model's early steps (alpha_bar near 0.01) that remnant is
    enough to bring the same picture back.
    """
    rows = [at for at, slot in enumerate(slots.slots) if slot.flight.pending]
    if not rows:
        return
    back = [slots.slots[row] for row in rows]
    seeded([slot.flight for slot in back])
    for slot in back:
        _close_segment(slots, slot)
        slot.plan, slot.first = slot.job.course.again(slot.plan.config, slot.plan.total), False
        went_back(slot.flight, slot.segments[-1].plan.start + slot.segments[-1].count)
    like = slots.sample[:1]
    begun = [slot.job.again(slot.place, slot.plan.size, like) for slot in back]
    for slot, one in zip(back, begun, strict=True):
        slot.kept = one.kept
    recaption(slots.denoiser, back)
    slots.start_again(rows, torch.cat([one.sample for one in begun]))


def went_back(flight: Flight, position: int) -> None:
    """Note that a sample was sent back after it had reached step `position`."""
    flight.pending, flight.suspected = False, False
    flight.rewinds += 1
    flight.total_rewinds += 1
    flight.despecified_until, flight.deduplicated_until = position, 0


def recaption(denoiser: Denoiser, slots: Sequence[Slot]) -> None:
    """Condition samples that were given a caption, or whose prompt is lowered, on that; one call of the text
    encoder for all captions."""
    for slot in slots:
        if slot.flight.to_lower is not None:
            lower(slot.flight, _first_step(slot), slot.plan.config)
        if slot.flight.lowered is not None and slot.flight.lowered.embedding is not None:
            slot.conditions = captioned(slot.conditions, {TEXT: slot.flight.lowered.embedding})
    told = [slot for slot in slots if slot.flight.caption is not None]
    if not told or denoiser.encode_captions is None:
        return
    said = encoded(denoiser, [slot.flight.caption or "" for slot in told], told[0].conditions)
    for at, slot in enumerate(told):
        own = {name: mapped(operator.itemgetter(slice(at, at + 1)), value) for name, value in said.items()}
        slot.conditions = captioned(slot.conditions, own)


def _first_step(slot: Slot) -> Start:
    """The first step of a sample's first run."""
    job, sample = slot.job, slot.flight.initial[None].to(slot.job.dtype)
    plan, conditions = job.course.plan(job.config), job.conditions_of(slot.place)
    return Start(job.tools.denoiser, sample, plan.t[0], conditions, job.steps * 2)


def leave(slots: Slots, rows: Sequence[int]) -> list[Done]:
    """Take samples that are done out of the set, their traces written: one read."""
    gone = [slots.slots[row] for row in rows]
    at = torch.tensor(rows, dtype=torch.int64, device="cpu").to(slots.device)
    sample = slots.sample.index_select(0, at)
    for slot in gone:
        slot.count(slots.row_of(slot))
        _close_segment(slots, slot)
    length = max(slot.traced for slot in gone)
    trace = slots.trace.index_select(0, at)[:, :length]
    acted = [note.acted for slot in gone for note in slot.notes.values() if note.acted is not None]
    flags, signals, *fired = read_all(slots.flags.index_select(0, at), trace, *acted)
    _resolve(gone, fired)
    done = []
    for number, slot in enumerate(gone):
        trace_of_it = _trace_of(slot, _fours(signals[number * length * 4 :], slot.traced))
        broken = _first_broken(trace_of_it) if flags[number] else None
        slot.flight.trace += trace_of_it
        done.append(Done(slot, sample[number : number + 1], broken))
    slots.leave(rows)
    return done


def _resolve(slots: Sequence[Slot], fired: Sequence[Sequence[float]]) -> None:
    """Write the dissimilarity terms into the notes, now that it is known which fired."""
    notes = (note for slot in slots for note in slot.notes.values() if note.acted is not None)
    for note, (value,) in zip(notes, fired, strict=True):
        if value:
            note.terms.append("dissimilarity")


def _close_segment(slots: Slots, slot: Slot) -> None:
    slot.segments.append(Segment(slot.plan, slots.row_of(slot), slot.low))


def _trace_of(slot: Slot, signals: Sequence[tuple[float, ...]]) -> list[TraceStep]:
    """The steps that a sample made since it joined."""
    trace, empty = list[TraceStep](), Note()
    for segment in slot.segments:
        for step in segment.plan.steps[: segment.count]:
            note, own = slot.notes.get(len(trace), empty), signals[len(trace)]
            low = ("despecification",) if step.position < segment.low else ()
            place = (step.position, float(step.t), note.similarity, step.threshold, note.row)
            trace.append(TraceStep(*place, (*low, *note.terms), own, note.estimated))
    return trace


def broken_at(slots: Slots, row: int) -> int:
    """The first step at which a sample that has just made one was not finite; one read."""
    slot = slots.slots[row]
    made = [*slot.segments, Segment(slot.plan, slots.row_of(slot), slot.low)]
    count = sum(segment.count for segment in made)
    (signals,) = read_all(slots.trace[row, :count])
    return _first_broken(_trace_of(replace(slot, segments=made), _fours(signals, count)))


def _fours(values: Sequence[float], count: int) -> list[tuple[float, ...]]:
    return [tuple(values[4 * at : 4 * at + 4]) for at in range(count)]


def _first_broken(trace: Sequence[TraceStep]) -> int:
    finite = [all(math.isfinite(value) for value in step.signals or ()) for step in trace]
    return trace[finite.index(False) if False in finite else -1].step

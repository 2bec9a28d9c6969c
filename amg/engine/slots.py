"""The samples in flight that share network calls: tensors on the device, a small record each on the host."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from amg.engine.frame import Seat
from amg.engine.job import Job
from amg.engine.plan import Plan
from amg.guidance.flight import Flight
from amg.guidance.note import Note
from amg.guidance.predict import Conditions, Denoiser, joined, plain
from amg.pipelines.given import Kept

TRACE = 64  # steps a trace has room for at first
BANK = 32  # plans kept in the bank although no sample follows them


@dataclass(frozen=True)
class Segment:
    """The first `count` steps of a plan that a sample made, with a lower scale up to step `low`."""

    plan: Plan
    count: int
    low: int


@dataclass(eq=False)
class Slot:
    """One sample in flight: the image `place` of `job`, at row `tick - began` of its plan.

    `first`: on its request's first run, whose noise the caller's generators draw. `kept`: of the picture that
    it paints into. `segments`: the steps made before this plan; `notes`: of its steps that looked, by their
    place in the trace.
    """

    job: Job
    place: int
    flight: Flight
    plan: Plan
    began: int
    first: bool
    conditions: Conditions
    kept: Kept | None = None
    segments: list[Segment] = field(default_factory=list)
    notes: dict[int, Note] = field(default_factory=dict)
    guided: bool = False
    counted: int = 0

    @property
    def traced(self) -> int:
        """Steps in the trace before this plan."""
        return sum(segment.count for segment in self.segments)

    @property
    def cost(self) -> int:
        return 2 if self.guided else 1

    @property
    def low(self) -> int:
        """The step up to which a later try keeps its lower guidance scale; 0 where it has none."""
        has = self.plan.config.rewind_guidance is not None and self.conditions.uncond is not None
        return self.flight.despecified_until if has else 0

    def count(self, row: int) -> None:
        """Add the network evaluations of the steps before `row` to the flight's."""
        self.flight.evaluations += (row - self.counted) * self.cost
        self.counted = row

    def halves_at(self, row: int) -> bool:
        """Whether the unconditional half is computed: within the guidance interval, where a gate or an alarm
        reads it, for suspected samples and for later tries."""
        if self.conditions.uncond is None:
            return False
        flight = self.flight
        return self.plan.halves[row] or flight.suspected or bool(flight.rewinds or flight.retries)

    def steps_ahead(self, row: int) -> int:
        """Steps from `row` until the host has something to do."""
        if self.flight.suspected:
            return 0
        events = self.plan.events
        found = events[bisect.bisect_left(events, row)]
        low = self.low - self.plan.start
        return (low if row <= low < found else found) - row

    def scale_at(self, row: int) -> float:
        """The guidance scale of a step: s0, or that of a later try's start."""
        if self.plan.start + row >= self.low:
            return self.plan.scale
        return self.plan.config.scale_of_try(self.flight.rewinds, self.flight.retries, self.plan.scale)

    def seat(self, row: int) -> Seat:
        """What measuring wants to know of it."""
        plan = self.plan
        each = 1 if self.conditions.uncond is None else 2
        rest = (len(plan.steps) - row - 1) * each
        low, step = plan.start + row < self.low, plan.steps[row]
        whole = self.job.steps * each
        return Seat(self.flight, plan.config, step, plan.scale, low, self.guided, whole, rest)


class Slots:
    """A slot set: samples of one shape, one network and one structure of conditions, each at its own step.

    `cursor` int64 [2, B]: each sample's row of `bank`, the coefficients of all plans, and of its trace. What
    a step needs of the set is packed anew when samples join, leave or change, and stays as it is in between.
    """

    def __init__(self, denoiser: Denoiser, like: Tensor, dtype: torch.dtype):
        self.denoiser, self.dtype, self.device = denoiser, dtype, like.device
        self.slots: list[Slot] = []
        self.tick, self.event = 0, 0
        empty = like.new_empty(0, *like.shape[1:], dtype=torch.float32)
        self.sample, self.spare = empty, empty
        self.state = empty.new_empty(0, *empty.shape)
        self.flags = torch.zeros(0, dtype=torch.int32, device=self.device)
        self.trace = empty.new_empty(0, TRACE, 4)
        self.plans: dict[Plan, int] = {}
        self.changed = True

    def __len__(self) -> int:
        return len(self.slots)

    def row_of(self, slot: Slot) -> int:
        """The row of its plan that a slot makes next."""
        return self.tick - slot.began

    def join(self, slots: Sequence[Slot], sample: Tensor) -> None:
        """Take samples [n, ...] in, which begin their plans."""
        n, self.changed = len(slots), True
        for slot in slots:
            slot.began = self.tick
        self.slots, self.event = [*self.slots, *slots], self.tick
        self.sample = torch.cat([self.sample, sample.to(self.device, torch.float32)])
        self.state = torch.cat([self.state, self.state.new_zeros(len(self.state), n, *sample.shape[1:])], 1)
        self.flags = torch.cat([self.flags, self.flags.new_zeros(n)])
        self.trace = torch.cat([self.trace, self.trace.new_zeros(n, *self.trace.shape[1:])])

    def leave(self, rows: Sequence[int]) -> None:
        """Let the samples `rows` go."""
        gone, self.changed = {*rows}, True
        kept = [row for row in range(len(self.slots)) if row not in gone]
        self.slots, self.event = [self.slots[row] for row in kept], self.tick
        at = torch.tensor(kept, dtype=torch.int64, device="cpu").to(self.device)
        self.sample, self.flags, self.trace = (
            tensor.index_select(0, at) for tensor in (self.sample, self.flags, self.trace)
        )
        self.state = self.state.index_select(1, at)

    @property
    def ahead(self) -> int:
        """Steps until the host has something to do."""
        return min((slot.steps_ahead(self.row_of(slot)) for slot in self.slots), default=0)

    def part(self, job: Job) -> Slots:
        """A set of one request's samples alone, as they are in this one."""
        rows = [at for at, slot in enumerate(self.slots) if slot.job is job]
        other = Slots(self.denoiser, self.sample, self.dtype)
        other.slots, other.tick, other.event = [*self.slots], self.tick, self.tick
        other.sample, other.state, other.flags, other.trace = self.sample, self.state, self.flags, self.trace
        other.leave([at for at in range(len(self.slots)) if at not in rows])
        return other

    def start_again(self, rows: Sequence[int], sample: Tensor) -> None:
        """Put fresh samples [n, ...] in the place of `rows`, which begin their new plans."""
        at, self.changed = torch.tensor(rows, dtype=torch.int64, device="cpu").to(self.device), True
        self.sample = self.sample.index_copy(0, at, sample.to(self.device, torch.float32))
        self.state, self.event = self.state.index_fill(1, at, 0.0), self.tick
        for row in rows:
            self.slots[row].began, self.slots[row].counted = self.tick, 0

    def prepare(self) -> None:
        """Bring what the steps need up to date: which rows the network gets, scales, places in bank and
        trace."""
        for slot in self.slots:
            row = self.row_of(slot)
            slot.count(row)
            guided = slot.halves_at(row)
            self.changed, slot.guided = self.changed or guided != slot.guided, guided
        if self.changed:
            self._pack()
        self._set_scales()

    def _set_scales(self) -> None:
        scales = [slot.scale_at(self.row_of(slot)) for slot in self.slots]
        usual = [slot.plan.scale for slot in self.slots]
        self.lowered, self.rescale = scales != usual, None
        if self.lowered:
            self.s0 = torch.tensor(scales, dtype=torch.float32, device="cpu").to(self.device)
        rescale = [
            slot.job.rescale if slot.guided and scale == own else 0.0
            for slot, scale, own in zip(self.slots, scales, usual, strict=True)
        ]
        if any(rescale):
            self.rescale = torch.tensor(rescale, dtype=torch.float32, device="cpu").to(self.device)

    def _pack(self) -> None:
        slots, batch = self.slots, len(self.slots)
        states = max(slot.plan.table.states for slot in slots)
        if states > len(self.state):
            more = self.state.new_zeros(states - len(self.state), *self.sample.shape)
            self.state = torch.cat([self.state, more])
        self._fill_bank()
        self._pack_network()
        kept = [slot.kept for slot in slots if slot.kept is not None]
        self.kept = Kept(*map(torch.cat, zip(*kept, strict=True))) if kept else None
        room = max(slot.traced + len(slot.plan.steps) for slot in slots)
        if room > self.trace.shape[1]:
            longer = self.trace.new_zeros(batch, 2 * room, 4)
            longer[:, : self.trace.shape[1]] = self.trace
            self.trace = longer
        room = self.trace.shape[1]
        places = [self.plans[slot.plan] + self.row_of(slot) for slot in slots]
        traced = [at * room + slot.traced + self.row_of(slot) for at, slot in enumerate(slots)]
        self.cursor = torch.tensor([places, traced], dtype=torch.int64, device="cpu").to(self.device)
        self.place, self.traced = self.cursor.unbind(0)
        self.spare, self.signals = torch.empty_like(self.sample), self.trace.new_empty(batch, 4)
        first = slots[0]
        self.alike = all(slot.plan is first.plan and slot.began == first.began for slot in slots)
        self.scaled = any(slot.plan.scaled for slot in slots)
        self.drawing = any(any(slot.plan.table.draws) for slot in slots)
        self.changed = False

    def _fill_bank(self) -> None:
        """One tensor of the coefficients of all plans that are followed."""
        if all(slot.plan in self.plans for slot in self.slots):
            return
        live = list(dict.fromkeys(slot.plan for slot in self.slots))
        kept = [plan for plan in self.plans if plan not in live][-BANK:]
        self.plans, first = {}, 0
        for plan in (*kept, *live):
            self.plans[plan], first = first, first + len(plan.steps)
        self.bank = torch.cat([plan.coefficients for plan in self.plans])
        self.bank_t = torch.cat([plan.t for plan in self.plans])
        after = [plan.after for plan in self.plans if plan.after is not None]
        self.bank_after = torch.cat(after) if after else None

    def _pack_network(self) -> None:
        guided = [at for at, slot in enumerate(self.slots) if slot.guided]
        order = [*guided, *range(len(self.slots))]
        self.gather = torch.tensor(order, dtype=torch.int64, device="cpu").to(self.device)
        rows = torch.full((4, len(self.slots)), -1, dtype=torch.int32, device="cpu")
        for number, at in enumerate(guided):
            rows[0, at] = number
        rows[1] = torch.arange(len(guided), len(order), dtype=torch.int32, device="cpu")
        self.rows = rows.to(self.device)
        halves: list[Any] = [self.slots[at].conditions.uncond for at in guided]
        halves += [slot.conditions.cond for slot in self.slots]
        packed = {name: joined([half[name] for half in halves]) for name in halves[0]}
        self.conditions = {**plain(packed), **self.slots[0].conditions.shared}

    def note(self, found: dict[int, Note]) -> None:
        """Keep what was noted of this step."""
        for row, note in found.items():
            slot = self.slots[row]
            slot.notes[slot.traced + self.row_of(slot)] = note

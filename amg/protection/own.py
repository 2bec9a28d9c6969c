"""Somebody's own loop whose samples start again: the engine's slots around a network that the loop calls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.embed.precision import Modes
from amg.engine.job import Job
from amg.engine.lives import leave, send_back
from amg.engine.look import Tools
from amg.engine.plan import Course
from amg.engine.slots import Slot, Slots
from amg.engine.step import step
from amg.engine.table import Tables, setting
from amg.guidance.checkpoint import affords
from amg.guidance.flight import Flight
from amg.guidance.ordinary import despecify
from amg.guidance.predict import Conditions
from amg.promise import began_again, memorized_row, strong
from amg.protection.fused import Call, Form, form_of
from amg.verdict import Verdict


class OwnLoop:
    """A batch of a loop that asks which samples start again. Each sample is at its own step; those that are
    done wait for the others."""

    def __init__(self, scheduler: Any, tables: Tables, config: AMGConfig, tools: Tools, sample: Tensor):
        self.scheduler, self.tables, self.config = scheduler, tables, config
        self._own = replace(tools.denoiser, network=self._network)
        told = tools.denoiser.encode_captions or (lambda captions: {})  # the loop encodes them itself
        self.tools = replace(tools, denoiser=replace(self._own, encode_captions=told))
        self.flights: list[Flight] = []
        self.first, self.ended = sample, dict[int, Tensor]()
        self._ask_neighbours = tools.denoiser.network
        self._given = sample
        self._job: Job | None = None
        self._forms: dict[bool, Form] = {}
        self.slots: Slots | None = None

    def begin(self, prompts: Sequence[str | None] | None) -> None:
        """Note what was asked for."""
        texts = [None] * len(self.first) if prompts is None else [*prompts]
        if len(texts) != len(self.first):
            raise ValueError(f"`prompts` must be {len(self.first)}, one a sample, got {len(texts)}")
        scaled = self.first
        if hasattr(self.scheduler, "scale_model_input"):
            scaled = self.scheduler.scale_model_input(self.first, self.scheduler.timesteps[0])
        self.flights = [Flight.from_noise(row, text) for row, text in zip(scaled, texts, strict=True)]

    @property
    def finished(self) -> bool:
        return len(self.ended) == len(self.flights)

    @property
    def timestep(self) -> Tensor:
        """[B]: each sample's next timestep; of those that are done the last."""
        timesteps = self.scheduler.timesteps
        t = timesteps[-1 if self.ended else 0].repeat(len(self.flights)).to(self.first.device)
        for slot in self._flying:
            t[slot.place] = slot.plan.t[self._row(slot)]
        return t

    @property
    def scale(self) -> Tensor:
        """[B]: the network's input is scale·x_t."""
        scale = torch.ones(len(self.flights), device=self.first.device)
        for slot in self._flying:
            scale[slot.place] = float(slot.plan.table.input_scale[self._row(slot)])
        return scale

    @torch.no_grad()
    def step(self, call: Call, arguments: Mapping[str, Any]) -> Tensor:
        """Each sample's next step -> x of the step after it [B, ...]. Errors: FloatingPointError naming the
        samples that are not finite, `Refused` for a scheduler without a table."""
        if self.slots is None:
            self._start(call, arguments)
        slots, job = self.slots, self._job
        assert slots is not None and job is not None
        self._settle(call.sample)  # those that were to start again, and were done
        places = [slot.place for slot in slots.slots]
        if not places:
            return call.sample.clone()
        at = torch.tensor(places, device=call.sample.device)
        slots.sample = call.sample.index_select(0, at).to(slots.device, torch.float32)
        halves = [
            half.index_select(0, at) for half in (call.output_uncond, call.output_cond) if half is not None
        ]
        self._given, job.generator = torch.cat(halves), call.generator
        broken = step(slots)
        if broken:
            rows = [places[row] for row in broken]
            raise FloatingPointError(f"`model_output` must be finite, got NaN or infinity in rows {rows}")
        after = call.sample.clone()
        after[at] = slots.sample.to(after)
        self._settle(after)
        return after

    @torch.no_grad()
    def restarted(self, sample: Tensor, verdicts: Sequence[Verdict] | None) -> Tensor:
        """x [B, ...] in which the samples that start again are fresh noise. Verdicts count where every
        sample is done: before, they may be of an earlier picture."""
        if self.slots is None or self._job is None:
            return sample
        places = [slot.place for slot in self.slots.slots]
        if places:
            self.slots.sample = sample[places].to(self.slots.device, torch.float32)
        back = [slot for slot in self.slots.slots if slot.flight.pending]
        send_back(self.slots)
        for slot in back:
            slot.conditions = self._job.conditions_of(slot.place)  # the loop has its captions
        for place, noise in self._again(verdicts) if verdicts and self.finished else ():
            back.append(self._run_again(place, noise))
        after = sample.clone()
        for slot in back:
            after[slot.place] = self.slots.sample[self.slots.slots.index(slot)].to(after)
        self._look_ahead()
        return after

    def told(self, after: Tensor, arguments: Mapping[str, Any], return_dict: bool) -> Any:
        """The scheduler's own output, of what was made."""
        if return_dict not in self._forms:
            self._forms[return_dict] = form_of(setting(self.scheduler, {}, arguments), 0, return_dict)
        kind = self._forms[return_dict].kind
        return (after,) if kind is None else kind(prev_sample=after)

    @property
    def _flying(self) -> Sequence[Slot]:
        return () if self.slots is None else self.slots.slots

    def _row(self, slot: Slot) -> int:
        assert self.slots is not None
        return min(self.slots.row_of(slot), len(slot.plan.steps) - 1)

    def _start(self, call: Call, arguments: Mapping[str, Any]) -> None:
        sample = call.sample
        rows = {"rows": torch.arange(len(sample), device=sample.device)}
        conditions = Conditions(rows, None if call.output_uncond is None else rows, {})
        course = Course(
            setting(self.scheduler, {}, arguments),
            self.tables,
            self.config.guidance_scale,
            None,
            sample.device,
        )
        plan = course.plan(self.config)
        self._job = Job(
            course=course,
            config=self.config,
            tools=self.tools,
            also=(),
            conditions=conditions,
            sample=sample,
            flights=self.flights,
            generator=call.generator,
            rescale=0.0,
            output_type="latent",
            safety=None,
            dtype=call.output_cond.dtype,
            key=None,
            owner=None,
            modes=Modes.here(),
            late_at=math.inf,
        )
        self.slots = Slots(self._own, sample.float(), call.output_cond.dtype)
        self.slots.join([self._slot(place, plan, True) for place in range(len(sample))], sample.float())

    def _slot(self, place: int, plan: Any, first: bool) -> Slot:
        assert self._job is not None
        return Slot(self._job, place, self.flights[place], plan, 0, first, self._job.conditions_of(place))

    def _settle(self, after: Tensor) -> None:
        """Samples that are done leave, unless they are to start again."""
        slots = self.slots
        assert slots is not None
        done = [
            row
            for row, slot in enumerate(slots.slots)
            if slots.row_of(slot) == len(slot.plan.steps) and not slot.flight.pending
        ]
        if done:
            for one in leave(slots, done):
                self.ended[one.slot.place] = after[one.slot.place]
        self._look_ahead()

    def _look_ahead(self) -> None:
        slots = self.slots
        assert slots is not None
        pending = any(slot.flight.pending for slot in slots.slots)
        slots.event = slots.tick if slots.changed or pending else slots.tick + slots.ahead

    def _again(self, verdicts: Sequence[Verdict]) -> list[tuple[int, Tensor]]:
        """The finished samples that are called memorised and may be run again, with their fresh noise."""
        job, again = self._job, []
        assert job is not None
        total = job.steps * (1 if job.conditions.uncond is None else 2)
        for place, verdict in enumerate(verdicts):
            flight = self.flights[place]
            wanted = verdict.memorized and place in self.ended and self.config.on_memorized == "resample"
            if not wanted or flight.retries >= self.config.max_retries:
                continue
            if not affords(self.config, flight, total, total):
                continue
            row = memorized_row(verdict)
            if row is not None:
                tools = self.tools
                despecify(tools.index, tools.denoiser, tools.ordinary, [(flight, self.config, row)])
            began_again(flight, strong(self.config), job.steps)
            again.append((place, flight.noise(self.first[:1].float()) * job.course.noise_scale))
        return again

    def _run_again(self, place: int, noise: Tensor) -> Slot:
        job, slots = self._job, self.slots
        assert job is not None and slots is not None
        slot = self._slot(place, job.course.plan(strong(self.config)), False)
        del self.ended[place]
        slots.join([slot], noise)
        return slot

    def _network(self, sample: Tensor, t: Any, **conditions: Any) -> Tensor:
        """What the loop computed; only for neighbours' captions is it asked again."""
        if "captions" not in conditions:
            return self._given
        return self._ask_neighbours(sample, t, **conditions)

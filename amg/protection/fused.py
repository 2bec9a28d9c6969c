"""One step of a loop that is not ours as one kernel call: guidance, the terms, the scheduler's own update."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.engine.drive import Drawn, Refused, input_scale, quietly, started
from amg.engine.frame import COLUMN, Frame, Seat, Terms, apply
from amg.engine.look import Tools
from amg.engine.measure import looks, measure
from amg.engine.noise import standard_normal
from amg.engine.plan import Plan, planned
from amg.engine.table import Setting, Tables, setting
from amg.guidance import terms as guidance
from amg.guidance.flight import Flight
from amg.guidance.note import Note
from amg.guidance.schedule import Step
from amg.protection.guide import read_signals, traced
from amg.verdict import TraceStep

TOLD = {"prev_sample", "pred_original_sample"}


class Call(NamedTuple):
    """What a loop gave to `step`: `output_uncond` None without classifier-free guidance, sample and outputs
    [B, ...]; `noise` where the caller drew it."""

    output_uncond: Tensor | None
    output_cond: Tensor
    sample: Tensor
    generator: Any = None
    noise: Tensor | None = None

    @property
    def double(self) -> bool:
        """Whether float64 is asked for, which the kernels' arithmetic is not."""
        return torch.float64 in (self.sample.dtype, self.output_cond.dtype)


class Form(NamedTuple):
    """What the scheduler's own step returns: `kind`, its output class, None: a tuple; whether x0_hat is in
    it."""

    kind: type | None
    x0_hat: bool


@dataclass(frozen=True, eq=False)
class Way:
    """How a scheduler's steps are made under these arguments of its `step`."""

    setting: Setting
    plan: Plan

    @functools.cached_property
    def _forms(self) -> dict[bool, Form]:
        return {}

    def form(self, return_dict: bool) -> Form:
        """What its step returns. Errors: `Refused` where that is more than a kernel knows."""
        if return_dict not in self._forms:
            self._forms[return_dict] = form_of(self.setting, self.plan.start, return_dict)
        return self._forms[return_dict]


@dataclass(eq=False)
class Run:
    """A batch on its way: state [S, B, ...] float32, of the scheduler; `row` of the plan is next."""

    way: Way
    state: Tensor
    row: int = 0
    rows: dict[int, Tensor] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """The network's next input is scale·x_t."""
        scales = self.way.plan.table.input_scale
        return float(scales[min(self.row, len(scales) - 1)])

    def copied(self) -> Run:
        """A run of its own from here on."""
        return replace(self, state=self.state.clone())


def way_of(
    tables: Tables,
    scheduler: Any,
    start: int,
    arguments: Mapping[str, Any],
    config: AMGConfig,
    device: torch.device,
) -> Way:
    """The table of a scheduler whose timesteps are set, from step `start` on. Errors: `Refused`."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            raise Refused(scheduler, f"its `{name}` is a tensor")
    ready = setting(scheduler, {}, arguments)
    way = Way(ready, planned(tables.table(ready, start), config, config.guidance_scale, None, device))
    for return_dict in (True, False):
        way.form(return_dict)
    return way


def begun(
    tables: Tables,
    scheduler: Any,
    start: int,
    arguments: Mapping[str, Any],
    config: AMGConfig,
    sample: Tensor,
) -> Run:
    """A batch before its first step. Errors: `Refused`."""
    way = way_of(tables, scheduler, start, arguments, config, sample.device)
    return Run(way, way.plan.table.blank(sample.float()))


def follow(run: Run, tables: Tables, arguments: Mapping[str, Any]) -> None:
    """Arguments of `step` may change in the middle where no history was made under the former ones."""
    ready, plan = run.way.setting, run.way.plan
    before = ready.step_arguments
    names = [name for name in {**before, **arguments} if before.get(name) != arguments.get(name)]
    if not names:
        return
    way = way_of(tables, ready.scheduler, plan.start, arguments, plan.config, plan.coefficients.device)
    if plan.table.states or way.plan.table.states:
        raise ValueError(
            f"`{names[0]}` must be {before.get(names[0])}, as in the steps before, since the scheduler has a "
            f"history, got {arguments.get(names[0])}"
        )
    run.way = way


@quietly
def form_of(ready: Setting, start: int, return_dict: bool) -> Form:
    """What a fresh scheduler's own step returns, by asking it once."""
    running, nothing = started(ready.scheduler, start), torch.zeros(1, 1, 2, 2, device="cpu")
    arguments = dict(ready.step_arguments)
    if "return_dict" in inspect.signature(running.step).parameters:
        arguments["return_dict"] = return_dict
    input_scale(running, start)
    with Drawn(nothing):
        result = running.step(nothing, running.timesteps[start], nothing, **arguments)
    if isinstance(result, tuple):
        if len(result) > 2:
            raise Refused(ready.scheduler, f"its step returns {len(result)} values")
        return Form(None, len(result) == 2)
    names = {one.name for one in dataclasses.fields(result)}
    if not names <= TOLD:
        raise Refused(ready.scheduler, f"its step returns {', '.join(sorted(names - TOLD))}")
    return Form(type(result), getattr(result, "pred_original_sample", None) is not None)


def advance(
    run: Run,
    call: Call,
    flights: Sequence[Flight],
    tools: Tools,
    ask_neighbours: Callable[[Step, Tensor, Sequence[int], Sequence[str]], Tensor],
    return_dict: bool,
) -> Any:
    """Make the next step of a batch: the scheduler's own output, in the sample's dtype.

    ask_neighbours: (step, the network's input, rows, captions) -> raw outputs of these rows. Errors:
    FloatingPointError naming the rows that are not finite.
    """
    plan = run.way.plan
    seats = seats_of(plan, run.row, flights, call.output_uncond is not None)
    frame, form = frame_of(run, call, seats, ask_neighbours), run.way.form(return_dict)
    terms, notes = look(frame, tools)
    after, signals = torch.empty_like(frame.sample), frame.sample.new_empty(len(seats), 4)
    x0_hat = torch.empty_like(frame.sample) if form.x0_hat else None
    flags = torch.zeros(len(seats), dtype=torch.int32, device=after.device)
    apply(
        frame,
        terms,
        noise=noise_of(run, call),
        state=run.state,
        prev_sample=after,
        x0_hat=x0_hat,
        signals=signals,
        flags=flags,
    )
    if bool(flags.any()):  # images drop NaN silently when they become bytes
        guidance.require_finite("output", frame.output)
        guidance.require_finite("prev_sample", after)
    run.row += 1
    record(seats, notes, signals)
    return told(form, plan.table.clip, after.to(call.sample.dtype), x0_hat)


def seats_of(plan: Plan, row: int, flights: Sequence[Flight], guided: bool) -> list[Seat]:
    """What the host knows of each sample; the network was run for this step."""
    each, step = 2 if guided else 1, plan.steps[row]
    plain, rest = step.total * each, (step.total - step.position - 1) * each
    seats = [Seat(one, plan.config, step, plan.scale, False, guided, plain, rest) for one in flights]
    for seat in seats:
        seat.flight.evaluations += seat.cost
    return seats


def frame_of(
    run: Run,
    call: Call,
    seats: Sequence[Seat],
    neighbours: Callable[[Step, Tensor, Sequence[int], Sequence[str]], Tensor],
) -> Frame:
    """This step, for those who look at it and for the kernel."""
    sample, batch = call.sample, len(seats)
    halves = [call.output_cond] if call.output_uncond is None else [call.output_uncond, call.output_cond]
    output, scale = torch.cat(halves), run.scale

    def history(chosen: Sequence[int], count: int) -> Tensor:
        return traced([seats[row].flight for row in chosen], count).to(sample.device)

    def ask_neighbours(chosen: Sequence[int], captions: Sequence[str]) -> Tensor:
        at = torch.tensor(chosen, device=sample.device)
        return neighbours(seats[0].step, sample[at] * scale, chosen, captions).to(output.dtype)

    def ask_gradient(chosen: Sequence[int], x0_grad: Tensor) -> Tensor:
        raise ValueError('`gradient="full"` needs the network: use `amg.Sampler` or `amg.protect`')

    if len(halves) not in run.rows:
        run.rows[len(halves)] = rows_of(batch, len(halves)).to(sample.device)
    coefficients = run.way.plan.coefficients[run.row].expand(batch, len(COLUMN)).contiguous()
    wide = sample.float().contiguous()
    asks = (history, ask_neighbours, ask_gradient)
    return Frame(seats, wide, output, run.rows[len(halves)], coefficients, None, *asks)


def rows_of(batch: int, halves: int) -> Tensor:
    """Where each sample's halves are, int32 [4, B]."""
    rows = torch.full((4, batch), -1, dtype=torch.int32, device="cpu")
    rows[1] = torch.arange(batch, dtype=torch.int32, device="cpu") + (halves - 1) * batch
    if halves == 2:
        rows[0] = torch.arange(batch, dtype=torch.int32, device="cpu")
    return rows


def look(frame: Frame, tools: Tools) -> tuple[Terms | None, dict[int, Note]]:
    """What acts in this step, and what was found of those who were due."""
    if not any(looks(seat, tools.gate) for seat in frame.seats):
        return None, {}
    found = measure(frame, tools)
    if found.broken:
        guidance.require_finite("output", frame.output)
        raise FloatingPointError(f"`similarity` must be finite, got NaN or infinity in rows {found.broken}")
    return found.terms, found.notes


def noise_of(run: Run, call: Call) -> Tensor | None:
    """What the scheduler's own step would draw, in its dtype and from the same generator."""
    table, sample = run.way.plan.table, call.sample
    if not table.draws[run.row]:
        return None
    noise = call.noise
    if noise is None:
        dtype = table.noise_dtype or call.output_cond.dtype
        noise = standard_normal(sample.shape, call.generator, sample.device, dtype)
    return noise.to(sample.device, torch.float32)


def record(seats: Sequence[Seat], notes: Mapping[int, Note], signals: Tensor) -> None:
    """Append this step to every sample's trace, with the free signals of those that were looked at."""
    values = read_signals(signals[:, :3], notes) if notes else []
    for row, seat in enumerate(seats):
        if not seat.config.active:
            continue
        note, step = notes.get(row, Note()), seat.step
        place = (step.position, float(step.t), note.similarity, step.threshold, note.row)
        kept = values[row] if row in notes else None
        seat.flight.trace.append(TraceStep(*place, tuple(note.terms), kept, note.estimated))


def told(form: Form, clip: float | None, after: Tensor, x0_hat: Tensor | None) -> Any:
    """The scheduler's own output."""
    values = {"prev_sample": after}
    if x0_hat is not None:
        values["pred_original_sample"] = (x0_hat if clip is None else x0_hat.clamp(-clip, clip)).to(
            after.dtype
        )
    return tuple(values.values()) if form.kind is None else form.kind(**values)

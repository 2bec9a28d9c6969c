"""One step of somebody's own loop in one call of the kernel: guidance and the scheduler's update together."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import amg.kernels as kernels
from amg.config import AMGConfig
from amg.engine.frame import Frame, Seat, Terms
from amg.engine.look import Tools
from amg.engine.measure import looks, measure
from amg.engine.noise import standard_normal
from amg.engine.plan import Plan, planned
from amg.engine.table import Refused, Tables, setting
from amg.guidance.flight import Flight
from amg.guidance.note import Note
from amg.guidance.read import read
from amg.verdict import TraceStep

NOT_OF_THE_TABLE = ("generator", "return_dict", "variance_noise")


class Made(typing.NamedTuple):
    """x_{t-1} and x0_hat, clipped where the scheduler clips it, both [B, ...] float32."""

    prev_sample: Tensor
    x0_hat: Tensor


@dataclass
class Fused:
    """A batch on its way through a scheduler's table: its history [S, B, ...], and the row it makes next."""

    plan: Plan
    arguments: dict[str, Any]
    state: Tensor
    row: int = 0

    @staticmethod
    def begun(
        scheduler: Any, start: int, arguments: Mapping[str, Any], config: AMGConfig, sample: Tensor
    ) -> Fused | None:
        """The batch at its first step, number `start` of the schedule; None where the scheduler has no table
        or its samples are float64, which its own step is for."""
        of_table = {name: value for name, value in arguments.items() if name not in NOT_OF_THE_TABLE}
        if sample.dtype == torch.float64:
            return None
        try:
            table = Tables().table(setting(scheduler, {}, of_table), start)
        except Refused:
            return None
        plan = planned(table, config, config.guidance_scale, None, sample.device)
        state = sample.new_zeros(table.states, *sample.shape, dtype=torch.float32)
        return Fused(plan, of_table, state)

    def scaled(self, sample: Tensor) -> Tensor:
        """The network's input at the step that is made next."""
        row = min(self.row, len(self.plan.steps) - 1)
        return sample * float(self.plan.table.input_scale[row])

    def step(
        self,
        outputs: Sequence[Tensor],
        sample: Tensor,
        arguments: Mapping[str, Any],
        flights: Sequence[Flight],
        tools: Tools,
        ask_neighbours: Callable[[Sequence[int], Sequence[str]], Tensor],
    ) -> Made:
        """Guide and make one step. outputs: the unconditional half, if any, and the conditional one."""
        frame = self._frame(outputs, sample, flights, ask_neighbours)
        terms, notes = Terms(None, frame.coefficients, frame.rows), dict[int, Note]()
        for seat in frame.seats:
            seat.flight.evaluations += seat.cost
        if any(looks(seat, None) for seat in frame.seats):
            found = measure(frame, tools)
            if found.broken:
                raise FloatingPointError(
                    f"`similarity` must be finite, got NaN or infinity in rows {found.broken}"
                )
            terms, notes = found.terms or terms, found.notes
        made = self._update(frame, terms, self._noise(outputs[-1], sample, arguments))
        _record(frame, notes)
        self.row += 1
        return made

    def _frame(
        self,
        outputs: Sequence[Tensor],
        sample: Tensor,
        flights: Sequence[Flight],
        ask_neighbours: Callable[[Sequence[int], Sequence[str]], Tensor],
    ) -> Frame:
        plan, batch = self.plan, len(sample)
        step, each = plan.steps[self.row], len(outputs)
        costs = (plan.total * each, (len(plan.steps) - self.row - 1) * each)
        seats = [Seat(one, plan.config, step, plan.scale, False, each == 2, *costs) for one in flights]
        rows = torch.full((4, batch), -1, dtype=torch.int32, device="cpu")
        for half in range(each):
            first = half * batch
            numbers = torch.arange(first, first + batch, dtype=torch.int32, device="cpu")
            rows[half + 2 - each] = numbers

        def ask_gradient(chosen: Sequence[int], x0_grad: Tensor) -> Tensor:
            raise ValueError('`gradient="full"` needs the network: use `amg.Sampler` or `amg.protect`')

        def history(chosen: Sequence[int], count: int) -> Tensor:
            return sample.new_zeros(
                len(chosen), count, 4
            )  # read by calibrations, which a scheduler has none of

        coefficients = plan.coefficients[self.row].expand(batch, -1).contiguous()
        output = torch.cat([one.to(outputs[-1].dtype) for one in outputs])
        asks = (history, ask_neighbours, ask_gradient)
        wide = sample.float().contiguous()
        return Frame(seats, wide, output, rows.to(sample.device), coefficients, None, *asks)

    def _noise(self, output: Tensor, sample: Tensor, arguments: Mapping[str, Any]) -> Tensor | None:
        table = self.plan.table
        if not table.draws[self.row]:
            return None
        given: Tensor | None = arguments.get("variance_noise")
        if given is None:
            dtype = table.noise_dtype or output.dtype
            given = standard_normal(sample.shape, arguments.get("generator"), sample.device, dtype)
        return given.float()

    def _update(self, frame: Frame, terms: Terms, noise: Tensor | None) -> Made:
        made = Made(torch.empty_like(frame.sample), torch.empty_like(frame.sample))
        kernels.guided_step_into(
            frame.sample,
            frame.output,
            frame.output,
            terms.eps_neighbour,
            terms.gradient,
            similarity=terms.similarity,
            noise=noise,
            coefficients=terms.coefficients,
            rows=terms.rows,
            state=self.state,
            prev_sample=made.prev_sample,
            x0_hat=made.x0_hat,
        )
        clip = self.plan.table.clip
        return made if clip is None else made._replace(x0_hat=made.x0_hat.clamp(-clip, clip))


def _record(frame: Frame, notes: Mapping[int, Note]) -> None:
    """Append this step to every sample's trace."""
    acted = [note.acted for note in notes.values() if note.acted is not None]
    fired = iter(read(torch.stack(acted))) if acted else iter(())
    for row, seat in enumerate(frame.seats):
        note, step = notes.get(row, Note()), seat.step
        terms = [*note.terms]
        if note.acted is not None and next(fired)[0]:
            terms.append("dissimilarity")
        place = (step.position, step.t, note.similarity, step.threshold, note.row)
        seat.flight.trace.append(TraceStep(*place, tuple(terms)))


def output_class(scheduler: Any) -> Any:
    """What the scheduler's own `step` returns: a class with `prev_sample`."""
    hints = typing.get_type_hints(type(scheduler).step).get("return")
    kinds = [kind for kind in (hints, *typing.get_args(hints)) if inspect.isclass(kind)]
    own = [kind for kind in kinds if "prev_sample" in getattr(kind, "__annotations__", {})]
    if own:
        return own[0]
    from diffusers.schedulers.scheduling_utils import SchedulerOutput

    return SchedulerOutput


def as_its_own(scheduler: Any, made: Made, dtype: torch.dtype, return_dict: bool) -> Any:
    """What a step made in the form of the scheduler's own output."""
    prev_sample, x0_hat = made.prev_sample.to(dtype), made.x0_hat.to(dtype)
    kind = output_class(scheduler)
    has = "pred_original_sample" in getattr(kind, "__annotations__", {})
    if not return_dict:
        return (prev_sample, x0_hat) if has else (prev_sample,)
    return kind(prev_sample, x0_hat) if has else kind(prev_sample)


def first_step(scheduler: Any, timestep: Any) -> int:
    """The step of the schedule that a loop starts at: `begin_index`, or the first at `timestep`. ValueError
    naming it where there is none."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return int(begin)
    timesteps = torch.as_tensor(scheduler.timesteps).tolist()
    if float(timestep) not in timesteps:
        raise ValueError(f"`timestep` must be one of the schedule's {len(timesteps)}, got {float(timestep)}")
    return int(timesteps.index(float(timestep)))

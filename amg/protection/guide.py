"""Guidance for a loop that is not ours: one step of a batch, from the two halves to the guided output.

The stages are the engine's (`amg.engine.measure`, `amg.engine.correct`); the scheduler's step stays the
loop's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.embed.precision import carried_back, recorded
from amg.engine.frame import COLUMN, Frame, Seat, Terms, apply, predict
from amg.engine.level import Level
from amg.engine.look import Tools
from amg.engine.measure import looks, measure
from amg.engine.plan import lambda_of
from amg.guidance import terms as guidance
from amg.guidance.flight import Flight
from amg.guidance.gate import Gate
from amg.guidance.note import Note
from amg.guidance.ordinary import Ordinary
from amg.guidance.predict import Conditions, Denoiser, predict_guided, predict_neighbours
from amg.guidance.read import read_all
from amg.guidance.schedule import LEAST_ALPHA_BAR, Step
from amg.similarity import Judge, Similarity
from amg.similarity.student import Screen
from amg.verdict import TraceStep


class Guided(NamedTuple):
    """`output` [B, C, H, W], guided, in the denoiser's own parameterisation; `changed` [B] bool, rows that
    differ from plain classifier-free guidance."""

    output: Tensor
    changed: Tensor


@dataclass(frozen=True)
class Guide:
    """Anti-memorization guidance over one index; stateless, what happens to a sample is kept in its
    `Flight`."""

    config: AMGConfig
    index: Any
    similarity: Similarity
    denoiser: Denoiser
    guidance_scale: float
    guidance_rescale: float = 0.0
    judges: tuple[Judge, ...] = ()
    gate: Gate | None = None
    screen: Screen | None = None
    ordinary: Ordinary = field(default_factory=Ordinary)

    @property
    def tools(self) -> Tools:
        """What samples are held to, and what measures them."""
        parts = (self.judges, self.gate, self.screen, self.ordinary)
        return Tools(self.index, self.similarity, self.denoiser, *parts)

    def at(self, scheduler: Any, levels: Sequence[Level], index: int) -> Step:
        """The step's place and numbers, out of the scheduler's current timesteps and their `levels`."""
        t, alpha_bar = scheduler.timesteps[index], max(levels[index].alpha_bar, LEAST_ALPHA_BAR)
        threshold = lambda_of(self.config, alpha_bar, float(t))
        return Step(index, len(scheduler.timesteps), t, alpha_bar, threshold, levels[index])

    def __call__(
        self,
        step: Step,
        sample: Tensor,
        output_uncond: Tensor | None,
        output_cond: Tensor,
        conditions: Conditions,
        flights: Sequence[Flight],
    ) -> Guided:
        """Guide one step. `sample` is the denoiser's (variance preserving) input; outputs are raw, [B, C, H,
        W]. Errors: FloatingPointError naming the rows that are not finite."""
        seats = [self._seat(step, flight, output_uncond is not None) for flight in flights]
        for seat in seats:
            seat.flight.evaluations += seat.cost
        output = self._classifier_free(output_uncond, output_cond, seats)
        guidance.require_finite("output", output)  # images drop NaN silently when they become bytes
        low = torch.tensor([seat.low for seat in seats], device=output.device)
        if not self.config.active:
            return Guided(output, low)
        frame = frame_of(self, step, sample, output_uncond, output_cond, conditions, seats)
        found, terms = dict[int, Note](), None
        if any(looks(seat, self.gate) for seat in seats):
            terms, found, broken = measure(frame, self.tools)
            if broken:
                raise FloatingPointError(f"`similarity` must be finite, got NaN or infinity in rows {broken}")
        self._record(frame, found)
        if terms is None:
            return Guided(output, low)
        guided = guided_output(frame, terms).to(output.dtype)
        assert terms.similarity is not None
        acting = (terms.similarity > 0).to(output.device) & (guided != output).flatten(1).any(1)
        return Guided(torch.where(_spread(acting, output), guided, output), low | acting)

    def _seat(self, step: Step, flight: Flight, guided: bool) -> Seat:
        each = 2 if guided else 1
        later = self.config.rewind_guidance is not None and guided
        low = later and step.position < flight.despecified_until
        rest = (step.total - step.position - 1) * each
        return Seat(flight, self.config, step, self.guidance_scale, low, guided, step.total * each, rest)

    def scale_of(self, seat: Seat) -> float:
        """The classifier-free guidance scale of a sample at this step."""
        flight, scale = seat.flight, self.guidance_scale
        return self.config.scale_of_try(flight.rewinds, flight.retries, scale) if seat.low else scale

    def _classifier_free(
        self, output_uncond: Tensor | None, output_cond: Tensor, seats: Sequence[Seat]
    ) -> Tensor:
        """Plain guidance in the pipelines' own operations, except that a later try of a rewound sample starts
        with a lower scale, see `rewind_guidance`."""
        if output_uncond is None:
            return output_cond
        output = guidance.classifier_free(output_uncond, output_cond, self.guidance_scale)
        if self.guidance_rescale > 0:
            output = guidance.rescale(output, output_cond, self.guidance_rescale)
        for row, seat in enumerate(seats):
            if seat.low:
                halves = (output_uncond[row], output_cond[row])
                output[row] = guidance.classifier_free(*halves, self.scale_of(seat))
        return output

    def output_scale(
        self, output_uncond: Tensor | None, output_cond: Tensor, seats: Sequence[Seat]
    ) -> Tensor | None:
        """What `guidance_rescale` multiplies each sample's guided output with, [B]; None: nothing."""
        if output_uncond is None or self.guidance_rescale == 0:
            return None
        plain = guidance.classifier_free(output_uncond.float(), output_cond.float(), self.guidance_scale)
        ratio = output_cond.float().flatten(1).std(1) / plain.flatten(1).std(1)
        low = torch.tensor([seat.low for seat in seats], device=ratio.device)
        scale = self.guidance_rescale * ratio + (1 - self.guidance_rescale)
        return torch.where(low, 1.0, scale)

    def slope(
        self, step: Step, sample: Tensor, coefficients: Tensor, conditions: Conditions, x0_grad: Tensor
    ) -> Tensor:
        """grad_{x_t} sigma through the denoiser."""
        shape = (-1, *[1] * (sample.ndim - 1))
        a, b, s0 = (coefficients[:, COLUMN[name]].view(shape) for name in ("a", "b", "s0"))

        def x0_hat_of(leaf: Tensor) -> Tensor:
            output = predict_guided(self.denoiser, leaf, step.t, conditions, s0.to(leaf.dtype))
            return a * leaf + b * output.to(a.dtype)

        leaf, x0_hat = recorded(x0_hat_of, sample)
        return carried_back(x0_hat, leaf, x0_grad).float()

    def _record(self, frame: Frame, found: dict[int, Note]) -> None:
        """Append this step to every sample's trace, with its free signals where a gate keeps them or it was
        looked at."""
        signals: list[tuple[float, ...]] = []
        if self.gate is not None or found:
            signals = read_signals(predict(frame).signals, found)
        t = float(frame.seats[0].step.t)  # once: on a GPU it is read from there
        for row, seat in enumerate(frame.seats):
            note, step = found.get(row, Note()), seat.step
            terms = [*(["despecification"] if seat.low else []), *note.terms]
            place = (step.position, t, note.similarity, step.threshold, note.row)
            kept = signals[row] if signals and (self.gate is not None or row in found) else None
            seat.flight.trace.append(TraceStep(*place, tuple(terms), kept, note.estimated))


def frame_of(
    guide: Guide,
    step: Step,
    sample: Tensor,
    output_uncond: Tensor | None,
    output_cond: Tensor,
    conditions: Conditions,
    seats: Sequence[Seat],
) -> Frame:
    """The frame of one step of another's loop, out of what `Guide` is called with."""
    batch, device, denoiser = len(sample), sample.device, guide.denoiser
    halves = output_cond if output_uncond is None else torch.cat([output_uncond, output_cond])
    rows = torch.full((4, batch), -1, dtype=torch.int32, device="cpu")
    rows[1] = torch.arange(len(halves) - batch, len(halves), dtype=torch.int32, device="cpu")
    if output_uncond is not None:
        rows[0] = torch.arange(batch, dtype=torch.int32, device="cpu")
    wide = sample.to(torch.promote_types(sample.dtype, torch.float32))
    scales = [guide.scale_of(seat) for seat in seats]
    coefficients = eps_rows(level_seen(step, denoiser.prediction_type), scales).to(device, wide.dtype)

    def history(chosen: Sequence[int], count: int) -> Tensor:
        return traced([seats[row].flight for row in chosen], count).to(device)

    def ask_neighbours(chosen: Sequence[int], captions: Sequence[str]) -> Tensor:
        at = torch.tensor(chosen, device=device)
        found = predict_neighbours(denoiser, sample[at], step.t, conditions.take(at), captions)
        return found.to(halves.dtype)

    def ask_gradient(chosen: Sequence[int], x0_grad: Tensor) -> Tensor:
        at = torch.tensor(chosen, device=device)
        return guide.slope(step, sample[at], coefficients[at], conditions.take(at), x0_grad)

    scale = guide.output_scale(output_uncond, output_cond, seats)
    asks = (history, ask_neighbours, ask_gradient)
    return Frame(seats, wide.contiguous(), halves, rows.to(device), coefficients, scale, *asks)


def level_seen(step: Step, kind: str) -> Level:
    """The level of the network's input: of flow matching that of x_t, else variance preserving."""
    if step.level is not None and step.level.kind == "flow":
        return step.level
    return Level(kind, 1.0, step.alpha_bar**0.5, (1 - step.alpha_bar) ** 0.5)


def eps_rows(level: Level, scales: Sequence[float]) -> Tensor:
    """Coefficients float64 [B, 42] for `amg.kernels.guided_step` of an x_t at `level` whose "prev_sample" is
    the guided output: k_eps = 1 and nothing else of x_t; all gates closed."""
    a, b = level.x0_hat
    row = {
        "k_eps": 1.0,
        "sqrt_one_minus_alpha_bar": level.sigma / level.size,
        "inv_sqrt_alpha_bar": level.size / max(level.alpha, LEAST_ALPHA_BAR**0.5),
        "a": a,
        "b": b,
        "clip": float("inf"),
        "e_sample": 0.0 if level.kind == "epsilon" else (1 - level.alpha * a) / level.sigma,
        "e_output": -level.alpha * b / level.sigma if level.alpha > 0 else 1.0,
        "scale": 1.0,
        "next_scale": 1.0,
    }
    rows = torch.zeros(len(scales), len(COLUMN), dtype=torch.float64, device="cpu")
    for name, value in row.items():
        rows[:, COLUMN[name]] = value
    rows[:, COLUMN["s0"]] = torch.tensor(scales, dtype=torch.float64, device="cpu")
    return rows


def guided_output(frame: Frame, terms: Terms) -> Tensor:
    """The guided output [B, ...] in the denoiser's own parameterisation."""
    output = torch.empty_like(frame.sample)
    signals = output.new_empty(len(output), 4)
    apply(frame, terms, prev_sample=output, signals=signals)
    return output


def read_signals(signals: Tensor, notes: Mapping[int, Note]) -> list[tuple[float, ...]]:
    """The free signals [B, 3] on the host; in the same read it is written into the notes which dissimilarity
    terms acted."""
    waiting = [note for note in notes.values() if note.acted is not None]
    flat, *acted = read_all(signals, *(note.acted for note in waiting if note.acted is not None))
    for note, (value,) in zip(waiting, acted, strict=True):
        if value:
            note.terms.append("dissimilarity")
    width = signals.shape[1]
    return [tuple(flat[width * row : width * (row + 1)]) for row in range(len(signals))]


def traced(flights: Sequence[Flight], count: int) -> Tensor:
    """The free signals of the first `count` steps, float64 [N, count, 4]."""
    rows = [
        [(*(step.signals or ()), 0.0, 0.0, 0.0, 0.0)[:4] for step in one.trace[:count]] for one in flights
    ]
    return torch.tensor(rows, dtype=torch.float64, device="cpu").view(len(flights), count, 4)


def note_moves(flights: Sequence[Flight], before: Tensor, sample: Tensor, position: int) -> None:
    """At step `position`, before it is guided: tell the step before how far each first try moved.

    before, sample: the denoiser's (variance preserving) inputs at the two steps, [B, C, H, W]. The trace's
    last step gains its fourth signal, ‖x_{t−1} − x_t‖²; later tries, which no calibration is asked about,
    keep three.
    """
    rows = [row for row, flight in enumerate(flights) if not (flight.rewinds or flight.retries)]
    rows = [row for row in rows if flights[row].trace and flights[row].trace[-1].step == position - 1]
    if not rows:
        return
    moved = (sample.float() - before.float()).flatten(1).square().sum(1).tolist()
    for row in rows:
        last = flights[row].trace[-1]
        assert last.signals is not None
        flights[row].trace[-1] = replace(last, signals=(*last.signals[:3], moved[row]))


def _spread(truths: Tensor, like: Tensor) -> Tensor:
    return truths.view(-1, *[1] * (like.ndim - 1))

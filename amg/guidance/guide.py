"""One step of guidance for a batch: measure, decide per sample, correct the noise prediction of the open
rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import amg.kernels as kernels
from amg.config import AMGConfig
from amg.embed.precision import carried_back, recorded
from amg.engine.level import Level
from amg.guidance import terms as guidance
from amg.guidance.checkpoint import (
    affords,
    give_up,
    guarded,
    hears_alarms,
    is_checkpoint,
    screens,
    send_back,
    too_close,
)
from amg.guidance.flight import Flight
from amg.guidance.gate import Gate, rows_to_check
from amg.guidance.ordinary import deduplicated
from amg.guidance.predict import Conditions, Denoiser, predict_guided, predict_neighbours
from amg.guidance.schedule import LEAST_ALPHA_BAR, Prediction, Step, eps_coefficients, threshold_at
from amg.guidance.signals import note_moves
from amg.similarity import Judge, Measured, Similarity
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

    def at(self, scheduler: Any, levels: Sequence[Level], index: int) -> Step:
        """The step's place and numbers, out of the scheduler's current timesteps and their `levels`."""
        cfg, t = self.config, scheduler.timesteps[index]
        alpha_bar = max(levels[index].alpha_bar, LEAST_ALPHA_BAR)
        assert cfg.lambda_min is not None and cfg.lambda_max is not None, (
            "config must be resolved by `for_metric`"
        )
        limits, decay = (cfg.lambda_min, cfg.lambda_max), cfg.threshold_decay or 0.005
        threshold = threshold_at(cfg.threshold_schedule, *limits, alpha_bar, float(t), decay)
        return Step(index, len(scheduler.timesteps), t, alpha_bar, threshold)

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
        W]."""
        return _Step(self, step, sample, output_uncond, output_cond, conditions, flights).run()


class _Step:
    """The tensors of one step, so that its stages need not pass them along."""

    def __init__(
        self,
        guide: Guide,
        step: Step,
        sample: Tensor,
        output_uncond: Tensor | None,
        output_cond: Tensor,
        conditions: Conditions,
        flights: Sequence[Flight],
    ):
        self.guide, self.config, self.step, self.flights = guide, guide.config, step, flights
        self.sample, self.conditions = sample, conditions
        self.prediction = Prediction(guide.denoiser.prediction_type, step.alpha_bar)
        self.output_uncond, self.output_cond = output_uncond, output_cond
        self.terms: list[list[str]] = [[] for _ in flights]
        self.signals: dict[int, tuple[float, ...]] = {}  # the free signals of the rows checked, or of all
        self.predicted: Tensor | None = None  # x0_hat of every row, where a gate wants every row's signals
        self.alarmed: set[int] = set()  # rows whose free signals say copy
        self.estimated: set[int] = set()  # rows that the student measured and the teacher did not
        self.measured: dict[int, tuple[float, int]] = {}  # similarity and nearest row of the rows checked

    def run(self) -> Guided:
        output, changed = self.classifier_free()
        for flight in self.flights:
            flight.evaluations += self.cost
        guidance.require_finite("output", output)  # images drop NaN silently when they become bytes
        if not self.config.active:
            return Guided(output, changed)
        guide, gate, step = self.guide, self.guide.gate, self.step
        if gate is not None:
            note_moves(self.flights, self.sample, step.position)
            self.predicted = self.predict_x0(torch.arange(len(self.flights), device=output.device))
        checked = rows_to_check(self.config, step.position, step.total, self.flights, gate, self.signals)
        if gate is not None and hears_alarms(self.config, step.position, step.total):
            self.alarmed = gate.alarmed(step.position, self.flights, self.signals)
        if checked and guide.screen is not None and self.limit > -math.inf:
            checked = self.near(guide.screen, checked, output)
        checked = sorted({*checked, *self.alarmed})
        if checked:
            output = self.guide_rows(torch.tensor(checked, device=output.device), output, changed)
        self.record()
        return Guided(output, changed)

    def guide_rows(self, rows: Tensor, output: Tensor, changed: Tensor) -> Tensor:
        """Measure `rows` [R] and correct the open ones: the new output; they are marked in `changed`."""
        sample = self.sample[rows]
        eps = self.prediction.to_eps(output[rows], sample)
        x0_hat = self.x0_hat(rows, eps)
        measured = self.guide.similarity.measure(x0_hat)
        opened = self.opened(measured) & ~self.sent_back(rows, x0_hat, measured)
        acting = opened | (self.ungated(rows, measured) if self.config.form == "released" else False)
        if bool(acting.any()):
            at = acting.nonzero().flatten()
            corrected = self.correct(rows[at], eps[at], x0_hat[at], measured.take(at), opened[at])
            # a row that no term moved keeps its very bits, whatever the parameterisation
            moved = (corrected != eps[at].float()).flatten(1).any(1)
            where, output = rows[at[moved]], output.clone()
            output[where] = self.prediction.from_eps(corrected[moved], self.sample[where]).to(output.dtype)
            changed[where] = True
        self.note(rows, measured, opened)
        return output

    @property
    def limit(self) -> float:
        """The similarity up to which nothing happens to a sample at this step, whatever it is."""
        if not screens(self.config):
            return -math.inf
        if not is_checkpoint(self.config, self.step.position, self.step.total):
            return self.step.threshold
        assert self.config.rewind_threshold is not None
        return min(self.step.threshold, self.config.rewind_threshold)

    def near(self, screen: Screen, checked: Sequence[int], output: Tensor) -> list[int]:
        """Those of the `checked` rows that the student cannot tell to be ordinary."""
        checkpoint = is_checkpoint(self.config, self.step.position, self.step.total)
        if self.guide.judges and checkpoint:
            return list(checked)  # the student speaks for one index only
        rows = torch.tensor(checked, device=output.device)
        eps = self.prediction.to_eps(output[rows], self.sample[rows])
        count = len(checked)
        found = screen(self.x0_hat(rows, eps), [self.step.alpha_bar] * count, [self.limit] * count)
        near = found.near
        if checkpoint:
            near = near | guarded(self.config, self.guide.index, found.measured)[0]
        measured = found.measured.take(~near)
        self.note(rows[~near], measured, torch.zeros_like(measured.similarity, dtype=torch.bool))
        self.estimated.update(rows[~near].tolist())
        return rows[near].tolist()

    def classifier_free(self) -> tuple[Tensor, Tensor]:
        """Plain guidance, except that a later try of a rewound sample starts with a lower scale, see
        `rewind_guidance`."""
        changed = torch.zeros(len(self.flights), dtype=torch.bool, device=self.output_cond.device)
        if self.output_uncond is None:
            return self.output_cond, changed
        output = guidance.classifier_free(self.output_uncond, self.output_cond, self.guide.guidance_scale)
        if self.guide.guidance_rescale > 0:
            output = guidance.rescale(output, self.output_cond, self.guide.guidance_rescale)
        for row, flight in enumerate(self.flights):
            if self.despecified(flight):
                halves = (self.output_uncond[row], self.output_cond[row])
                output[row] = guidance.classifier_free(*halves, self.scale_of(flight))
                changed[row] = True
                self.terms[row].append("despecification")
        return output, changed

    @property
    def cost(self) -> int:
        """Network evaluations of one sample at a step."""
        return 1 if self.output_uncond is None else 2

    @property
    def rest(self) -> int:
        """Network evaluations of one sample in the steps that follow."""
        return (self.step.total - self.step.position - 1) * self.cost

    def affords(self, rows: Tensor, needed: int) -> Tensor:
        """[R] bool: the samples that stay within `max_evaluations` with `needed` more of them."""
        plain = self.step.total * self.cost
        fits = [affords(self.config, self.flights[row], needed, plain) for row in rows.tolist()]
        return torch.tensor(fits, device=rows.device)

    @property
    def plainly_guided(self) -> bool:
        """Whether the output is classifier-free guidance of two halves and nothing more."""
        return self.output_uncond is not None and self.guide.guidance_rescale == 0

    def halves(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, eps_uncond (eps_cond where there is none) and eps_cond of `rows`, float32 or wider."""
        uncond = self.output_cond if self.output_uncond is None else self.output_uncond
        sample, *parts = self.sample, uncond, self.output_cond
        if len(rows) < len(self.flights):  # else they are all, in order
            sample, *parts = (tensor[rows] for tensor in (sample, *parts))
        wide = torch.promote_types(sample.dtype, torch.float32)
        eps_uncond, eps_cond = (self.prediction.to_eps(part, sample).to(wide) for part in parts)
        return sample.to(wide), eps_uncond, eps_cond

    def coefficients(self, rows: Tensor, s1: Tensor | None = None, s2: Tensor | None = None) -> Tensor:
        """`eps_coefficients` of `rows` at this step, [R, 10]."""
        scales = [self.scale_of(self.flights[row]) for row in rows.tolist()]
        s0 = torch.tensor(scales, dtype=torch.float32, device=self.output_cond.device)
        return eps_coefficients(self.step.alpha_bar, s0, s1, s2)

    def x0_hat(self, rows: Tensor, eps: Tensor) -> Tensor:
        """x0_hat of the guided noise prediction `eps` of `rows`."""
        if not self.plainly_guided:
            return self.prediction.x0_hat(eps.float(), self.sample[rows].float())
        return self.predict_x0(rows) if self.predicted is None else self.predicted[rows]

    def predict_x0(self, rows: Tensor) -> Tensor:
        """x0_hat of plain classifier-free guidance of `rows`; keeps their free signals."""
        found = kernels.predict_x0(*self.halves(rows), coefficients=self.coefficients(rows))
        for row, signals in zip(rows.tolist(), found.signals.tolist(), strict=True):
            self.signals[row] = tuple(signals)
        return found.x0_hat

    def scale_of(self, flight: Flight) -> float:
        """The classifier-free guidance scale of a sample at this step."""
        scale = self.guide.guidance_scale
        if not self.despecified(flight):
            return scale
        return self.config.scale_of_try(flight.rewinds, flight.retries, scale)

    def despecified(self, flight: Flight) -> bool:
        """Whether a sample is in a later try that starts with a lower guidance scale."""
        return self.config.rewind_guidance is not None and self.step.position < flight.despecified_until

    def opened(self, measured: Measured) -> Tensor:
        """[B] bool, the rows on which the terms act: sigma > lambda_t, from `terms_from` on."""
        opened = guidance.open_gates(measured.similarity, self.step.threshold) | (not self.config.gated)
        return opened & (self.step.position >= (self.config.terms_from or 0.0) * (self.step.total - 1))

    def ungated(self, rows: Tensor, measured: Measured) -> Tensor:
        """Rows on which the released form acts below lambda_t: despecification whenever sigma > 0, held
        captions."""
        until = [self.flights[row].deduplicated_until for row in rows.tolist()]
        held = torch.tensor([self.step.position < last for last in until])
        return (measured.similarity > 0) | held.to(measured.similarity.device)

    def correct(
        self, rows: Tensor, eps: Tensor, x0_hat: Tensor, measured: Measured, opened: Tensor
    ) -> Tensor:
        """The noise prediction of the open `rows` with the three terms added."""
        eps = eps.float()
        if self.output_uncond is not None:
            before = eps
            eps = self.despecify_and_deduplicate(rows, eps, measured, opened)
            if eps is not before and (self.config.step_length == "exact" or self.config.form == "released"):
                x0_hat = self.prediction.x0_hat(eps, self.sample[rows].float())
                measured = self.guide.similarity.measure_with_gradient(x0_hat)
                opened = self.opened(measured)
        if self.config.gradient == "full":
            opened = opened & self.affords(rows, self.rest + self.cost).to(opened.device)
        if not self.config.c3 or not bool(opened.any()):
            return eps
        inner = opened.nonzero().flatten()
        for row in rows[inner].tolist():
            self.terms[row].append("dissimilarity")
        eps, change = eps.clone(), self.dissimilarity(rows[inner], x0_hat[inner], measured.take(inner))
        guidance.require_finite("similarity_grad", change)
        eps[inner] += change
        return eps

    def despecify_and_deduplicate(
        self, rows: Tensor, eps: Tensor, measured: Measured, opened: Tensor
    ) -> Tensor:
        assert self.output_uncond is not None
        s1, s2 = self.strengths(rows, measured, opened)
        repeated = [self.guide.index.captions[row] for row in measured.row.tolist()]
        texts = self.guide.denoiser.encode_captions is not None
        told = torch.tensor([texts and caption is not None for caption in repeated], device=s2.device)
        s2 = torch.where(told & self.affords(rows, self.rest + 1).to(s2.device), s2, 0.0)
        acting = (s1 > 0) | (s2 > 0)
        if not bool(acting.any()):
            return eps
        for row in rows[s1 > 0].tolist():
            self.terms[row].append("despecification")
        fused = kernels.guided_step(
            *self.halves(rows),
            self.eps_neighbour(rows, s2, repeated),
            similarity=torch.ones_like(s1),
            coefficients=self.coefficients(rows, s1, s2),
        )
        if not self.plainly_guided:  # the rescaled output differs from plain guidance by what the terms keep
            plain = kernels.guided_step(*self.halves(rows), coefficients=self.coefficients(rows))
            return eps + (fused.prev_sample - plain.prev_sample)
        return torch.where(guidance.per_sample(acting, eps).bool(), fused.prev_sample, eps)

    def eps_neighbour(self, rows: Tensor, s2: Tensor, captions: Sequence[str | None]) -> Tensor | None:
        """eps(x_t, y_N) of the `rows` with s2 > 0, zeros elsewhere; None where there are none."""
        act = s2 > 0
        if not bool(act.any()):
            return None
        chosen, denoiser = rows[act], self.guide.denoiser
        said = [str(captions[at]) for at in act.nonzero().flatten().tolist()]  # s2 > 0 only where one is told
        conditions = self.conditions.take(chosen)
        output = predict_neighbours(denoiser, self.sample[chosen], self.step.t, conditions, said)
        eps = self.prediction.to_eps(output, self.sample[chosen])
        everywhere = eps.new_zeros(len(rows), *eps.shape[1:])
        everywhere[act] = eps
        for row in chosen.tolist():
            self.flights[row].evaluations += 1
            self.terms[row].append("deduplication")
        return everywhere

    def strengths(self, rows: Tensor, measured: Measured, opened: Tensor) -> tuple[Tensor, Tensor]:
        """s1 and s2 of the open rows; a row already despecified by its later try keeps s1 = s2 = 0."""
        cfg, scale = self.config, self.guide.guidance_scale
        assert cfg.c1 is not None and cfg.c2 is not None and cfg.c3 is not None
        if cfg.form == "released":
            s1, s2, _ = guidance.released_scales(
                measured.similarity, scale, cfg.c1, cfg.c2, cfg.c3, float(self.step.t)
            )
            flights = [self.flights[row] for row in rows.tolist()]
            held = deduplicated(self.guide.index, flights, measured.row, opened, self.step.position)
            return s1, torch.where(held.to(s2.device), s2, 0.0)
        s1, s2, _ = guidance.scales(measured.similarity, scale, cfg.c1, cfg.c2, cfg.c3)
        low = torch.tensor([self.despecified(self.flights[row]) for row in rows.tolist()], device=s1.device)
        return torch.where(low, 0.0, s1), torch.where(low, 0.0, s2)

    def dissimilarity(self, rows: Tensor, x0_hat: Tensor, measured: Measured) -> Tensor:
        """G_sim of the open rows: exact length, or s3·sqrt(1 - alpha_bar)·grad_{x_t} sigma."""
        cfg, alpha_bar = self.config, self.step.alpha_bar
        if cfg.step_length == "exact" and cfg.gradient == "frozen":
            shift = self.guide.similarity.shift(x0_hat, measured, self.step.threshold)
            return guidance.exact_dissimilarity(shift, alpha_bar)
        x0_grad = self.guide.similarity.gradient(x0_hat, measured)
        gradient = guidance.frozen_gradient(x0_grad, alpha_bar)
        if cfg.gradient == "full":
            gradient = self.full_gradient(rows, x0_grad)
        if cfg.step_length == "exact":
            x0_gradient = gradient * alpha_bar**0.5
            shift = guidance.newton_shift(x0_gradient, measured.similarity, self.step.threshold)
            return guidance.exact_dissimilarity(shift, alpha_bar)
        assert cfg.c3 is not None
        s3 = torch.full_like(measured.similarity, cfg.c3)
        if cfg.form == "released" and self.guide.index.metric == "nl2":
            s3 = cfg.c3 * (measured.similarity - self.step.threshold)
        elif cfg.form == "released":
            s3 = guidance.released_s3(measured.similarity, cfg.c3, float(self.step.t))
        return guidance.dissimilarity(gradient, s3, alpha_bar)

    def full_gradient(self, rows: Tensor, x0_grad: Tensor) -> Tensor:
        """grad_{x_t} sigma through the denoiser: x0_grad carried back along x0_hat(x_t)."""
        guide, conditions = self.guide, self.conditions.take(rows)

        def x0_hat_of(sample: Tensor) -> Tensor:
            output = predict_guided(guide.denoiser, sample, self.step.t, conditions, guide.guidance_scale)
            return self.prediction.x0_hat(self.prediction.to_eps(output, sample), sample)

        leaf, x0_hat = recorded(x0_hat_of, self.sample[rows])
        gradient = carried_back(x0_hat, leaf, x0_grad).float()
        for row in rows.tolist():
            self.flights[row].evaluations += self.cost
        return gradient

    def sent_back(self, rows: Tensor, x0_hat: Tensor, measured: Measured) -> Tensor:
        """[R] bool: the samples that go back after this step, too close at a checkpoint or alarmed."""
        cfg, guide, flights = self.config, self.guide, [self.flights[row] for row in rows.tolist()]
        chosen = torch.tensor([row in self.alarmed for row in rows.tolist()], device=rows.device)
        near = torch.where(chosen, measured.row.to(rows.device), -1)
        if is_checkpoint(cfg, self.step.position, self.step.total):
            close, found = too_close(cfg, guide.index, guide.judges, x0_hat, measured)
            chosen, found = chosen | close.to(rows.device), found.to(rows.device)
            near = torch.where(found >= 0, found, near)
        affordable = self.affords(rows, self.step.total * self.cost)
        give_up(cfg, flights, chosen & ~affordable)
        chosen = chosen & affordable
        marked = send_back(cfg, guide.index, guide.denoiser, flights, chosen, near).to(rows.device)
        for row in rows[marked].tolist():
            self.terms[row].append("rewind")
        return marked.to(measured.similarity.device)

    def note(self, rows: Tensor, measured: Measured, opened: Tensor) -> None:
        """Keep what was measured for the trace and for the next steps' choice of rows."""
        found = zip(
            rows.tolist(), measured.similarity.tolist(), measured.row.tolist(), opened.tolist(), strict=True
        )
        for row, similarity, nearest, is_open in found:
            self.measured[row] = (similarity, nearest)
            self.flights[row].suspected = is_open

    def record(self) -> None:
        """Append this step to every sample's trace."""
        for row, (flight, terms) in enumerate(zip(self.flights, self.terms, strict=True)):
            similarity, nearest = self.measured.get(row, (None, None))
            place = (self.step.position, float(self.step.t), similarity, self.step.threshold, nearest)
            estimated = row in self.estimated
            flight.trace.append(TraceStep(*place, tuple(terms), self.signals.get(row), estimated))

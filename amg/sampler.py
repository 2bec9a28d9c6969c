"""READ FIRST: the denoising loop, prompt -> eps -> x0_hat -> neighbour -> guidance -> step, and the fast
sampler on it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.flight import Flight
from amg.guide import Guide
from amg.predict import Conditions, predict, replace_captions
from amg.rewind import pending_rows, pristine, rewind


@dataclass(frozen=True)
class Run:
    """One batch's constants: how it is guided, an unstepped scheduler, and extra arguments of its `step`."""

    guide: Guide
    scheduler: Any
    step_arguments: dict[str, Any]

    @property
    def count(self) -> int:
        return len(self.scheduler.timesteps)


@torch.no_grad()
def denoise(
    run: Run,
    scheduler: Any,
    sample: Tensor,
    conditions: Conditions,
    flights: Sequence[Flight],
    first: int = 0,
    last: int | None = None,
    generator: Any = None,
    progress: Any = None,
) -> Tensor:
    """Run steps first..last-1 and return the sample, [B, C, H, W]. `scheduler` is stepped in place."""
    for index in range(first, run.count if last is None else last):
        step = run.guide.at(scheduler, index)
        model_input = scheduler.scale_model_input(sample, step.t)
        conditions = replace_captions(run.guide.denoiser, conditions, [flight.caption for flight in flights])
        output_uncond, output_cond = predict(run.guide.denoiser, model_input, step.t, conditions)
        output = run.guide(step, model_input, output_uncond, output_cond, conditions, flights).output
        noise = generator if generator is not None else [flight.generator for flight in flights]
        sample = scheduler.step(
            output, step.t, sample, **arguments_for(scheduler, run.step_arguments, noise)
        )[0]
        sample = send_back(run, scheduler, index, sample, conditions, flights)
        if progress is not None:
            progress.update()
    return sample


def send_back(
    run: Run, scheduler: Any, index: int, sample: Tensor, conditions: Conditions, flights: Sequence[Flight]
) -> Tensor:
    """After step `index`: rewind the rows a checkpoint marked, in one batch of their own."""
    rows = pending_rows(flights)
    if not rows:
        return sample

    def again(inner: Any, start: Tensor, rows: list[int], first: int, last: int) -> Tensor:
        where = torch.tensor(rows, device=start.device)
        return denoise(run, inner, start, conditions.take(where), [flights[row] for row in rows], first, last)

    first = round(run.guide.config.rewind_to * (run.count - 1))
    return rewind(rows, index, first, sample, scheduler, run.scheduler, flights, again)


def arguments_for(scheduler: Any, extra: dict[str, Any], generator: Any) -> dict[str, Any]:
    """The keyword arguments this scheduler's `step` takes, out of `extra` and the generator."""
    known = inspect.signature(scheduler.step).parameters
    arguments = {name: value for name, value in extra.items() if name in known}
    if "generator" in known:
        arguments["generator"] = generator
    return {**arguments, "return_dict": False}


def start_over(
    run: Run, conditions: Conditions, flights: Sequence[Flight], like: Tensor, strong: AMGConfig
) -> Tensor:
    """Whole re-runs with fresh noise under `strong`, ungated, one per row of `like`; despecified up to the
    first checkpoint."""
    guide = replace(run.guide, config=strong, gate=None)
    again, scheduler = replace(run, guide=guide), pristine(run.scheduler)
    checkpoint = round(min(strong.rewind_at or (0.5,)) * (run.count - 1))
    for flight in flights:
        flight.suspected = False
        flight.retries, flight.rewinds, flight.despecified_until = flight.retries + 1, 0, checkpoint + 1
    noise = torch.stack([flight.noise(row) for flight, row in zip(flights, like, strict=True)])
    sample = noise * scheduler.init_noise_sigma
    return denoise(again, scheduler, sample, conditions, flights)

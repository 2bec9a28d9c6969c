"""READ FIRST: the denoising loop, prompt -> eps -> x0_hat -> neighbour -> guidance -> step, and the fast
sampler on it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amg.engine.level import Level
from amg.engine.restart import latest
from amg.guidance.checkpoint import restart
from amg.guidance.flight import Flight
from amg.guidance.lower import Start, later, lower
from amg.guidance.predict import Conditions
from amg.guidance.schedule import levels_of
from amg.protection.group import Group, Predicted, predict_together
from amg.protection.guide import Guide
from amg.protection.rewind import rewound


@dataclass(frozen=True)
class Run:
    """One batch's constants: how it is guided, an unstepped scheduler, extra arguments of its `step`, and the
    level of every step; `Refused` for a scheduler that tells none. first: the step that the loop began with;
    input_scale: from a flight's first noise to what the network sees of it."""

    guide: Guide
    scheduler: Any
    step_arguments: dict[str, Any]
    levels: tuple[Level, ...] = ()
    first: int = 0
    input_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.levels:
            object.__setattr__(self, "levels", levels_of(self.scheduler))

    @functools.cached_property
    def restart(self) -> int:
        """The step that samples sent back start from: the last one up to `rewind_to` where a fresh scheduler
        can."""
        known = _parameters(type(self.scheduler).step)
        arguments = {name: value for name, value in self.step_arguments.items() if name in known}
        return latest(self.scheduler, restart(self.guide.config, self.count), arguments)

    @property
    def count(self) -> int:
        return len(self.scheduler.timesteps)


def denoise(
    run: Run, group: Group, conditions: Conditions, flights: Sequence[Flight], progress: Any = None
) -> Tensor:
    """Run all that is left of a whole batch's steps and return the finished sample, [B, C, H, W].
    `group.scheduler` is stepped in place."""
    sample = torch.empty_like(group.sample)
    for done in advance(run, group, run.count, conditions, flights, progress):
        sample[done.rows] = done.sample[done.rows]
    return sample


@torch.no_grad()
def advance(
    run: Run,
    group: Group,
    last: int,
    conditions: Conditions,
    flights: Sequence[Flight],
    progress: Any = None,
) -> list[Group]:
    """Run a group up to step last-1. The samples that a checkpoint sends back go on from there as a group of
    their own, in the same network calls: the groups that the samples ended in."""
    going, finished, asked, given = [group], [], conditions, None
    while going:
        _lower(run, asked, flights, group.sample.dtype)
        said = [(flight.caption, flight.lowered) for flight in flights]
        if said != given:
            conditions, given = later(run.guide.denoiser, asked, flights), said
        for one, found in zip(going, predict_together(run.guide.denoiser, going, conditions), strict=True):
            step_group(run, one, found, conditions, flights)
        if back := rewound(going, run, flights):
            going.append(back)
        finished += [one for one in going if one.rows and one.position == last]
        going = [one for one in going if one.rows and one.position < last]
        if progress is not None:
            progress.total = progress.n + 1 + max((last - one.position for one in going), default=0)
            progress.update()
    return finished


def _lower(run: Run, conditions: Conditions, flights: Sequence[Flight], dtype: torch.dtype) -> None:
    """Lower the prompts that were marked for it, by the batch's own conditions."""
    for row, flight in enumerate(flights):
        if flight.to_lower is not None:
            sample = (flight.initial[None] * run.input_scale).to(dtype)
            own, t = conditions.part(slice(row, row + 1)), run.scheduler.timesteps[run.first]
            lower(flight, Start(run.guide.denoiser, sample, t, own, run.count * 2), run.guide.config)


def step_group(
    run: Run, group: Group, found: Predicted, conditions: Conditions, flights: Sequence[Flight]
) -> None:
    """Guide a group's samples and make its scheduler's step."""
    scheduler, step = group.scheduler, run.guide.at(group.scheduler, run.levels, group.position)
    mine = [flights[row] for row in group.rows]
    output = run.guide(step, *found, group.of_rows(conditions), mine).output
    arguments = arguments_for(scheduler, run.step_arguments, group.noise(flights))
    group.sample = scheduler.step(group.everywhere(output), step.t, group.sample, **arguments)[0]
    group.position += 1


def arguments_for(scheduler: Any, extra: dict[str, Any], generator: Any) -> dict[str, Any]:
    """The keyword arguments this scheduler's `step` takes, out of `extra` and the generator."""
    known = _parameters(type(scheduler).step)
    arguments = {name: value for name, value in extra.items() if name in known}
    if "generator" in known:
        arguments["generator"] = generator
    return {**arguments, "return_dict": False}


@functools.cache
def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)

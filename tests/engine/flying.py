"""Requests of a nonlinear toy network for the engine's parts, and the same samples alone in float64."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.embed.precision import Modes
from amg.engine.job import Job
from amg.engine.lives import Done
from amg.engine.look import Tools
from amg.engine.loop import Engine, first_slots
from amg.engine.plan import Course
from amg.engine.slots import Slots
from amg.engine.step import step
from amg.engine.table import StepTable, Tables, setting
from amg.guidance.flight import Flight
from amg.guidance.gate import Gate
from amg.guidance.predict import Conditions, Denoiser

from .schedulers import CASES

SHAPE = (3, 4, 8)
OFF = AMGConfig.preset("off").for_metric("cosine")
TABLES = Tables()


def network(sample: Tensor, t: Any, *, words: Tensor) -> Tensor:
    """Row by row, nothing linear: words [B, 3] shift what it says of a sample."""
    t = torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1, 1, 1)
    wave = torch.sin(t / 90).to(sample)
    mixed = 0.9 * sample.roll(1, -1) - 0.4 * sample.flip(-2) + words[:, :, None, None].to(sample)
    return torch.tanh(mixed + 0.3 * wave) + 0.1 * wave * sample


DENOISER = Denoiser(network, lambda x0: x0 / 2 + 0.5)
TOOLS = Tools(None, None, DENOISER)  # type: ignore[arg-type]


def course(
    name: str, steps: int | None = 8, scale: float = 3.0, gate: Gate | None = None, **times: Any
) -> Course:
    """How a request with the scheduler `name` of `schedulers.CASES` is run."""
    case = CASES[name]
    given = {**({} if steps is None else {"num_inference_steps": steps}), **times, **case.times}
    return Course(setting(case.make(), given, case.step), TABLES, scale, gate, torch.device("cpu"))


def job(
    how: Course,
    seed: int = 0,
    images: int = 1,
    *,
    guided: bool = True,
    config: AMGConfig = OFF,
    tools: Tools = TOOLS,
    generator: Any = None,
    rescale: float = 0.0,
) -> Job:
    """A request of `images` images, its noise and words drawn with `seed`."""
    chance = torch.Generator().manual_seed(seed)
    noise = torch.randn(images, *SHAPE, generator=chance)
    cond, uncond = torch.randn(2, images, 3, generator=chance)
    flights = [Flight.from_noise(row) for row in noise]
    conditions = Conditions({"words": cond}, {"words": uncond} if guided else None, {})
    return Job(
        how, config, tools, (), conditions, noise * how.noise_scale, flights, generator, rescale, "pt", None,
        torch.float32, "key", "owner", Modes.here(), math.inf,
    )  # fmt: skip


def empty(denoiser: Denoiser = DENOISER, like: Tensor | None = None) -> Slots:
    return Slots(denoiser, torch.zeros(1, *SHAPE) if like is None else like, torch.float32)


@torch.no_grad()
def fly(slots: Slots, arrivals: Mapping[int, Sequence[Job]]) -> dict[tuple[Job, int], Done]:
    """Run jobs that join at their tick until all are done, as the engine does."""
    engine, waiting = Engine(), dict(arrivals)
    while len(slots) or waiting:
        for one in waiting.pop(slots.tick, ()):
            slots.join(first_slots(one), one.sample)
        if len(slots):
            assert step(slots) == []
        else:
            slots.tick += 1
        if slots.tick > slots.event:
            engine._settle(slots)
    return {(done.slot.job, done.slot.place): done for done in engine._done}


@dataclass
class Alone:
    """One image's run in float64 by `StepTable.advance`: x after each step, and the free signals [T, 4]."""

    after: list[Tensor] = field(default_factory=list)
    signals: list[list[float]] = field(default_factory=list)


def alone(
    table: StepTable,
    sample: Tensor,
    conditions: Conditions,
    scales: Sequence[float],
    noises: Sequence[Tensor] = (),
    rescale: float = 0.0,
) -> Alone:
    """sample [1, ...]; `scales`: the guidance scale of each row of the table; `noises`: of each."""
    found, x, state = Alone(), sample.double(), table.blank(sample.double())
    for row in range(len(table)):
        scale, t = float(table.input_scale[row]), table.t[row]
        cond = network(x * scale, t, words=conditions.cond["words"])
        output = uncond = cond
        if conditions.uncond is not None:
            uncond = network(x * scale, t, words=conditions.uncond["words"])
            output = uncond + scales[row] * (cond - uncond)
            if rescale:
                output = output * (rescale * cond.std() / output.std() + 1 - rescale)
        noise = noises[row].double() if len(noises) else None
        next_scale = float(table.input_scale[min(row + 1, len(table) - 1)])
        after, state = table.advance(row, x, output, noise, state)
        found.signals.append(_signals(table, row, x, (uncond, cond), after * next_scale - x * scale))
        found.after.append(after)
        x = after
    return found


def _signals(
    table: StepTable, row: int, x: Tensor, halves: tuple[Tensor, Tensor], move: Tensor
) -> list[float]:
    alpha, sigma = float(table.alpha[row]), float(table.sigma[row])
    eps = [(x - alpha * table.x0_hat(row, x, half)) / sigma for half in halves]
    gap = eps[1] - eps[0]
    parts = (gap * gap, eps[0] * gap, eps[0] * eps[0], move * move)
    return [float(part.sum()) for part in parts]

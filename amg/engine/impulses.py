"""A scheduler's responses to unit impulses: what it computes, read off without a formula.

Every step has inputs of its own (x, output, clipped x0_hat, noise); each is a pixel of one tensor
[1, 1, 1, n] which is 1 at that step and 0 at all others. The results at step i are its coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amg.engine.drive import Refused, make_step, started
from amg.engine.level import SMALL, Level, clip_of, level_at, require_own

X, OUTPUT, CLIPPED, NOISE = range(4)
CLIPS = 1e-5  # coefficients up to this are rounding


class Responses(NamedTuple):
    """`table` [N, N, 4] float64: the coefficient of step i's result over the inputs (x, output, clipped
    x0_hat, noise) of step j <= i. `draws`: the dtypes of the noise that each step drew. `own_x0_hat`: whether
    the scheduler says what it takes for x0_hat, which then is what its level says."""

    levels: tuple[Level, ...]
    table: Tensor
    draws: tuple[tuple[torch.dtype, ...], ...]
    clip: float | None
    own_x0_hat: bool


def responses(scheduler: Any, start: int, arguments: Mapping[str, Any], dtype: torch.dtype) -> Responses:
    """Run a scheduler from step `start` on impulses."""
    clip = clip_of(scheduler)
    running = started(scheduler, start)
    steps = range(start, len(running.timesteps))
    found, levels, draws, said = [], [], [], True
    for step in steps:
        levels.append(level_at(running, step))
        if not math.isfinite(levels[-1].x0_hat[0]):
            raise Refused(scheduler, f"no x0_hat follows from eps where alpha is 0, at step {step}")
        sample, output, noise = _impulses(levels[-1], step - start, len(steps), clip, dtype)
        made = make_step(running, step, sample, output, noise, arguments)
        if made.x0_hat is not None:
            own = made.x0_hat.double().view(-1, len(steps))[:2].sum(1)
            require_own(scheduler, step, levels[-1], own / _small(clip))
        found.append(made.sample.double().view(-1, len(steps)))
        draws.append(made.draws)
        said = said and made.x0_hat is not None
    table = _separated(torch.stack(found), levels, clip)
    if clip is not None and not bool((table[..., CLIPPED].abs() > CLIPS).any()):
        clip = None
    return Responses(tuple(levels), table, tuple(draws), clip, said)


def _impulses(
    level: Level, place: int, count: int, clip: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample, output and noise of one step, [1, 1, 1, n] each: a block of `count` pixels for x, one for the
    output, one for noise; where x0_hat is clipped two more, whose outputs carry it beyond the range."""
    small = _small(clip)
    blocks = torch.zeros(3, 3 if clip is None else 5, count, dtype=dtype, device="cpu")
    blocks[0, 0, place], blocks[1, 1, place], blocks[2, 2, place] = small, small, 1.0
    if clip is not None:
        far = _beyond(level, clip)
        blocks[1, 3, place], blocks[1, 4, place] = far, 2 * far
    sample, output, noise = blocks.view(3, 1, 1, 1, -1)
    return sample, output, noise


def _small(clip: float | None) -> float:
    """An impulse which no clipping touches."""
    return 1.0 if clip is None else SMALL * clip


def _beyond(level: Level, clip: float) -> float:
    """An output which makes x0_hat four times the clip range, where x is 0."""
    return 4 * clip / level.x0_hat[1]


def _separated(found: Tensor, levels: list[Level], clip: float | None) -> Tensor:
    """[N, blocks, N] results of the impulses -> [N, N, 4] coefficients."""
    table = found.new_zeros(len(found), len(found), 4)
    table[..., NOISE] = found[:, 2]
    if clip is None:
        table[..., X], table[..., OUTPUT] = found[:, 0], found[:, 1]
        return table
    far = found.new_tensor([_beyond(level, clip) for level in levels])
    a = found.new_tensor([level.x0_hat[0] for level in levels])
    table[..., OUTPUT] = (found[:, 4] - found[:, 3]) / far
    table[..., CLIPPED] = (found[:, 3] - table[..., OUTPUT] * far) / clip
    table[..., X] = found[:, 0] / _small(clip) - table[..., CLIPPED] * a
    return table

"""Where a restart may land: the line test.

Under a network that knows x0 and eps, x moves along alpha·x0 + sigma·eps. A scheduler that is started in the
middle of a step, or without the history that its order counts on, leaves that line at once.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amg.engine.drive import accepted, in_double, make_step, quietly, started, timed
from amg.engine.level import Level, level_at

TOLERANCE = 1e-5


class Move(NamedTuple):
    """One step from a sample on the line at `level`: `result` [2] is what it made of x0 = 1, eps = 0 and of
    x0 = 0, eps = 1, and whether noise was drawn, which is left out."""

    level: Level
    result: Tensor
    drawn: bool

    def off(self, after: Level) -> float:
        """Its distance from the line at the next level, of the sample's size there."""
        return _largest(self.result - self.result.new_tensor([after.alpha, after.sigma])) / after.size

    def apart(self, other: Move) -> float:
        """Its distance from what another scheduler made of the same."""
        return _largest(self.result - other.result) / max(1.0, _largest(other.result))


def _largest(values: Tensor) -> float:
    worst = float(values.abs().max())
    return math.inf if math.isnan(worst) else worst


def moves(scheduler: Any, start: int, arguments: Mapping[str, Any], dtype: torch.dtype) -> Iterator[Move]:
    """A scheduler's steps from `start` on, each from the line, under an exact network and without noise."""
    running = started(scheduler, start)
    x0, eps = torch.eye(2, dtype=dtype, device="cpu").view(2, 1, 1, 1, 2)
    for step in range(start, len(running.timesteps)):
        level, nothing = level_at(running, step), torch.zeros_like(x0)
        output, sample = level.exact(x0, eps), level.sample(x0, eps)
        made = make_step(running, step, sample, output, nothing, arguments)
        yield Move(level, made.sample.double().flatten(), bool(made.draws))


def deviation(scheduler: Any, arguments: Mapping[str, Any], dtype: torch.dtype) -> float:
    """How far from the line the scheduler's own steps from step 0 lead; those that draw noise may have less
    of eps than it."""
    worst = 0.0
    for here, after in itertools.pairwise(moves(scheduler, 0, arguments, dtype)):
        result = here.result.clone()
        if here.drawn:
            result[1] = result[1].clamp(min=after.level.sigma)
        worst = max(worst, here._replace(result=result).off(after.level))
    return worst


@quietly
def restarts(
    scheduler: Any,
    among: Iterable[int] | None = None,
    *,
    step_arguments: Mapping[str, Any] | None = None,
    **set_timesteps_arguments: Any,
) -> tuple[int, ...]:
    """The steps, of those `among`, that a restart may land on; step 0 is always one.

    A restart must be at the level that the whole run has at that step, and each of its steps must lead to the
    line or to where the whole run's does, to 1e-5. (The two differ where noise is drawn, and where a
    scheduler's steps do not fit its timesteps, as DDIM's with linspace spacing.) Arguments and errors as of
    `tabulate`.
    """
    ready = timed(scheduler, set_timesteps_arguments)
    arguments = accepted(scheduler, step_arguments or {})
    whole, dtype = in_double(functools.partial(_whole, ready, arguments))
    asked = range(len(whole)) if among is None else among
    return tuple(step for step in asked if step == 0 or _admits(ready, whole, step, arguments, dtype))


@quietly
def latest(scheduler: Any, wanted: int, step_arguments: Mapping[str, Any] | None = None) -> int:
    """The last step up to `wanted` that a restart may land on, of a scheduler whose timesteps are set."""
    ready, arguments = timed(scheduler, {}), accepted(scheduler, step_arguments or {})
    whole, dtype = in_double(functools.partial(_whole, ready, arguments))
    for step in range(wanted, 0, -1):
        if _admits(ready, whole, step, arguments, dtype):
            return step
    return 0


def _whole(
    scheduler: Any, arguments: Mapping[str, Any], dtype: torch.dtype
) -> tuple[list[Move], torch.dtype]:
    return [*moves(scheduler, 0, arguments, dtype)], dtype


def _admits(
    scheduler: Any, whole: list[Move], start: int, arguments: Mapping[str, Any], dtype: torch.dtype
) -> bool:
    rest = whole[start:]
    found = moves(scheduler, start, arguments, dtype)
    for move, own, after in zip(found, rest, [*rest[1:], None], strict=True):
        if not _same(move.level, own.level):
            return False
        on_line = after is not None and move.off(after.level) <= TOLERANCE
        if not on_line and move.apart(own) > TOLERANCE:
            return False
    return True


def _same(level: Level, other: Level) -> bool:
    pairs = ((level.alpha, other.alpha), (level.sigma, other.sigma))
    return all(math.isclose(*pair, rel_tol=TOLERANCE, abs_tol=TOLERANCE) for pair in pairs)

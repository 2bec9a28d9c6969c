"""x0_hat -> similarity: what the student, the metric, the guard and further indexes say of some samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.engine.frame import Frame, Seat
from amg.guidance.checkpoint import is_checkpoint, screens
from amg.guidance.gate import Gate
from amg.guidance.ordinary import Ordinary
from amg.guidance.predict import Denoiser
from amg.guidance.read import read
from amg.similarity import Judge, Measured, Similarity
from amg.similarity.student import Screen


@dataclass(frozen=True)
class Tools:
    """What samples are held to, and what measures them."""

    index: Any
    similarity: Similarity
    denoiser: Denoiser
    judges: tuple[Judge, ...] = ()
    gate: Gate | None = None
    screen: Screen | None = None
    ordinary: Ordinary = field(default_factory=Ordinary)


class Look(NamedTuple):
    """Of one sample: similarity to and row of the nearest training image; at a checkpoint the guard's, and
    whether a further index finds it too close; -1 for a row that was not asked for."""

    similarity: float
    row: int
    guard: float = -math.inf
    guard_row: int = -1
    judged: bool = False

    @property
    def finite(self) -> bool:
        return not (math.isnan(self.similarity) or math.isnan(self.guard))


def limit_of(seat: Seat) -> float:
    """The similarity up to which nothing happens to a sample at this step, whatever it is."""
    config, step = seat.config, seat.step
    if not screens(config):
        return -math.inf
    if not is_checkpoint(config, step.position, step.total):
        return step.threshold
    assert config.rewind_threshold is not None
    return min(step.threshold, config.rewind_threshold)


def chosen(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """`rows`, ascending, of a tensor [B, ...]; itself where they are all."""
    if len(rows) == len(tensor):
        return tensor
    return tensor.index_select(0, torch.tensor(rows, device=tensor.device))


def look(frame: Frame, tools: Tools, x0_hat: Tensor, rows: Sequence[int]) -> tuple[Measured, dict[int, Look]]:
    """Measure `rows` of x0_hat [B, ...] by decoder, embedder and search: one read."""
    seats, x0_hat = [frame.seats[row] for row in rows], chosen(x0_hat, rows)
    measured = tools.similarity.measure(x0_hat)
    columns = [measured.similarity, measured.row]
    if any(at_checkpoint(seat) for seat in seats):
        columns += [*_guard(tools.index, seats[0].config, measured)]
        columns.append(_judged(tools.judges, seats, x0_hat, measured))
    return measured, {
        row: Look(values[0], int(values[1]), *_at_checkpoint(seat, values[2:]))
        for row, seat, values in zip(rows, seats, read(*columns), strict=True)
    }


def look_cheaply(
    frame: Frame, tools: Tools, x0_hat: Tensor, rows: Sequence[int]
) -> tuple[list[int], dict[int, Look]]:
    """Those of `rows` that the student cannot tell to be ordinary, and what it found of all: one read.

    At a checkpoint it speaks for one index only, so that with further ones nothing is told.
    """
    seats = [frame.seats[row] for row in rows]
    screen, limits = tools.screen, [limit_of(seat) for seat in seats]
    beyond = [tools.judges and at_checkpoint(seat) for seat in seats]
    if screen is None or all(limit == -math.inf or far for limit, far in zip(limits, beyond, strict=True)):
        return list(rows), {}
    found = screen(chosen(x0_hat, rows), [seat.step.alpha_bar for seat in seats], limits)
    columns = [found.near, found.measured.similarity, found.measured.row]
    if any(at_checkpoint(seat) for seat in seats):
        columns += [*_guard(tools.index, seats[0].config, found.measured)]
    near, seen_by = [], {}
    for row, seat, skip, values in zip(rows, seats, beyond, read(*columns), strict=True):
        seen = seen_by[row] = Look(values[1], int(values[2]), *_at_checkpoint(seat, values[3:]))
        if values[0] or skip or not seen.finite or guarded(seat.config, seen):
            near.append(row)
    return near, seen_by


def at_checkpoint(seat: Seat) -> bool:
    """Whether this step sends the sample back where it is too close."""
    return is_checkpoint(seat.config, seat.step.position, seat.step.total)


def guarded(config: AMGConfig, seen: Look) -> bool:
    """More alike to a training image than `guard_threshold`, by the index's guard."""
    return config.guard_threshold is not None and seen.guard > config.guard_threshold


def too_close(config: AMGConfig, seen: Look) -> bool:
    """Above the rewind threshold or the guard's, under the index or a further one."""
    assert config.rewind_threshold is not None
    return seen.similarity > config.rewind_threshold or guarded(config, seen) or seen.judged


def _at_checkpoint(seat: Seat, values: Sequence[float]) -> tuple[float, int, bool]:
    if not values or not at_checkpoint(seat):
        return -math.inf, -1, False
    return values[0], int(values[1]), bool(values[2:] and values[2])


def _guard(index: Any, config: AMGConfig, measured: Measured) -> tuple[Tensor, Tensor]:
    """The guard's similarity [B] and row [B]; -inf and -1 where it is not asked."""
    if index.guard is None or config.guard_threshold is None or measured.images is None:
        none = torch.full_like(measured.similarity, -math.inf)
        return none, torch.full_like(measured.row, -1)
    found = index.guard.nearest(measured.images)
    return found.similarity, found.row


def _judged(judges: Sequence[Judge], seats: Sequence[Seat], x0_hat: Tensor, measured: Measured) -> Tensor:
    """[B] bool: too close under a further index or its guard, by each sample's own config."""
    close = torch.zeros_like(measured.similarity, dtype=torch.bool)
    for judge in judges:
        limits = [_limit_under(seat.config, judge.metric) for seat in seats]
        found = judge.similarity.measure(x0_hat)
        limit = torch.tensor(limits, dtype=torch.float32, device=found.similarity.device)
        close = close | (found.similarity > limit).to(close.device)
        config = seats[0].config  # a request's re-runs keep its guard
        alike, _ = _guard(judge.index, config, found)
        close = close | (alike > (config.guard_threshold or math.inf)).to(close.device)
    return close


def _limit_under(config: AMGConfig, metric: str) -> float:
    """The similarity above which a checkpoint sends a sample back under a further index."""
    asked = config.under(metric)
    limit = asked.threshold if asked.rewind_threshold is None else asked.rewind_threshold
    assert limit is not None
    return limit

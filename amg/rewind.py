"""Samples still too close at a checkpoint go back to an early step with fresh noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amg.checkpoint import restart
from amg.config import AMGConfig
from amg.engine.drive import pristine
from amg.flight import Flight
from amg.group import Group
from amg.schedule import sampler_scale


def pending_rows(flights: Sequence[Flight]) -> list[int]:
    """The rows that a checkpoint marked."""
    return [row for row, flight in enumerate(flights) if flight.pending]


def rewound(
    groups: Sequence[Group], fresh: Any, config: AMGConfig, flights: Sequence[Flight]
) -> Group | None:
    """Take the samples that were marked out of `groups`, which have just made a step: a group of their own at
    the step where rewinds start, None where there are none. `fresh` is an unstepped copy of their scheduler.

    They start from fresh noise alone. Re-noising x0_hat instead would leave sqrt(alpha_bar)·x0_hat in it, and
    at a latent model's early steps (alpha_bar near 0.01) that remnant is enough to bring the same picture
    back.
    """
    rows = pending_rows(flights)
    if not rows:
        return None
    scheduler = pristine(fresh)
    # PNDM's warm-up is tied to the first steps
    pndm = type(scheduler).__name__ == "PNDMScheduler"
    first = 0 if pndm else restart(config, len(scheduler.timesteps))
    scale, sample = sampler_scale(scheduler, first), torch.zeros_like(groups[0].sample)
    for group in groups:
        for row in sorted({*rows} & {*group.rows}):
            flight = flights[row]
            sample[row] = flight.noise(sample[row]) * scale
            flight.pending, flight.suspected = False, False
            flight.rewinds += 1
            flight.total_rewinds += 1
            flight.despecified_until, flight.deduplicated_until = group.position, 0
        group.rows = [row for row in group.rows if row not in rows]
    return Group(scheduler, sample, rows, first)


def merge_history(scheduler: Any, inner: Any, rows: list[int], batch: int) -> bool:
    """Copy the `rows` of every tensor with one row per sample of the `batch` from `inner`'s state into
    `scheduler`'s; False, and nothing copied, where the two differ in shape (a history not yet as long as the
    batch's)."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, value in vars(scheduler).items():
        if not _collect(value, vars(inner).get(name), batch, pairs):
            return False
    for outer, replacement in pairs:
        outer[rows] = replacement[rows]
    return True


def _collect(outer: Any, inner: Any, batch: int, pairs: list[tuple[Tensor, Tensor]]) -> bool:
    if isinstance(outer, list) and any(_per_sample(value, batch) for value in outer):
        if not isinstance(inner, list) or len(inner) != len(outer):
            return False
        return all(_collect(a, b, batch, pairs) for a, b in zip(outer, inner, strict=True))
    if not _per_sample(outer, batch):
        return True
    if not _per_sample(inner, batch):
        return False
    pairs.append((outer, inner))
    return True


def _per_sample(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim >= 3 and value.shape[0] == batch

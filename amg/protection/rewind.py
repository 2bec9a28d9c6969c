"""Samples still too close at a checkpoint go back to an early step with fresh noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amg.engine.drive import started
from amg.guidance.flight import Flight
from amg.protection.group import Group

if TYPE_CHECKING:
    from amg.protection.catch_up import Run


def pending_rows(flights: Sequence[Flight]) -> list[int]:
    """The rows that a checkpoint marked."""
    return [row for row, flight in enumerate(flights) if flight.pending]


def rewound(groups: Sequence[Group], run: Run, flights: Sequence[Flight]) -> Group | None:
    """Take the samples that were marked out of `groups`, which have just made a step: a group of their own at
    the step where rewinds start, with a scheduler that starts there; None where there are none.

    They start from fresh noise alone, as large as x_t is there. Re-noising x0_hat instead would leave
    sqrt(alpha_bar)·x0_hat in it, and at a latent model's early steps (alpha_bar near 0.01) that remnant is
    enough to bring the same picture back.
    """
    rows = pending_rows(flights)
    if not rows:
        return None
    first = run.restart
    size, sample = run.levels[first].size, torch.zeros_like(groups[0].sample)
    for group in groups:
        for row in sorted({*rows} & {*group.rows}):
            flight = flights[row]
            sample[row] = flight.noise(sample[row]) * size
            flight.pending, flight.suspected = False, False
            flight.rewinds += 1
            flight.total_rewinds += 1
            flight.despecified_until, flight.deduplicated_until = group.position, 0
        group.rows = [row for row in group.rows if row not in rows]
    return Group(started(run.scheduler, first), sample, rows, first)


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

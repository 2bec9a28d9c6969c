"""Samples still too close at a checkpoint go back to an early step with fresh noise, and rejoin their
batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from amg.flight import Flight
from amg.schedule import sampler_scale


def pristine(scheduler: Any) -> Any:
    """A copy of a scheduler whose timesteps are set and which has not stepped yet, free of any instance-level
    wrapper."""
    clone = copy.copy(scheduler)
    clone.__dict__ = {
        name: value for name, value in vars(scheduler).items() if name not in ("step", "scale_model_input")
    }
    if "_step_index" in clone.__dict__:
        clone._step_index = (
            None  # a scheduler whose input was already scaled knows its place; a fresh one must not
        )
    return copy.deepcopy(clone)


def pending_rows(flights: Sequence[Flight]) -> list[int]:
    """The rows that a checkpoint marked."""
    return [row for row, flight in enumerate(flights) if flight.pending]


def rewind(
    rows: list[int],
    step: int,
    first: int,
    sample: Tensor,
    scheduler: Any,
    fresh: Any,
    flights: Sequence[Flight],
    denoise: Callable[[Any, Tensor, list[int], int, int], Tensor],
) -> Tensor:
    """Send `rows` back from `step` to step `first` and run them up to and including `step` again.

    They start from fresh noise alone. Re-noising x0_hat instead would leave sqrt(alpha_bar)·x0_hat in it, and
    at a latent model's early steps (alpha_bar near 0.01) that remnant is enough to bring the same picture
    back.

    `sample` [B, C, H, W] is the batch after `step`; `scheduler` has just made that step; `fresh` is an
    unstepped copy of it. `denoise(scheduler, sample, rows, first, last)` runs steps first..last-1 of those
    rows. Returns the batch with the rows replaced; the scheduler's multistep history is merged row by row.
    Rows whose history cannot be merged exactly are left as they were, for the re-run at the end.
    """
    inner = pristine(fresh)
    if type(inner).__name__ == "PNDMScheduler":
        first = 0  # its warm-up is tied to the first steps
    scale = sampler_scale(inner, first)
    start = []
    for row in rows:
        flight = flights[row]
        start.append(flight.noise(sample[row]) * scale)
        flight.pending, flight.suspected = False, False
        flight.rewinds += 1
        flight.total_rewinds += 1
        flight.despecified_until, flight.deduplicated_until = step + 1, 0
    again = denoise(inner, torch.stack(start).to(sample.dtype), rows, first, step + 1)
    if not merge_history(scheduler, inner, rows, len(flights)):
        return sample
    sample = sample.clone()
    sample[rows] = again.to(sample.dtype)
    return sample


def merge_history(scheduler: Any, inner: Any, rows: list[int], batch: int) -> bool:
    """Copy the `rows` of every per-sample tensor of `inner`'s state into `scheduler`'s; False, and nothing
    copied, where the two states differ in shape (a history not yet as long as the batch's)."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, value in vars(scheduler).items():
        if not _collect(value, vars(inner).get(name), rows, batch, pairs):
            return False
    for outer, replacement in pairs:
        outer[rows] = replacement
    return True


def _collect(outer: Any, inner: Any, rows: list[int], batch: int, pairs: list[tuple[Tensor, Tensor]]) -> bool:
    if isinstance(outer, list) and any(_per_sample(value, batch) for value in outer):
        if not isinstance(inner, list) or len(inner) != len(outer):
            return False
        return all(_collect(a, b, rows, batch, pairs) for a, b in zip(outer, inner, strict=True))
    if not _per_sample(outer, batch):
        return True
    if not _per_sample(inner, len(rows)):
        return False
    pairs.append((outer, inner))
    return True


def _per_sample(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim >= 3 and value.shape[0] == batch

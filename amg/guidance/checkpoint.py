"""Which samples go back: at a checkpoint those measured too close, at a calibration's alarm those whose free
signal says copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.guidance.flight import Flight
from amg.guidance.gate import steps_of
from amg.guidance.ordinary import despecify
from amg.guidance.predict import Denoiser
from amg.guidance.terms import require_finite
from amg.similarity import Judge, Measured


def is_checkpoint(config: AMGConfig, position: int, total: int) -> bool:
    """Whether step `position` of `total` sends samples back."""
    return position in steps_of(config.rewind_at or (), total)


def restart(config: AMGConfig, total: int) -> int:
    """The step of `total` that samples sent back start from."""
    return round(config.rewind_to * (total - 1))


def hears_alarms(config: AMGConfig, position: int, total: int) -> bool:
    """Whether an alarm at step `position` sends samples back: none does before the step they would go to."""
    return config.early_rewind and bool(config.rewind_at) and position >= restart(config, total)


def screens(config: AMGConfig) -> bool:
    """Whether nothing happens to samples that are not close enough: not where terms act whatever sigma is."""
    return config.gated and config.form != "released"


def affords(config: AMGConfig, flight: Flight, needed: int, plain: int) -> bool:
    """Whether `needed` more network evaluations keep a sample within `max_evaluations` times the `plain`
    number of them."""
    return config.max_evaluations is None or flight.evaluations + needed <= config.max_evaluations * plain


def give_up(config: AMGConfig, flights: Sequence[Flight], refused: Tensor) -> None:
    """Note of the samples that would go back and cannot afford it, `refused` [B] bool, that nothing is left
    to try: what the terms can still do is to push a copy under the metric's threshold."""
    for flight, wanted in zip(flights, refused.tolist(), strict=True):
        if wanted and flight.rewinds < (config.max_rewinds or 0):
            flight.exhausted = True


def too_close(
    config: AMGConfig, index: Any, judges: Sequence[Judge], x0_hat: Tensor, measured: Measured
) -> tuple[Tensor, Tensor]:
    """[B] bool: above the rewind threshold or the guard's, under the index or a further judge of x0_hat [B,
    C, H, W]; and [B] the row of the index that was found close, -1 where it found none."""
    assert config.rewind_threshold is not None
    close = measured.similarity > config.rewind_threshold
    near = torch.where(close, measured.row.to(close.device), -1)
    alike, row = guarded(config, index, measured)
    near = torch.where(alike & ~close, row, near)
    close = close | alike
    for judge in judges:
        asked = config.under(judge.metric)
        limit = asked.threshold if asked.rewind_threshold is None else asked.rewind_threshold
        assert limit is not None
        found = judge.similarity.measure(x0_hat)
        require_finite("similarity", found.similarity)
        alike, _ = guarded(config, judge.index, found)
        close = close | (found.similarity > limit).to(close.device) | alike.to(close.device)
    return close, near


def guarded(config: AMGConfig, index: Any, measured: Measured) -> tuple[Tensor, Tensor]:
    """[B] bool: more alike to a training image than `guard_threshold`, by the index's guard; [B] its row."""
    if index.guard is None or config.guard_threshold is None or measured.images is None:
        return torch.zeros_like(measured.similarity, dtype=torch.bool), torch.full_like(measured.row, -1)
    alike = index.guard.nearest(measured.images)
    device = measured.similarity.device
    return (alike.similarity > config.guard_threshold).to(device), alike.row.to(device)


def send_back(
    config: AMGConfig, index: Any, denoiser: Denoiser, flights: Sequence[Flight], chosen: Tensor, near: Tensor
) -> Tensor:
    """Mark the `chosen` samples [B] bool for the scheduler step that follows, and choose their next captions.

    near: [B], each sample's nearest training image, or -1 where the index did not find it close. Returns
    those marked [B] bool: a sample that went back `max_rewinds` times stays.
    """
    marked = torch.zeros(len(flights), dtype=torch.bool)
    for at, (flight, row, wanted) in enumerate(zip(flights, near.tolist(), chosen.tolist(), strict=True)):
        if wanted and flight.rewinds < (config.max_rewinds or 0):
            marked[at] = flight.pending = True
            if row >= 0:
                despecify(config, index, denoiser, flight, row)
    return marked

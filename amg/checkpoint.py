"""Which samples go back: at a checkpoint those measured too close, at a calibration's alarm those whose free
signal says copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.flight import Flight
from amg.gate import steps_of
from amg.ordinary import despecify
from amg.predict import Denoiser
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


def too_close(config: AMGConfig, judges: Sequence[Judge], x0_hat: Tensor, measured: Measured) -> Tensor:
    """[B] bool: above the rewind threshold, under the index or a further judge of x0_hat [B, C, H, W]."""
    assert config.rewind_threshold is not None
    close = measured.similarity > config.rewind_threshold
    for judge in judges:
        asked = config.under(judge.metric)
        limit = asked.threshold if asked.rewind_threshold is None else asked.rewind_threshold
        assert limit is not None
        close = close | (judge.similarity.measure(x0_hat).similarity > limit).to(close.device)
    return close


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

"""Which steps send samples back, and what one image may cost."""

from __future__ import annotations

import math

from amg.config import AMGConfig
from amg.guidance.flight import Flight
from amg.guidance.gate import steps_of


def is_checkpoint(config: AMGConfig, position: int, total: int) -> bool:
    """Whether step `position` of `total` sends samples back."""
    return position in steps_of(config.rewind_at or (), total)


def is_check(config: AMGConfig, position: int, total: int) -> bool:
    """Whether every sample is due to be measured at step `position` of `total`."""
    if not config.check_at:
        return True
    return position in steps_of((*config.check_at, *(config.rewind_at or ())), total)


def guided_steps(config: AMGConfig, total: int) -> range:
    """The steps of `total` in which classifier-free guidance acts."""
    low, high = config.guidance_interval
    return range(math.ceil(low * (total - 1)), math.floor(high * (total - 1)) + 1)


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

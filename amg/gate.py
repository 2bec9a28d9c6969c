"""Which samples are measured at a step: all at the checks, in between only those already suspected."""

from __future__ import annotations

from collections.abc import Sequence

from amg.config import AMGConfig
from amg.flight import Flight


def steps_of(fractions: Sequence[float], total: int) -> set[int]:
    """The steps 0..total-1 nearest to fractions of the trajectory."""
    return {round(at * (total - 1)) for at in fractions}


def rows_to_check(config: AMGConfig, position: int, total: int, flights: Sequence[Flight]) -> list[int]:
    """The rows whose similarity is measured at step `position` of `total`.

    A sample whose gate was open at its last check is suspected and measured again at every step until it
    closes. Skipping only saves work: finished images are always checked.
    """
    checks = steps_of((*(config.check_at or ()), *(config.rewind_at or ())), total)
    if not config.check_at or position in checks:
        return list(range(len(flights)))
    return [row for row, flight in enumerate(flights) if flight.suspected]

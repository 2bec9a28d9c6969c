"""The sums behind the figures: lines through two step counts, bootstrap intervals, grey levels."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Cost(NamedTuple):
    """Seconds a step and seconds that a call costs with no step at all."""

    step: float
    fixed: float


def line_through(few: int, seconds_few: float, many: int, seconds_many: float) -> Cost:
    """The line through a call's seconds at two numbers of steps; ValueError where they are the same."""
    if few == many:
        raise ValueError(f"`few` and `many` must differ, got {few} and {many}")
    step = (seconds_many - seconds_few) / (many - few)
    return Cost(step, seconds_few - few * step)


def bootstrap(values: Sequence[float], draws: int = 4000, share: float = 0.95) -> tuple[float, float]:
    """The percentile interval of the median of `values`, drawn with a fixed seed."""
    if not values:
        raise ValueError("`values` must not be empty, got none")
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    outside = int(draws * (1 - share) / 2)
    return medians[outside], medians[-1 - outside]


def grey_levels(ours: Tensor, theirs: Tensor) -> list[int]:
    """Of each pair of pictures [B, 3, H, W] in [0, 1] the largest difference in the 8 bits they are
    delivered in; ValueError where a value is not finite."""
    if not bool(ours.isfinite().all()) or not bool(theirs.isfinite().all()):
        raise ValueError("`ours` and `theirs` must be finite, got NaN or infinity")
    shown = [(images.float().clamp(0, 1) * 255).round().flatten(1) for images in (ours, theirs)]
    return [int(levels) for levels in (shown[0] - shown[1]).abs().amax(1).tolist()]

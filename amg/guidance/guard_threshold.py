"""The guard's threshold at a stated rate of false alarms, on ordinary generations of one model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from amg.guidance.calibration import alarm_bound, images_needed

FLOOR = 0.6
"""The least threshold: so alike are one in a hundred of different photographs (CIFAR-10: 0.63)."""
CEILING = 0.88
"""The largest: photos-sd's copies that were pushed under the metric's threshold are at 0.88 and above."""


@dataclass(frozen=True)
class GuardScores:
    """The guard's similarities of finished, unguided generations: `ordinary`, of ordinary prompts' images
    that the metric calls no copies; `copies`, of all that it does. Ascending.

    Never of training images against one another: crops and series of one scene are far more alike than what
    a model draws of an ordinary prompt (of photos-sd's 2.5 % exceed 0.89).
    """

    ordinary: tuple[float, ...]
    copies: tuple[float, ...] = ()

    def threshold(self, false_alarm_rate: float) -> float:
        """The similarity that a further ordinary image exceeds with probability at most `false_alarm_rate`,
        but at least `FLOOR`: the ⌈(n+1)(1−β)⌉-th smallest of n ordinary ones (split conformal prediction,
        whatever the distribution, for exchangeable images).

        Errors: ValueError where there are fewer images than the rate needs, ⌈1/β⌉ − 1, or the threshold
        would be above `CEILING`, where copies pass.
        """
        needed, given = images_needed(false_alarm_rate), len(self.ordinary)
        if given < needed:
            raise ValueError(
                f"`guard_false_alarm_rate` must be at least {1 / (given + 1):.3g} with a calibration of "
                f"{given} ordinary images that are no copies, got {false_alarm_rate:g}, which needs {needed}"
            )
        found = alarm_bound(torch.tensor(self.ordinary, dtype=torch.float64), false_alarm_rate)
        if found > CEILING:
            raise ValueError(
                "`guard_false_alarm_rate` must be larger for the calibration's ordinary images, got "
                f"{false_alarm_rate:g}, whose threshold would be {found:.3f}: above {CEILING:g} copies pass"
            )
        return max(found, FLOOR)

    def caught(self, threshold: float) -> float:
        """The share of the copies above a threshold; NaN of none."""
        above = sum(score > threshold for score in self.copies)
        return above / len(self.copies) if self.copies else math.nan

    def record(self, false_alarm_rate: float) -> dict[str, Any]:
        """What a calibration file says of it, as plain JSON values: `threshold` is None, and `reason` says
        why, where that rate cannot be stated; others may be."""
        threshold, reason = None, None
        try:
            threshold = self.threshold(false_alarm_rate)
        except ValueError as error:
            reason = str(error)
        caught = None if threshold is None or not self.copies else self.caught(threshold)
        return {
            "false_alarm_rate": false_alarm_rate,
            "threshold": threshold,
            "reason": reason,
            "caught": caught,
            "floor": FLOOR,
            "ceiling": CEILING,
            "ordinary": list(self.ordinary),
            "copies": list(self.copies),
        }

    @staticmethod
    def of(record: Mapping[str, Any] | None) -> GuardScores | None:
        """What `record` described; None for None. Errors: KeyError, TypeError, ValueError."""
        if record is None:
            return None
        parts = [tuple(sorted(float(score) for score in record[name])) for name in ("ordinary", "copies")]
        bad = [score for part in parts for score in part if not -1.001 <= score <= 1.001]
        if bad:
            raise ValueError(f"a guard's similarity of {bad[0]}")
        return GuardScores(*parts)


def scores_of(verdicts: Sequence[Any], ordinary: Sequence[bool]) -> GuardScores | None:
    """The scores in the verdicts of unguided generations, and which are of ordinary prompts; None where the
    index has no guard. What the metric alone calls a copy is one: nothing has pushed it here, and the guard
    must not choose what it is calibrated on."""
    if any(verdict.guard is None for verdict in verdicts):
        return None
    copies = [verdict.similarity > verdict.threshold for verdict in verdicts]
    scores = [verdict.guard.similarity for verdict in verdicts]
    rows = [*zip(scores, copies, ordinary, strict=True)]
    return GuardScores(
        tuple(sorted(score for score, copy, asked in rows if asked and not copy)),
        tuple(sorted(score for score, copy, _ in rows if copy)),
    )

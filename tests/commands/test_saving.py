"""`amg calibrate` and `amg distill` say when what they made spares nothing, and why."""

from __future__ import annotations

import math

import pytest

from amg.commands import calibrate, distill
from amg.embed.student import LIMITS, Agreement


def result(before, after, alarm=None, auc=0.7):
    costs = {"ungated": {"measured": before}, "gated": {"measured": after}}
    return {
        "choices": [{"name": "every step", "steps": [0, 1]}, {"name": "preset", "steps": [1], **costs}],
        "signals": {"gap": {"auc": [0.99, auc]}, "move": {"auc": [0.99, 0.5]}},
        "alarm": alarm,
        "miss_rate": 0.1,
    }


def test_a_calibration_that_saves():
    assert calibrate.saving(result(4.0, 1.0)) == (
        "it saves 75 % of the measurements of ordinary images at the preset's checks"
    )


@pytest.mark.parametrize(("before", "after"), [(4.0, 4.0), (4.0, 3.9), (0.0, 0.0)])
def test_a_calibration_that_saves_nothing_says_why(before, after):
    said = calibrate.saving(result(before, after))
    assert said.startswith("it saves nothing on ordinary images") and "it has no alarm" in said
    assert "(best AUC 0.70)" in said and "`--miss-rate`" in said  # of the preset's checks alone
    assert "sends copies back early" in calibrate.saving(result(before, after, {"step": 3}))


def agreement(cut, skipped, correlation=0.9):
    cuts, shares = (cut,) * len(LIMITS), (skipped,) * len(LIMITS)
    return Agreement(0.0, 1.0, 100, 0.9, correlation, 0.5, cuts, shares)


def test_a_student_that_saves():
    said = distill.saving([agreement(0.4, 0.0), agreement(0.4, 0.62), agreement(0.4, math.nan)], 0.05)
    assert said == "it spares up to 62 % of the teacher's looks at what is at most 0.45 close"


def test_a_student_that_saves_nothing_says_why():
    few = distill.saving([agreement(-math.inf, 0.0)] * 3, 0.05)
    assert few.startswith("it saves nothing") and "fewer than 19 of the held-out generations" in few
    unlike = distill.saving([agreement(0.1, 0.01, 0.31), agreement(0.1, 0.0, 0.2)], 0.05)
    assert "correlation at most 0.31" in unlike and "`--train-steps`" in unlike

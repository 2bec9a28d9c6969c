"""The guard's calibrated threshold: against brute force, its rate on new images, and what is refused."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

import amg
from amg.guidance.gate import Gate
from amg.guidance.guard_threshold import CEILING, FLOOR, GuardScores, scores_of
from amg.verdict import GuardVerdict, Neighbour

from .test_gate import written


def scores(count: int, seed: int = 1, low: float = FLOOR, high: float = CEILING) -> tuple[float, ...]:
    chance = torch.Generator().manual_seed(seed)
    drawn = torch.rand(count, generator=chance, dtype=torch.float64) * (high - low) + low
    return tuple(sorted(drawn.tolist()))


@pytest.mark.parametrize("rate", [0.5, 0.1, 0.05, 1 / 3])
def test_the_threshold_is_the_order_statistic_of_brute_force(rate: float) -> None:
    """The least score that at most a share `rate` of n + 1 places lie above."""
    for count in range(math.ceil(1 / rate), 60):
        ordinary = scores(count, count)
        fits = [s for at, s in enumerate(ordinary, 1) if (count + 1 - at) / (count + 1) <= rate + 1e-12]
        assert GuardScores(ordinary).threshold(rate) == min(fits), count


def test_new_ordinary_images_are_marked_at_most_at_the_stated_rate() -> None:
    rate, count, trials = 0.1, 24, 4000
    drawn = torch.rand(trials, count + 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    drawn = drawn * (CEILING - FLOOR) + FLOOR
    marked = sum(
        row[-1].item() > GuardScores(tuple(sorted(row[:-1].tolist()))).threshold(rate) for row in drawn
    )
    exact = math.floor((count + 1) * rate) / (count + 1)
    assert exact <= rate and abs(marked / trials - exact) < 4 * math.sqrt(exact * (1 - exact) / trials)


def test_never_below_the_floor_nor_above_the_ceiling() -> None:
    assert GuardScores(scores(99, high=0.3, low=0.1)).threshold(0.01) == FLOOR
    assert GuardScores((*scores(98), CEILING)).threshold(0.01) == CEILING
    above = (*scores(98), CEILING + 0.01)
    with pytest.raises(ValueError, match=r"`guard_false_alarm_rate` must be larger.*got 0\.01.*be 0\.890"):
        GuardScores(above).threshold(0.01)
    assert GuardScores(above).threshold(0.02) == above[-2]


def test_too_few_images_are_refused_with_the_rate_they_allow() -> None:
    assert GuardScores(scores(99)).threshold(0.01) == scores(99)[-1]
    with pytest.raises(
        ValueError, match=r"at least 0\.0101 with a calibration of 98 .*got 0\.01, which needs 99"
    ):
        GuardScores(scores(98)).threshold(0.01)


def verdict(similarity: float, guard: float | None, threshold: float = 0.5) -> SimpleNamespace:
    said = None if guard is None else SimpleNamespace(similarity=guard, memorized=guard > 0.8)
    return SimpleNamespace(similarity=similarity, threshold=threshold, guard=said)


def test_the_metric_alone_says_what_a_copy_is() -> None:
    """An ordinary image that the guard marks at its default counts, or it would choose its own evidence."""
    verdicts = [
        verdict(0.1, 0.9),
        verdict(0.9, 0.95),
        verdict(0.2, 0.3),
        verdict(0.7, 0.2),
        verdict(0.1, 0.4),
    ]
    found = scores_of(verdicts, [True, True, True, False, False])
    assert found == GuardScores((0.3, 0.9), (0.2, 0.95))
    assert found.caught(0.5) == 0.5 and math.isnan(GuardScores(()).caught(0.5))
    assert scores_of([*verdicts, verdict(0.1, None)], [True] * 6) is None


def test_a_file_keeps_the_scores_and_says_what_cannot_be_stated(tmp_path) -> None:
    kept = GuardScores(scores(20), (0.7, 0.99))
    record = json.loads(json.dumps(kept.record(0.1), allow_nan=False))
    assert record["threshold"] == kept.threshold(0.1) and record["reason"] is None
    assert (record["floor"], record["ceiling"], record["false_alarm_rate"]) == (FLOOR, CEILING, 0.1)
    assert record["caught"] == kept.caught(record["threshold"])
    assert Gate.load(written(tmp_path / "c.json", guard=record)).guard == kept
    assert Gate.load(written(tmp_path / "c.json")).guard is None
    few = kept.record(0.01)
    assert few["threshold"] is None and "which needs 99" in few["reason"]
    assert GuardScores.of(few) == kept


@pytest.mark.parametrize("ordinary", [[2.0], ["x"], None, [float("nan")], 3])
def test_a_damaged_file_is_named(ordinary, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"`calibration` must be a file of `amg calibrate`.*bad\.json"):
        Gate.load(written(tmp_path / "bad.json", guard={"ordinary": ordinary, "copies": []}))


@pytest.mark.parametrize("rate", [0, 1, -0.1, True, "0.01", float("nan")])
def test_a_rate_that_is_none_is_refused(rate) -> None:
    with pytest.raises(ValueError, match="`guard_false_alarm_rate`"):
        amg.AMGConfig.preset("main", guard_false_alarm_rate=rate)


def test_a_verdict_says_the_rate_and_a_further_index_does_not() -> None:
    guard = GuardVerdict(0.9, 0.7421875, Neighbour(3, "three", None), 0.01)
    assert (
        guard.limit == "0.742 (false alarms <= 1 %)"
        and GuardVerdict(0.9, 0.8, guard.neighbour).limit == "0.8"
    )
    whole = amg.Verdict("cosine", 0.1, 0.5, guard.neighbour, True, guard=guard)
    assert whole.reason == "guard 0.900 > 0.742 (false alarms <= 1 %) to 'three'"
    assert amg.Verdict.from_dict(whole.as_dict()) == whole
    config = amg.AMGConfig.preset("main", guard_threshold=0.7, guard_false_alarm_rate=0.01).for_metric(
        "cosine"
    )
    assert (
        config.under("cosine").guard_false_alarm_rate is None
        and config.under("cosine").guard_threshold == 0.7
    )
    assert config.under("nl2").guard_false_alarm_rate is None

"""Thresholds against brute force, the region against float64, and what too few images are told."""

import math

import pytest
import torch

from amg.guidance.calibration import (
    ELBOW_AUC,
    Recorded,
    alarm_bound,
    alarm_of,
    calibrate,
    check_counts,
    cost_of,
    elbow_of,
    halves,
    images_needed,
    miss_bound,
    rank_signal,
    region_of,
)

RATES = (0.5, 0.3, 0.1, 0.05, 1 / 3)


@pytest.mark.parametrize("rate", RATES)
def test_the_bound_is_the_order_statistic_of_brute_force(rate: float) -> None:
    """The largest score that at most a share `rate` of n + 1 places lie below."""
    generator = torch.Generator().manual_seed(1)
    for count in range(images_needed(rate), 45):
        scores = torch.rand(count, generator=generator, dtype=torch.float64)
        ordered = sorted(scores.tolist())
        allowed = [rank for rank in range(1, count + 1) if rank / (count + 1) <= rate + 1e-12]
        assert miss_bound(scores, rate) == ordered[max(allowed) - 1], (rate, count)


@pytest.mark.parametrize("rate", RATES)
def test_one_image_fewer_than_needed_is_refused(rate: float) -> None:
    needed = images_needed(rate)
    assert needed == min(n for n in range(1, 99) if math.floor((n + 1) * rate + 1e-9) >= 1)
    miss_bound(torch.rand(needed), rate)
    if needed > 1:
        with pytest.raises(ValueError, match=f"at least {needed} copies.*got {needed - 1}"):
            miss_bound(torch.rand(needed - 1), rate)


def test_new_copies_are_missed_at_most_at_the_stated_rate() -> None:
    generator = torch.Generator().manual_seed(4)
    rate, trials, count = 0.1, 4000, 24
    scores = torch.randn(trials, count + 1, generator=generator, dtype=torch.float64)
    missed = sum(row[-1].item() < miss_bound(row[:-1], rate) for row in scores) / trials
    exact = math.floor((count + 1) * rate) / (count + 1)
    assert abs(missed - exact) < 4 * math.sqrt(exact * (1 - exact) / trials)


def recorded(copies: int = 40, others: int = 60, steps: int = 6) -> Recorded:
    """Copies whose gap, and from the third step on similarity, is larger; the first five others are drawn
    from memorised prompts."""
    generator = torch.Generator().manual_seed(7)
    count = copies + others
    raw = torch.rand(count, steps, 4, generator=generator, dtype=torch.float64)
    is_copy = torch.arange(count) < copies
    raw[..., 0] += 0.8 * is_copy[:, None]
    similarity = 0.4 * torch.rand(count, steps, generator=generator)
    similarity[:copies, 2:] += 0.5
    return Recorded(raw, similarity, is_copy, torch.arange(count) >= copies + 5)


def test_the_region_is_that_of_ordinary_generations() -> None:
    run = recorded()
    mean, deviation = region_of(run)
    moves = run.raw[45:, :5, 3] ** 0.5
    centre = moves.sum(0) / len(moves)
    torch.testing.assert_close(mean, centre)
    torch.testing.assert_close(deviation, (((moves - centre) ** 2).sum(0) / (len(moves) - 1)) ** 0.5)


def test_too_few_images_are_refused_with_the_number_needed() -> None:
    check_counts(recorded(copies=18), 0.1)
    with pytest.raises(ValueError, match=r"`--miss-rate` 0.1 needs 18 memorised images.*got 17 of 77"):
        check_counts(recorded(copies=17), 0.1)
    check_counts(recorded(others=9), 0.1)
    with pytest.raises(ValueError, match=r"`--ordinary` must give at least 4 .* got 3"):
        check_counts(recorded(others=8), 0.1)


def test_halves_share_both_classes_evenly() -> None:
    copies = torch.rand(41, generator=torch.Generator().manual_seed(1)) < 0.4
    choosing, held_out = halves(copies)
    assert bool((choosing ^ held_out).all())
    for kind in (copies, ~copies):
        assert int((choosing & kind).sum()) - int((held_out & kind).sum()) in (0, 1)


def test_a_signal_smaller_on_copies_is_turned_and_bounded_by_the_held_out_half_alone() -> None:
    copies = torch.arange(60) < 30
    values = torch.where(copies, -1.0, 1.0)[:, None] + 0.9 * torch.rand(60, 2).double()
    ranking = rank_signal(values, copies, 0.2)
    held_out = halves(copies)[1]
    assert ranking.sign == [-1, -1] and ranking.auc == [1, 1] and ranking.skipped == [1, 1]
    assert ranking.threshold == [miss_bound(-values[held_out & copies, step], 0.2) for step in (0, 1)]
    assert all(0 < missed <= 0.2 for missed in ranking.missed)
    changed = values.clone()
    changed[~held_out & copies] -= 5
    assert rank_signal(changed, copies, 0.2).threshold == ranking.threshold


def test_the_elbow_and_the_gate_of_a_run_where_they_are_known() -> None:
    found = calibrate(recorded(), 0.1, {1, 5}, 0.45)
    assert found["similarity"]["auc"][1] < ELBOW_AUC <= found["similarity"]["auc"][2]
    assert found["elbow"]["similarity"] == 2
    assert {rule["signal"] for rule in found["gate"]} <= {"gap", "mean_gap", "combined"}
    assert all(("weights" in rule) == (rule["signal"] == "combined") for rule in found["gate"])
    assert [rule["step"] for rule in found["gate"]] == list(range(6))
    for rule in found["gate"]:
        assert rule["threshold"] == found["signals"][rule["signal"]]["threshold"][rule["step"]]
    every, preset, elbow, after = found["choices"]
    assert (every["steps"], preset["steps"], elbow["steps"]) == ([0, 1, 2, 3, 4, 5], [1, 5], [2])
    assert after["steps"] == [2, 3, 5]
    assert every["ungated"]["measured"] == 6 and every["gated"]["measured"] < 2
    assert every["ungated"]["missed"] == 0 and elbow["gated"]["missed"] <= 0.1
    assert elbow["gated"]["measured"] == pytest.approx(
        1 - found["signals"][found["gate"][2]["signal"]]["skipped"][2]
    )


def test_an_alarm_s_threshold_is_the_held_out_half_s_bound_on_others() -> None:
    """A signal that tells copies from the third step on: the alarm is there, and saves most there."""
    generator = torch.Generator().manual_seed(5)
    copies = torch.arange(140) < 40
    values = torch.rand(140, 6, generator=generator, dtype=torch.float64)
    values[:40, 2:] -= 3.0
    found = alarm_of({"gap": values}, copies, 0.05)
    assert found is not None and (found["step"], found["signal"], found["sign"]) == (2, "gap", -1.0)
    held_out = halves(copies)[1]
    scores = sorted((-values[held_out & ~copies, 2]).tolist())
    assert found["threshold"] == scores[math.ceil(51 * 0.95) - 1]  # 50 others are held out
    assert found["caught"] == 1.0 and found["false"] <= 0.05
    assert alarm_bound(torch.arange(19.0), 0.05) == 18.0


def test_no_alarm_without_a_telling_signal_or_enough_others() -> None:
    copies = torch.arange(140) < 40
    noise = torch.rand(140, 6, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    assert alarm_of({"gap": noise}, copies, 0.05) is None
    telling = {"gap": noise + 3.0 * copies[:, None]}
    assert alarm_of(telling, copies, 0.05) is not None
    assert alarm_of(telling, copies, 0.01) is None  # 1 % needs 99 held out


def test_no_elbow_is_said() -> None:
    assert elbow_of([0.5, 0.9], {}) == {
        "auc": ELBOW_AUC,
        "similarity": None,
        "signal": None,
        "signal_name": None,
    }


def test_costs_are_counted() -> None:
    copies = torch.tensor([True, True, False, False, False])
    close = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0]]).bool()
    skipped = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 1, 1], [1, 1, 0], [0, 0, 0]]).bool()
    gated = cost_of([1, 2], close, skipped, copies)
    assert gated == {"measured": pytest.approx((0 + 1 + 2) / 3), "missed": 0.5, "false_alarms": 0.0}
    ungated = cost_of([1, 2], close, torch.zeros_like(skipped), copies)
    assert ungated == {"measured": 2.0, "missed": 0.0, "false_alarms": pytest.approx(1 / 3)}

"""Paired differences, resampled by prompt."""

from __future__ import annotations

import pytest
import torch

from amg.evaluate.fid import fid_of_features
from amg.evaluate.paired import fid_difference, mean_difference, resampled

PROMPTS = ["a", "a", "b", "c", "c", "c"]


def test_pictures_of_a_prompt_come_along_together():
    counts = resampled(PROMPTS, 50, seed=3)
    assert counts.shape == (50, 6) and torch.equal(counts, resampled(PROMPTS, 50, seed=3))
    for row in counts.tolist():
        assert row[0] == row[1] and row[3] == row[4] == row[5]
        assert row[0] + row[2] + row[3] == 3, "as many prompts as there are"


def test_a_mean_difference_is_that_of_the_pairs():
    base = torch.rand(400, dtype=torch.float64)
    own = base + 0.1 + 0.05 * torch.randn(400, dtype=torch.float64)
    counts = resampled([str(at) for at in range(400)], 2000, seed=0)
    found = mean_difference(own, base, counts)
    assert found.value == pytest.approx(float((own - base).mean()))
    half = 1.96 * float((own - base).std()) / 20  # of the mean of independent pairs
    assert found.low == pytest.approx(found.value - half, abs=half / 5)
    assert found.high == pytest.approx(found.value + half, abs=half / 5)


def test_equal_arms_differ_by_nothing_for_sure():
    scores = torch.rand(6)
    found = mean_difference(scores, scores, resampled(PROMPTS, 100, seed=0))
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_a_difference_of_fid_is_around_its_value():
    pytest.importorskip("torchmetrics")
    reference, base = torch.randn(60, 4), torch.randn(40, 4)
    far = base + 3
    found = fid_difference(far, base, reference, resampled([str(at) for at in range(40)], 20, seed=0))
    assert found.value == pytest.approx(fid_of_features(far, reference) - fid_of_features(base, reference))
    assert 0 < found.low < found.value < found.high
    assert found.high - found.value == pytest.approx(found.value - found.low)

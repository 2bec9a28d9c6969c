import numpy as np
import pytest
import scipy.stats
import torch

from amg.evaluate import bootstrap_interval, memorized_share, top1, top5


def test_share_counts_strictly_above_each_threshold():
    similarity = torch.tensor([0.2, 0.5, 0.500001, 0.9])
    assert memorized_share(similarity, [0.5, 0.7, 0.9]) == (0.5, 0.25, 0.0)


def test_share_in_nl2_counts_distances_below():
    nl2 = torch.tensor([0.3, 1.39, 1.4, 1.7], dtype=torch.float64)
    assert memorized_share(-nl2, [-1.4, -1.6]) == pytest.approx((0.5, 0.75))


def test_top5_and_top1_equal_numpy():
    similarity = torch.from_numpy(np.random.default_rng(0).normal(size=333))
    assert top5(similarity) == pytest.approx(np.percentile(similarity.numpy(), 95), rel=1e-12)
    assert top1(similarity) == similarity.numpy().max()


def test_bootstrap_interval_agrees_with_scipy():
    values = np.random.default_rng(1).normal(size=150)
    low, high = bootstrap_interval(torch.from_numpy(values), lambda v: v.mean().item(), seed=0)
    oracle = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20000, rng=0)
    width = oracle.confidence_interval.high - oracle.confidence_interval.low
    assert low == pytest.approx(oracle.confidence_interval.low, abs=0.05 * width)
    assert high == pytest.approx(oracle.confidence_interval.high, abs=0.05 * width)


def test_bootstrap_interval_repeats_with_its_seed_and_widens_with_its_level():
    values = torch.linspace(0, 1, 40) ** 2
    mean = lambda v: v.mean().item()  # noqa: E731
    assert bootstrap_interval(values, mean, seed=3) == bootstrap_interval(values, mean, seed=3)
    narrow, wide = (bootstrap_interval(values, mean, 3, level=level) for level in (0.5, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize("bad", [torch.empty(0), torch.zeros(2, 2), torch.tensor([0.1, float("nan")])])
def test_unusable_similarity_is_refused(bad):
    for call in (lambda: memorized_share(bad, [0.5]), lambda: top5(bad), lambda: top1(bad)):
        with pytest.raises(ValueError, match="`similarity`"):
            call()

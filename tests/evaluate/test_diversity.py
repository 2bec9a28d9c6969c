import pytest
import torch

from amg.evaluate import diversity, share_interval


def test_diversity_is_the_mean_of_all_pairs():
    vectors = torch.randn(17, 5, generator=torch.Generator().manual_seed(0))
    oracle = torch.pdist(vectors.double()).mean().item()
    assert diversity(vectors) == pytest.approx(oracle, rel=1e-12)
    assert diversity(vectors, block=3) == pytest.approx(oracle, rel=1e-12)


def test_copies_of_one_picture_have_none():
    assert diversity(torch.rand(1, 8).expand(6, 8)) == 0.0


@pytest.mark.parametrize("vectors", [torch.rand(1, 4), torch.rand(4), torch.full((2, 2), torch.nan)])
def test_diversity_refuses(vectors):
    with pytest.raises(ValueError, match="`vectors` must be"):
        diversity(vectors)


def test_share_interval_of_no_hits_is_clopper_pearsons():
    from scipy.stats import beta

    low, high = share_interval(torch.zeros(24), 0)
    assert (low, high) == (0.0, pytest.approx(beta.ppf(0.975, 1, 24), rel=1e-9))
    low, high = share_interval(torch.ones(24), 0)
    assert (low, high) == (pytest.approx(beta.ppf(0.025, 24, 1), rel=1e-9), 1.0)


def test_share_interval_is_close_to_the_binomials_and_repeats():
    from scipy.stats import binom

    hits = (torch.arange(200) < 60).double()
    low, high = share_interval(hits, 3)
    assert share_interval(hits, 3) == (low, high)
    assert low == pytest.approx(binom.ppf(0.025, 200, 0.3) / 200, abs=0.011)
    assert high == pytest.approx(binom.ppf(0.975, 200, 0.3) / 200, abs=0.011)


def test_share_interval_refuses_what_is_no_share():
    with pytest.raises(ValueError, match="`hits` must lie in"):
        share_interval(torch.tensor([0.0, 2.0]), 0)

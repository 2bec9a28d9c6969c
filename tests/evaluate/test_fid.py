import numpy as np
import pytest
import scipy.linalg
import torch

from amg.evaluate import fid, kid

pytest.importorskip("torchmetrics")


@pytest.fixture(scope="module")
def network():
    projection = torch.randn(3 * 8 * 8, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return lambda images: torch.tanh(images.double().flatten(1) @ projection / 4)


@pytest.fixture(scope="module")
def sets():
    generator = torch.Generator().manual_seed(1)
    generated = torch.rand(120, 3, 8, 8, generator=generator)
    return generated, torch.rand(150, 3, 8, 8, generator=generator) ** 1.5


def test_fid_equals_the_formula_with_scipy_sqrtm(network, sets):
    one, other = (network(images).numpy() for images in sets)
    covariance_one, covariance_other = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = scipy.linalg.sqrtm(covariance_one @ covariance_other)
    distance = np.square(one.mean(0) - other.mean(0)).sum()
    oracle = distance + np.trace(covariance_one + covariance_other - 2 * np.real(root))
    assert fid(*sets, network, batch_size=32) == pytest.approx(oracle, rel=1e-8)


def test_fid_of_a_set_with_itself_is_zero_and_batches_do_not_matter(network, sets):
    assert fid(sets[0], sets[0], network) == pytest.approx(0.0, abs=1e-6)
    assert fid(*sets, network, batch_size=7) == pytest.approx(fid(*sets, network, batch_size=150), rel=1e-10)


def test_kid_of_whole_sets_equals_the_unbiased_mmd(network, sets):
    generated, reference = sets[0], sets[1][:120]
    x, y = network(reference).numpy(), network(generated).numpy()
    n = len(x)
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731
    off_diagonal = lambda k: (k.sum() - np.trace(k)) / (n * (n - 1))  # noqa: E731
    oracle = off_diagonal(kernel(x, x)) + off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()
    mean, deviation = kid(generated, reference, network, subsets=3, subset_size=n)
    assert mean == pytest.approx(oracle, rel=1e-8)
    assert deviation == pytest.approx(0.0, abs=1e-10)


def test_kid_repeats_and_leaves_the_global_generator_alone(network, sets):
    state = torch.random.get_rng_state()
    assert kid(*sets, network, subsets=4, seed=5) == kid(*sets, network, subsets=4, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_errors(network, sets):
    with pytest.raises(ValueError, match="`generated` must be float"):
        fid(sets[0][:1], sets[1], network)
    with pytest.raises(ValueError, match="`network` must return"):
        fid(*sets, lambda images: images)

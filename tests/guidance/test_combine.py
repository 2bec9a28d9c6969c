"""The combination of free signals against autograd, and what becomes of degenerate inputs."""

import math

import pytest
import torch

from amg.guidance.combine import RIDGE, features, fit, score
from amg.guidance.signals import SIGNALS, free_signals


def data(count: int = 80) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    copies = torch.rand(count, generator=generator) < 0.4
    inputs = torch.randn(count, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 50.0, 1e-3])
    inputs[:, 0] += 1.5 * copies
    inputs[:, 1] -= 40.0 * copies
    return inputs, copies


def test_the_fit_is_where_the_penalised_likelihood_has_no_slope() -> None:
    inputs, copies = data()
    weights = torch.tensor(fit(inputs, copies), dtype=torch.float64, requires_grad=True)
    odds = weights[0] + inputs @ weights[1:]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(odds, copies.double(), reduction="sum")
    penalty = 0.5 * RIDGE * ((weights[1:] * inputs.std(0)) ** 2).sum()
    (gradient,) = torch.autograd.grad(loss + penalty, weights)
    assert float((gradient / torch.cat([torch.ones(1), inputs.std(0)])).abs().max()) < 1e-3
    torch.testing.assert_close(score(inputs, weights.tolist()), odds.detach())


def test_it_agrees_with_scikit_learn() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    inputs, copies = data()
    standard = (inputs - inputs.mean(0)) / inputs.std(0)
    other = linear.LogisticRegression(C=1 / RIDGE, tol=1e-10, max_iter=10_000).fit(standard, copies)
    wanted = torch.from_numpy(other.decision_function(standard))
    torch.testing.assert_close(score(inputs, fit(inputs, copies)), wanted, atol=1e-4, rtol=1e-4)


def test_a_constant_signal_and_a_separable_one_give_finite_weights() -> None:
    inputs, copies = data()
    inputs[:, 2] = 7.0
    inputs[:, 0] = copies.double() * 100
    weights = fit(inputs, copies)
    assert all(map(math.isfinite, weights)) and weights[3] == 0.0
    assert bool(score(inputs, weights)[copies].min() > score(inputs, weights)[~copies].max())


def test_magnitudes_are_logarithms_and_the_first_step_s_zeros_are_finite() -> None:
    raw = torch.rand(4, 3, 4, generator=torch.Generator().manual_seed(1)).double()
    values = free_signals(raw, torch.ones(2).double(), torch.ones(2).double())
    found = features(values, 0)
    assert found.shape == (4, len(SIGNALS)) and bool(torch.isfinite(found).all())
    torch.testing.assert_close(found[:, 0], 0.5 * raw[:, 0, 0].log())
    torch.testing.assert_close(found[:, 2], values["cosine"][:, 0])

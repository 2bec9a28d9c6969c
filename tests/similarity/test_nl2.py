"""nL2 of an index, its gradients and its exact step, against the float64 oracle."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import amg
from amg.similarity.nl2 import NL2Similarity, nl2_gradient

from .. import oracle, toy


def nl2_gradient_full(x0: Tensor, nearest: Tensor, alpha: float = 0.5) -> Tensor:
    """d sigma / d x0 that differentiates the denominator too; `nearest` [B, k, N], nearest row first.

    The float64 oracle; guidance uses `nl2_gradient`, whose direction needs one row instead of k.
    """
    difference = x0[:, None] - nearest
    distance = difference.square().mean(2).sqrt()
    slopes = difference / (x0.shape[1] * distance[:, :, None])
    denominator = alpha * distance.mean(1)
    top, bottom = slopes[:, 0] / denominator[:, None], alpha * slopes.mean(1)
    return -(top - (distance[:, 0] / denominator**2)[:, None] * bottom)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> amg.Index:
    return toy.build("nl2", Path(tmp_path_factory.mktemp("nl2")) / "pixels.amg")


@pytest.fixture
def similarity(index: amg.Index) -> NL2Similarity:
    return NL2Similarity(index, toy.decode, pixels=True)


def rows_of(index: amg.Index) -> Tensor:
    return index.rows.double() / 255


def near(picture: int = 3, spread: float = 0.3, count: int = 4) -> Tensor:
    """x0_hat in (-1, 1) at growing distances from one training picture."""
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(2)) - 0.5
    share = torch.linspace(0.1, 1, count).view(-1, 1, 1, 1)
    return (toy.training_pictures()[picture].float() / 127.5 - 1 + spread * share * noise).clamp(-0.99, 0.99)


def test_measure_equals_the_definition(index: amg.Index, similarity: NL2Similarity) -> None:
    x0_hat = torch.cat([near(), torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(9)) * 2 - 1])
    measured = similarity.measure(x0_hat)
    for row, image in enumerate(toy.decode(x0_hat).double().flatten(1)):
        sigma, nearest = oracle.nl2(image, rows_of(index))
        assert int(measured.row[row]) == nearest
        assert float(measured.similarity[row]) == pytest.approx(float(sigma), rel=1e-5)
        assert float(measured.extras["distance"][row]) == pytest.approx(
            float(oracle.l2(image, rows_of(index)[nearest])), rel=1e-5
        )


@pytest.mark.parametrize("held", [True, False])
def test_closed_gradients_equal_autograd(held: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    rows = torch.rand(70, 30, generator=generator, dtype=torch.float64)
    images = torch.rand(6, 30, generator=generator, dtype=torch.float64)
    nearest = torch.stack([rows[oracle.l2(image[None], rows).argsort()[:50]] for image in images])
    distance = torch.stack([oracle.l2(image, row[0]) for image, row in zip(images, nearest, strict=True)])
    denominator = 0.5 * torch.stack(
        [oracle.l2(a[None], b).mean() for a, b in zip(images, nearest, strict=True)]
    )
    found = (
        nl2_gradient(images, nearest[:, 0], distance, denominator)
        if held
        else nl2_gradient_full(images, nearest)
    )
    leaf = images.clone().requires_grad_()
    sigma = torch.stack([oracle.nl2(image, rows, held=held)[0] for image in leaf])
    (expected,) = torch.autograd.grad(sigma.sum(), leaf)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert float(expected.norm()) > 0.1


def test_gradient_is_that_of_x0_hat(index: amg.Index, similarity: NL2Similarity) -> None:
    x0_hat = near()
    found = similarity.gradient(x0_hat, similarity.measure(x0_hat))
    leaf = x0_hat.double().requires_grad_()
    sigma = torch.stack([oracle.nl2(toy.decode(one).flatten(), rows_of(index))[0] for one in leaf])
    (expected,) = torch.autograd.grad(sigma.sum(), leaf)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_gradient_runs_through_a_decoder(index: amg.Index) -> None:
    """Latents twice as large in each direction, decoded by pooling and a nonlinearity."""

    def decode(latents: Tensor) -> Tensor:
        return torch.sigmoid(torch.nn.functional.avg_pool2d(latents, 2))

    similarity = NL2Similarity(index, decode, pixels=False)
    latents = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    found = similarity.gradient(latents, similarity.measure(latents))
    leaf = latents.double().requires_grad_()
    sigma = torch.stack([oracle.nl2(image, rows_of(index))[0] for image in decode(leaf).flatten(1)])
    (expected,) = torch.autograd.grad(sigma.sum(), leaf)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("threshold", [-1.4, -1.6, -0.8])
def test_the_exact_step_brings_nl2_to_lambda_with_the_denominator_held(
    index: amg.Index, similarity: NL2Similarity, threshold: float
) -> None:
    x0_hat = near()
    measured = similarity.measure(x0_hat)
    assert bool((measured.similarity > threshold).all())
    moved = toy.decode(x0_hat + similarity.shift(x0_hat, measured, threshold)).double().flatten(1)
    for row, image in enumerate(moved):
        distance = oracle.l2(image, rows_of(index)[measured.row[row]])
        assert float(distance / measured.extras["denominator"][row]) == pytest.approx(-threshold, rel=1e-5)


def test_the_exact_step_equals_the_published_form_in_eps(similarity: NL2Similarity, index: amg.Index) -> None:
    """x0' = n0 + (x0 - n0)·lambda·D/l2, then eps' = eps - sqrt(alpha_bar / (1 - alpha_bar))·(x0' - x0)."""
    x0_hat, threshold, alpha_bar = near().double(), -1.5, 0.42
    measured = similarity.measure(x0_hat.float())
    shift = similarity.shift(x0_hat.float(), measured, threshold)
    change = -math.sqrt(alpha_bar / (1 - alpha_bar)) * shift
    for row in range(len(x0_hat)):
        neighbour = (index.rows[measured.row[row]].double() / 127.5 - 1).view(3, 8, 8)
        distance, denominator = (float(measured.extras[name][row]) for name in ("distance", "denominator"))
        moved = neighbour + (x0_hat[row] - neighbour) * -threshold * denominator / distance
        expected = -((alpha_bar / (1 - alpha_bar)) ** 0.5) * (moved - x0_hat[row])
        torch.testing.assert_close(change[row].double(), expected, rtol=2e-4, atol=2e-5)


def test_a_sample_that_is_far_enough_is_not_moved(similarity: NL2Similarity) -> None:
    x0_hat = near(spread=0.1)
    measured = similarity.measure(x0_hat)
    threshold = float(measured.similarity.max()) + 0.01
    assert float(similarity.shift(x0_hat, measured, threshold).abs().max()) == 0


def test_a_perfect_copy_has_a_finite_gradient_and_step(similarity: NL2Similarity) -> None:
    copy = toy.training_pictures()[:2].float() / 127.5 - 1
    measured = similarity.measure(copy)
    assert measured.similarity.tolist() == pytest.approx([0, 0], abs=1e-4)
    assert bool(torch.isfinite(similarity.gradient(copy, measured)).all())
    assert bool(torch.isfinite(similarity.shift(copy, measured, -1.5)).all())

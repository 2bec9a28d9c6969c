"""Cosine similarity of an index, its gradient and its Newton step, against the float64 oracle."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import amg
from amg.similarity.cosine import CosineSimilarity, embedding_gradient

from .. import oracle, toy


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> amg.Index:
    return toy.build("cosine", Path(tmp_path_factory.mktemp("cosine")) / "toy.amg")


@pytest.fixture
def similarity(index: amg.Index) -> CosineSimilarity:
    return CosineSimilarity(index, toy.decode)


def inside(count: int = 5) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(8)) * 1.8 - 0.9


def look(x0_hat: Tensor, index: amg.Index) -> tuple[Tensor, int]:
    return oracle.cosine(toy.ToyEmbedder()(toy.decode(x0_hat)[None])[0], index.rows.double())


def test_measure_equals_the_definition(index: amg.Index, similarity: CosineSimilarity) -> None:
    x0_hat = inside()
    measured = similarity.measure(x0_hat)
    for row, one in enumerate(x0_hat.double()):
        sigma, nearest = look(one, index)
        assert int(measured.row[row]) == nearest
        assert float(measured.similarity[row]) == pytest.approx(float(sigma), abs=1e-6)


def test_a_training_picture_is_its_own_neighbour(similarity: CosineSimilarity) -> None:
    measured = similarity.measure(toy.training_pictures()[[5, 17]].float() / 127.5 - 1)
    assert measured.row.tolist() == [5, 17]
    assert measured.similarity.tolist() == pytest.approx([1, 1], abs=1e-6)


def test_embedding_gradient_equals_autograd() -> None:
    generator = torch.Generator().manual_seed(4)
    embedding = torch.randn(6, 32, generator=generator, dtype=torch.float64).mul_(3).requires_grad_()
    neighbour = torch.nn.functional.normalize(torch.randn(6, 32, generator=generator, dtype=torch.float64))
    sigma = (neighbour * embedding).sum(1) / embedding.norm(dim=1)
    (expected,) = torch.autograd.grad(sigma.sum(), embedding)
    torch.testing.assert_close(
        embedding_gradient(embedding.detach(), neighbour), expected, rtol=1e-10, atol=1e-10
    )
    across = (embedding_gradient(embedding.detach(), neighbour) * embedding.detach()).sum(1)
    assert float(across.abs().max()) < 1e-12  # sigma does not change with the embedding's length


def test_gradient_runs_through_embedder_and_decoder(index: amg.Index, similarity: CosineSimilarity) -> None:
    x0_hat = inside()
    found = similarity.gradient(x0_hat, similarity.measure(x0_hat))
    leaf = x0_hat.double().requires_grad_()
    (expected,) = torch.autograd.grad(torch.stack([look(one, index)[0] for one in leaf]).sum(), leaf)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_measuring_with_the_gradient_is_measuring_and_the_gradient(similarity: CosineSimilarity) -> None:
    for x0_hat in (inside(), inside() * 2):
        plain, both = similarity.measure(x0_hat), similarity.measure_with_gradient(x0_hat)
        assert torch.equal(both.row, plain.row) and torch.equal(both.similarity, plain.similarity)
        gradient = similarity.gradient(x0_hat, plain)
        some = torch.tensor([3, 0])
        torch.testing.assert_close(similarity.gradient(x0_hat[some], both.take(some)), gradient[some])
        shifts = [similarity.shift(x0_hat, one, 0.1) for one in (plain, both)]
        torch.testing.assert_close(*shifts)


def test_a_saturated_pixel_is_measured_clamped_and_keeps_its_gradient(similarity: CosineSimilarity) -> None:
    """The gradient where sigma is measured, at the clamped picture, without clamping's zeros."""
    x0_hat = inside() * 2
    assert bool((x0_hat.abs() > 1).any())
    clamped = x0_hat.clamp(-1, 1)
    measured, expected = similarity.measure(x0_hat), similarity.measure(clamped)
    torch.testing.assert_close(measured.similarity, expected.similarity)
    torch.testing.assert_close(
        similarity.gradient(x0_hat, measured), similarity.gradient(clamped, expected), rtol=1e-4, atol=1e-6
    )


def test_the_newton_step_comes_close_to_lambda(index: amg.Index, similarity: CosineSimilarity) -> None:
    x0_hat = inside()
    measured = similarity.measure(x0_hat)
    threshold = float(measured.similarity.min()) - 0.02
    moved = x0_hat + similarity.shift(x0_hat, measured, threshold)
    for row, one in enumerate(moved.double()):
        sigma = oracle.cosine(
            toy.ToyEmbedder()(toy.decode(one)[None])[0], index.rows[measured.row[row]][None].double()
        )[0]
        before = float(measured.similarity[row])
        assert abs(float(sigma) - threshold) < 0.35 * (before - threshold)


def test_one_newton_step_is_the_first_order_solution(similarity: CosineSimilarity) -> None:
    x0_hat = inside()
    measured = similarity.measure(x0_hat)
    threshold = float(measured.similarity.min()) - 1e-3
    gradient, shift = similarity.gradient(x0_hat, measured), similarity.shift(x0_hat, measured, threshold)
    change = (gradient * shift).flatten(1).sum(1)
    torch.testing.assert_close(
        measured.similarity + change, torch.full((5,), threshold), rtol=1e-5, atol=1e-5
    )


def test_half_precision_rows_are_read_as_float32(tmp_path: Path) -> None:
    index = amg.Index.build(
        toy.training_pictures(),
        None,
        toy.ToyEmbedder(),
        tmp_path / "half.amg",
        near_duplicate=False,
        progress=False,
    )
    assert index.rows.dtype == torch.float16
    similarity, x0_hat = CosineSimilarity(index, toy.decode), inside(2)
    found = similarity.gradient(x0_hat, similarity.measure(x0_hat))
    leaf = x0_hat.double().requires_grad_()
    (expected,) = torch.autograd.grad(torch.stack([look(one, index)[0] for one in leaf]).sum(), leaf)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=1e-5)

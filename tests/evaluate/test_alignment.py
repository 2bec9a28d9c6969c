import pytest
import torch

from amg.evaluate import alignment, class_accuracy

metrics = pytest.importorskip("sklearn.metrics")


def test_accuracy_equals_sklearn():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 7, generator=generator)
    labels = torch.randint(7, (200,), generator=generator)
    oracle = metrics.accuracy_score(labels.numpy(), logits.argmax(1).numpy())
    assert class_accuracy(logits, labels) == pytest.approx(oracle)


def test_alignment_is_the_mean_probability_of_the_intended_class():
    probabilities = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])
    assert alignment(probabilities, torch.tensor([1, 0, 1])) == pytest.approx((0.8 + 0.5 + 0.1) / 3)


def test_errors():
    with pytest.raises(ValueError, match="summing to 1"):
        alignment(torch.ones(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"integers in \[0, 3\)"):
        class_accuracy(torch.ones(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"`logits` must be \[N, K\]"):
        class_accuracy(torch.ones(2, 3), torch.tensor([0]))

import numpy as np
import pytest
import torch

from amg.evaluate import auc, tpr_at_fpr

metrics = pytest.importorskip("sklearn.metrics")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("decimals", [1, 12])  # one decimal: many ties
def test_equal_to_sklearn(seed, decimals):
    rng = np.random.default_rng(seed)
    labels = rng.random(400) < 0.3
    scores = np.round(rng.normal(size=400) + 1.3 * labels, decimals)
    assert auc(torch.from_numpy(scores), torch.from_numpy(labels)) == pytest.approx(
        metrics.roc_auc_score(labels, scores), rel=1e-12
    )
    false_rate, true_rate, _ = metrics.roc_curve(labels, scores, drop_intermediate=False)
    for fpr in (0.0, 0.01, 0.05, 0.5, 1.0):
        oracle = true_rate[false_rate <= fpr + 1e-12].max()
        assert tpr_at_fpr(torch.from_numpy(scores), torch.from_numpy(labels), fpr) == pytest.approx(oracle)


def test_limits():
    labels = torch.tensor([0, 0, 1, 1])
    assert auc(torch.tensor([0.1, 0.2, 0.3, 0.4]), labels) == 1.0
    assert auc(torch.tensor([0.4, 0.3, 0.2, 0.1]), labels) == 0.0
    assert auc(torch.ones(4), labels) == 0.5
    assert tpr_at_fpr(torch.ones(4), labels, 0.01) == 0.0


def test_errors():
    with pytest.raises(ValueError, match="both classes"):
        auc(torch.rand(4), torch.ones(4))
    with pytest.raises(ValueError, match="bool or 0 and 1"):
        auc(torch.rand(3), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="finite"):
        tpr_at_fpr(torch.tensor([float("nan"), 0.0]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="`fpr`"):
        tpr_at_fpr(torch.rand(2), torch.tensor([0, 1]), 1.5)

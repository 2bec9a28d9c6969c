"""How well a score tells copies from new pictures: ROC area, true positives at few false alarms."""

from __future__ import annotations

import torch


def auc(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Area under the ROC curve: P(score of a positive > score of a negative), ties counting one half.

    scores: float [N], larger = more likely positive; labels: bool or {0, 1} [N], both classes present.
    Mann-Whitney U over its maximum.
    """
    scores, positive = _checked(scores, labels)
    _, inverse, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    last_rank = counts.cumsum(0).double()
    midrank = last_rank - (counts.double() - 1.0) / 2.0
    n_positive = int(positive.sum())
    n_negative = len(scores) - n_positive
    rank_sum = midrank[inverse][positive].sum().item()
    return (rank_sum - n_positive * (n_positive + 1) / 2.0) / (n_positive * n_negative)


def tpr_at_fpr(scores: torch.Tensor, labels: torch.Tensor, fpr: float = 0.01) -> float:
    """Largest true-positive rate of any threshold whose false-positive rate is at most `fpr`.

    scores, labels as in `auc`; fpr in [0, 1]. No interpolation: the rate of a threshold that exists.
    """
    if not 0.0 <= fpr <= 1.0:
        raise ValueError(f"`fpr` must lie in [0, 1], got {fpr}")
    scores, positive = _checked(scores, labels)
    thresholds = torch.unique(scores)
    negatives, positives = scores[~positive].sort().values, scores[positive].sort().values
    false_rate = 1.0 - torch.searchsorted(negatives, thresholds).double() / len(negatives)
    true_rate = 1.0 - torch.searchsorted(positives, thresholds).double() / len(positives)
    allowed = true_rate[false_rate <= fpr + 1e-12]
    return allowed.max().item() if len(allowed) else 0.0


def _checked(scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if scores.ndim != 1 or scores.shape != labels.shape:
        shapes = f"{list(scores.shape)} and {list(labels.shape)}"
        raise ValueError(f"`scores` and `labels` must be [N], got {shapes}")
    scores = scores.detach().to("cpu", torch.float64)
    if not torch.isfinite(scores).all():
        raise ValueError("`scores` must be finite, got NaN or Inf")
    values = labels.to("cpu", torch.float64)
    if not ((values == 0) | (values == 1)).all():
        raise ValueError(f"`labels` must be bool or 0 and 1, got {values.unique().tolist()[:8]}")
    positive = values == 1
    if positive.all() or not positive.any():
        counts = f"{int(positive.sum())} positives of {len(positive)}"
        raise ValueError(f"`labels` must hold both classes, got {counts}")
    return scores, positive

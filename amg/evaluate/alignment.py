"""Does the picture show what was asked: judged by a classifier that took no part in making it."""

from __future__ import annotations

import torch


def class_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of pictures whose most likely class is the intended one, in [0, 1].

    logits: float [N, K] of an independent classifier (or probabilities); labels: integer [N] in [0, K).
    """
    _check("logits", logits, labels)
    return (logits.argmax(1) == labels.to(logits.device)).double().mean().item()


def alignment(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean probability that an independent classifier gives the intended class, in [0, 1].

    probabilities: float [N, K], rows summing to 1 within 1e-3; labels: integer [N] in [0, K).
    """
    _check("probabilities", probabilities, labels)
    sums = probabilities.double().sum(1)
    if (probabilities < 0).any() or ((sums - 1.0).abs() > 1e-3).any():
        span = f"[{sums.min().item():.4g}, {sums.max().item():.4g}]"
        raise ValueError(f"`probabilities` must be >= 0 with rows summing to 1, got sums in {span}")
    chosen = probabilities.gather(1, labels.to(probabilities.device, torch.int64)[:, None])
    return chosen.double().mean().item()


def _check(name: str, scores: torch.Tensor, labels: torch.Tensor) -> None:
    if scores.ndim != 2 or labels.ndim != 1 or len(scores) != len(labels) or len(labels) == 0:
        shapes = f"{list(scores.shape)} and {list(labels.shape)}"
        raise ValueError(f"`{name}` must be [N, K] and `labels` [N] with N >= 1, got {shapes}")
    if not torch.isfinite(scores).all():
        raise ValueError(f"`{name}` must be finite, got NaN or Inf")
    if labels.is_floating_point() or labels.min() < 0 or labels.max() >= scores.shape[1]:
        span = f"{labels.dtype} in [{labels.min().item()}, {labels.max().item()}]"
        raise ValueError(f"`labels` must be integers in [0, {scores.shape[1]}), got {span}")

"""How many images are copies: memorised share, Top5%, Top1, their uncertainty (Chen et al., CVPR 2024)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def memorized_share(similarity: torch.Tensor, thresholds: Sequence[float]) -> tuple[float, ...]:
    """Share of images with similarity > threshold, one per threshold, in [0, 1].

    similarity: float [N] in sigma units (cosine, or -nL2); thresholds in the same units.
    Raises ValueError for an empty, non-finite or not one-dimensional `similarity`.
    """
    values = _finite_vector(similarity, "similarity")
    return tuple((values > threshold).double().mean().item() for threshold in thresholds)


def top5(similarity: torch.Tensor) -> float:
    """95th percentile of the similarity over generated images ("Top5%"), linear interpolation; float [N]."""
    return torch.quantile(_finite_vector(similarity, "similarity"), 0.95).item()


def top1(similarity: torch.Tensor) -> float:
    """Largest similarity over generated images ("Top1"), the closest image of all; float [N]."""
    return _finite_vector(similarity, "similarity").max().item()


def bootstrap_interval(
    values: torch.Tensor,
    statistic: Callable[[torch.Tensor], float],
    seed: int,
    n: int = 2000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of `statistic` over resampled `values` (Efron 1979).

    values: float [N]; statistic: float [N] -> float; n resamples drawn with `seed`; level in (0, 1).
    Returns (low, high) in the unit of the statistic.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"`level` must lie in (0, 1), got {level}")
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}")
    values = _finite_vector(values, "values")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(values), (n, len(values)), generator=generator)
    statistics = torch.tensor([float(statistic(values[row])) for row in rows], dtype=torch.float64)
    tails = torch.tensor([(1.0 - level) / 2.0, (1.0 + level) / 2.0], dtype=torch.float64)
    low, high = torch.quantile(statistics, tails).tolist()
    return low, high


def share_interval(hits: torch.Tensor, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of the share `hits.mean()`: bootstrap, or exact binomial where resampling cannot vary.

    hits: float [N] in [0, 1], one per independent unit: 0 or 1 per image, or the share of a prompt's images
    (images of one prompt resemble one another, so prompts are what is resampled). Where all are 0 or all are
    1 every resample is alike and the bootstrap would claim certainty; then Clopper and Pearson's bound.
    """
    values = _finite_vector(hits, "hits")
    if (values < 0).any() or (values > 1).any():
        raise ValueError(f"`hits` must lie in [0, 1], got {values.min().item():g} to {values.max().item():g}")
    bound = ((1.0 - level) / 2.0) ** (1.0 / len(values))
    if (values == 0).all():
        return 0.0, 1.0 - bound
    if (values == 1).all():
        return bound, 1.0
    return bootstrap_interval(values, lambda resample: resample.mean().item(), seed, level=level)


def _finite_vector(values: torch.Tensor, name: str) -> torch.Tensor:
    if values.ndim != 1 or values.numel() == 0:
        raise ValueError(f"`{name}` must be [N] with N >= 1, got {list(values.shape)}")
    values = values.detach().to("cpu", torch.float64)
    if not torch.isfinite(values).all():
        raise ValueError(f"`{name}` must be finite, got {int((~torch.isfinite(values)).sum())} NaN or Inf")
    return values

"""What changes between two ways of drawing the same prompts from the same noise, with its uncertainty.

Pictures of one prompt resemble one another, so prompts are what is resampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amg.evaluate.fid import fid_of_features


@dataclass(frozen=True)
class Difference:
    """A difference and its percentile bootstrap interval."""

    value: float
    low: float
    high: float


def resampled(prompts: Sequence[str], draws: int, seed: int) -> Tensor:
    """Prompts drawn with replacement, `draws` times: how often each picture came along, int64 [draws, N]."""
    places = {prompt: at for at, prompt in enumerate(dict.fromkeys(prompts))}
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(places), (draws, len(places)), generator=generator)
    counts = torch.zeros(draws, len(places), dtype=torch.int64)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn))
    return counts[:, [places[prompt] for prompt in prompts]]


def mean_difference(own: Tensor, base: Tensor, counts: Tensor, level: float = 0.95) -> Difference:
    """mean(own) − mean(base) of scores [N] of the same prompts and noise, resampled by `counts` [R, N]."""
    apart = own.double() - base.double()
    means = counts.double() @ apart / counts.sum(1)
    return Difference(float(apart.mean()), *_ends(means, level))


def fid_difference(
    own: Tensor, base: Tensor, reference: Tensor, counts: Tensor, level: float = 0.95
) -> Difference:
    """FID(own) − FID(base) against `reference` [M, D], of features [N, D] of the same prompts and noise.

    Repeated pictures bias FID upwards, so of the resampled differences the width alone is taken.
    """

    def fid(features: Tensor) -> float:
        return fid_of_features(features, reference)

    value = fid(own) - fid(base)
    low, high = _ends(torch.tensor([_of_resample(fid, own, base, row) for row in counts]), level)
    return Difference(value, value - (high - low) / 2, value + (high - low) / 2)


def _of_resample(statistic: Callable[[Tensor], float], own: Tensor, base: Tensor, counts: Tensor) -> float:
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return statistic(own[rows]) - statistic(base[rows])


def _ends(values: Tensor, level: float) -> tuple[float, float]:
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(values.double(), tails).tolist()
    return low, high

"""One score out of all free signals of a step: logistic regression with a ridge, by Newton's method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

COMBINED = "combined"
RIDGE = 1.0  # of the standardised features' weights
ITERATIONS = 30
LEAST = 1e-12  # magnitudes are taken as logarithms; some are 0 at the first step


def features(values: Mapping[str, Tensor], step: int) -> Tensor:
    """The free signals of `free_signals` at one step, float64 [N, F]: magnitudes as logarithms."""
    columns = []
    for name, value in values.items():
        column = value[:, step].double()
        columns.append(column if name == "cosine" else column.clamp_min(LEAST).log())
    return torch.stack(columns, 1)


def fit(inputs: Tensor, copies: Tensor) -> list[float]:
    """The weights of `score`: bias, then one per feature. inputs float64 [N, F], copies bool [N]."""
    mean, deviation = inputs.mean(0), inputs.std(0)
    scale = torch.where(deviation > 1e-9, 1 / deviation.clamp_min(1e-9), 0.0)
    design = torch.cat([torch.ones(len(inputs), 1, dtype=torch.float64), (inputs - mean) * scale], 1)
    ridge = torch.full((design.shape[1],), RIDGE, dtype=torch.float64)
    ridge[0] = 1e-6  # the bias is free, but finite where one class is missing
    weights = torch.zeros(design.shape[1], dtype=torch.float64)
    for _ in range(ITERATIONS):
        chance = (design @ weights).sigmoid()
        gradient = design.T @ (chance - copies.double()) + ridge * weights
        curvature = (design.T * (chance * (1 - chance))) @ design + torch.diag(ridge)
        weights = weights - torch.linalg.solve(curvature, gradient)
    slopes = weights[1:] * scale
    return [float(weights[0] - slopes @ mean), *slopes.tolist()]


def score(inputs: Tensor, weights: Sequence[float]) -> Tensor:
    """The log odds of being a copy, float64 [N]; inputs [N, F] of `features`."""
    table = torch.tensor(weights, dtype=torch.float64, device=inputs.device)
    return table[0] + inputs @ table[1:]

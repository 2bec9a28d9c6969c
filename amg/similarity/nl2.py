"""Normalised L2 distance to the nearest training image (Carlini et al. 2023, arXiv 2301.13188), sigma = -nL2.

nL2 = l2(x0_hat, n0) / D, D = alpha·mean of l2 over the k nearest rows, l2(a, b) = sqrt(mean((a - b)²)).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from amg.embed.precision import carried_back, recorded
from amg.guidance.terms import newton_shift, per_sample
from amg.similarity import Measured, of_measured, pictures


def nl2_gradient(x0: Tensor, neighbour: Tensor, distance: Tensor, denominator: Tensor) -> Tensor:
    """d sigma / d x0 with the denominator held constant: -(x0 - n0) / (N·l2·D); [B, N] flattened images."""
    return -(x0 - neighbour) / (x0.shape[1] * distance * denominator)[:, None]


class NL2Similarity:
    """nL2 over a pixel index. `pixels`: x0_hat is itself the picture in [-1, 1]; otherwise gradients pass
    `decode`."""

    def __init__(self, index: Any, decode: Callable[[Tensor], Tensor], *, pixels: bool):
        self.index, self.decode, self.pixels = index, decode, pixels

    @torch.no_grad()
    def measure(self, x0_hat: Tensor) -> Measured:
        images = pictures(self.decode, x0_hat).clamp(0, 1)
        similarity, row, extras = self.index.nearest(self.index.encode(images))
        scales = {"distance": extras.distance, "denominator": extras.denominator}
        return Measured(similarity, row, scales, images)

    def measure_with_gradient(self, x0_hat: Tensor) -> Measured:
        return self.measure(x0_hat)

    def gradient(self, x0_hat: Tensor, measured: Measured) -> Tensor:
        leaf, images = recorded(lambda x0: self.index.encode(self.decode(x0).float()), x0_hat)
        distance = measured.extras["distance"].clamp(min=1e-6)
        cotangent = nl2_gradient(
            images.detach(), self._neighbour(measured, images), distance, measured.extras["denominator"]
        )
        return of_measured(carried_back(images, leaf, cotangent), measured)

    def shift(self, x0_hat: Tensor, measured: Measured, threshold: float | Tensor) -> Tensor:
        """Pixels: x0' - x0_hat with x0' = n0 + (x0_hat - n0)·lambda·D/l2, lambda on the nL2 scale. Else one
        Newton step."""
        if not self.pixels:
            return newton_shift(self.gradient(x0_hat, measured), measured.similarity, threshold)
        image = x0_hat.clamp(-1, 1)
        neighbour = self._neighbour(measured, image).view_as(image) * 2 - 1
        wanted = -threshold * measured.extras["denominator"] / measured.extras["distance"].clamp(min=1e-6)
        return (image - neighbour) * per_sample((wanted - 1).clamp(min=0), image)

    def _neighbour(self, measured: Measured, like: Tensor) -> Tensor:
        rows = self.index.rows[measured.row.to(self.index.rows.device)]
        return rows.to(like.device, torch.float32) / 255

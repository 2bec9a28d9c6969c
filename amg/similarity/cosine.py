"""Cosine similarity of x0_hat's embedding to the nearest training image's (the paper's sigma =
E(x0_hat)·E(n0))."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from amg.flight import Flight
from amg.guidance import newton_shift, require_finite
from amg.similarity import Measured


def embedding_gradient(embedding: Tensor, neighbour: Tensor) -> Tensor:
    """d sigma / d e = (w - sigma·e/|e|) / |e|, e [B, D] un-normalised, w [B, D] unit vectors, sigma =
    w·e/|e|."""
    norm = embedding.norm(dim=1, keepdim=True)
    unit = embedding / norm
    return (neighbour - (unit * neighbour).sum(1, keepdim=True) * unit) / norm


class CosineSimilarity:
    """Decode, embed, search; the gradient runs back through embedder and decoder from the closed form
    above. `lazy`: a flight's searches read the whole index only where its kept rows prove nothing."""

    def __init__(self, index: Any, decode: Callable[[Tensor], Tensor], *, lazy: bool = False):
        self.index, self.decode, self.lazy = index, decode, lazy

    @torch.no_grad()
    def measure(
        self, x0_hat: Tensor, flights: Sequence[Flight] | None = None, limit: float = -math.inf
    ) -> Measured:
        images, embedding = self._embed(x0_hat)
        return self._nearest(embedding, flights, limit)._replace(images=images)

    def measure_with_gradient(self, x0_hat: Tensor, flights: Sequence[Flight] | None = None) -> Measured:
        with torch.enable_grad():
            leaf = x0_hat.detach().requires_grad_()
            _, embedding = self._embed(leaf)
        measured = self._nearest(embedding.detach(), flights)
        return measured._replace(extras={"gradient": self._back(embedding, leaf, measured)})

    def gradient(self, x0_hat: Tensor, measured: Measured) -> Tensor:
        if "gradient" in measured.extras:
            return measured.extras["gradient"]
        with torch.enable_grad():
            leaf = x0_hat.detach().requires_grad_()
            _, embedding = self._embed(leaf)
        return self._back(embedding, leaf, measured)

    def shift(self, x0_hat: Tensor, measured: Measured, threshold: float) -> Tensor:
        return newton_shift(self.gradient(x0_hat, measured), measured.similarity, threshold)

    def _embed(self, x0_hat: Tensor) -> tuple[Tensor, Tensor]:
        """The picture decode(x0_hat) clamped to [0, 1], and E of it; clamping is an identity to gradients, so
        that a saturated pixel can still come back."""
        require_finite("x0_hat", x0_hat)
        images = self.decode(x0_hat)
        images = images + (images.clamp(0, 1) - images).detach()
        embedding: Tensor = self.index.embedder(images)
        require_finite("embedding", embedding)
        return images, embedding

    def _nearest(
        self, embedding: Tensor, flights: Sequence[Flight] | None, limit: float = -math.inf
    ) -> Measured:
        unit = torch.nn.functional.normalize(embedding.float())
        kept = [flight.kept for flight in flights] if self.lazy and flights is not None else None
        similarity, row, _ = self.index.nearest(unit, kept, limit)
        return Measured(similarity, row, {})

    def _back(self, embedding: Tensor, leaf: Tensor, measured: Measured) -> Tensor:
        neighbour = self.index.rows[measured.row.to(self.index.rows.device)].to(leaf.device, torch.float32)
        cotangent = embedding_gradient(embedding.detach().float(), neighbour).to(embedding.dtype)
        (gradient,) = torch.autograd.grad(embedding, leaf, cotangent)
        require_finite("similarity_grad", gradient)
        return gradient

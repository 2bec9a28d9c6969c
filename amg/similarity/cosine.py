"""Cosine similarity of x0_hat's embedding to the nearest training image's (the paper's sigma =
E(x0_hat)·E(n0))."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amg.embed.precision import carried_back, embedded, recorded
from amg.guidance.terms import newton_shift
from amg.similarity import Measured, of_measured, pictures


def embedding_gradient(embedding: Tensor, neighbour: Tensor) -> Tensor:
    """d sigma / d e = (w - sigma·e/|e|) / |e|, e [B, D] un-normalised, w [B, D] unit vectors, sigma =
    w·e/|e|."""
    norm = embedding.norm(dim=1, keepdim=True)
    unit = embedding / norm
    return (neighbour - (unit * neighbour).sum(1, keepdim=True) * unit) / norm


class _Graph(NamedTuple):
    """Two halves of a graph: leaf -> images (decoding); picture, the images clamped -> embedding."""

    leaf: Tensor
    images: Tensor
    picture: Tensor
    embedding: Tensor


class CosineSimilarity:
    """Decode, embed, search; the gradient runs back through embedder and decoder from the closed form
    above."""

    def __init__(self, index: Any, decode: Callable[[Tensor], Tensor]):
        self.index, self.decode = index, decode

    @torch.no_grad()
    def measure(self, x0_hat: Tensor) -> Measured:
        images = self._pictures(x0_hat).clamp(0, 1)
        return self._nearest(self._embed(images), images)

    def measure_with_gradient(self, x0_hat: Tensor) -> Measured:
        graph = self._graph(x0_hat)
        measured = self._nearest(graph.embedding.detach(), graph.picture.detach())
        return measured._replace(extras={"gradient": self._back(graph, measured)})

    def gradient(self, x0_hat: Tensor, measured: Measured) -> Tensor:
        if "gradient" in measured.extras:
            return measured.extras["gradient"]
        return self._back(self._graph(x0_hat), measured)

    def shift(self, x0_hat: Tensor, measured: Measured, threshold: float | Tensor) -> Tensor:
        return newton_shift(self.gradient(x0_hat, measured), measured.similarity, threshold)

    def _pictures(self, x0_hat: Tensor) -> Tensor:
        return pictures(self.decode, x0_hat)

    def _embed(self, images: Tensor) -> Tensor:
        return embedded(self.index.embedder, images)

    def _graph(self, x0_hat: Tensor) -> _Graph:
        leaf, images = recorded(self._pictures, x0_hat)
        picture, embedding = recorded(self._embed, images.detach().clamp(0, 1))
        return _Graph(leaf, images, picture, embedding)

    def _nearest(self, embedding: Tensor, images: Tensor) -> Measured:
        similarity, row, _ = self.index.nearest(embedding)
        return Measured(similarity, row, {}, images)

    def _back(self, graph: _Graph, measured: Measured) -> Tensor:
        """Back to the picture, then to x0_hat: a saturated pixel, clamped in between, can still come back."""
        rows = self.index.rows
        neighbour = rows[measured.row.to(rows.device)].to(graph.leaf.device, torch.float32)
        cotangent = embedding_gradient(graph.embedding.detach().float(), neighbour)
        on_picture = carried_back(graph.embedding, graph.picture, cotangent)
        return of_measured(carried_back(graph.images, graph.leaf, on_picture), measured)

"""x0_hat -> similarity to the nearest training image, and its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from amg.index.usable import nan_unless_finite, where_rows


class Measured(NamedTuple):
    """What one measurement found: `similarity` [B] (sigma), `row` [B] (the neighbour), `extras` of the
    metric, and the `images` [B, 3, H, W] in [0, 1] that were measured, where they are at hand."""

    similarity: Tensor
    row: Tensor
    extras: dict[str, Tensor]
    images: Tensor | None = None

    def take(self, rows: Tensor) -> Measured:
        """What was measured of some rows."""
        extras = {name: value[rows] for name, value in self.extras.items()}
        images = None if self.images is None else self.images[rows]
        return Measured(self.similarity[rows], self.row[rows], extras, images)


class Similarity(Protocol):
    """One metric over one index; x0_hat is [B, C, H, W] in the denoiser's own space (pixels in [-1, 1] or
    latents).

    Nothing here looks at a value. Of a sample whose x0_hat, picture or gradient is not finite, similarity,
    gradient and shift are NaN throughout; the others are what they would be without it.
    """

    def measure(self, x0_hat: Tensor) -> Measured:
        """Similarity and nearest row of every sample."""

    def measure_with_gradient(self, x0_hat: Tensor) -> Measured:
        """`measure`, and in one go what `gradient` and `shift` need next."""

    def gradient(self, x0_hat: Tensor, measured: Measured) -> Tensor:
        """d sigma / d x0_hat."""

    def shift(self, x0_hat: Tensor, measured: Measured, threshold: float | Tensor) -> Tensor:
        """The change of x0_hat along the gradient's direction that brings sigma down to `threshold`, one for
        all samples or [B]."""


def pictures(decode: Callable[[Tensor], Tensor], x0_hat: Tensor) -> Tensor:
    """decode(x0_hat) in float32; NaN throughout where that or x0_hat is not finite, as clamping would make an
    infinity white."""
    return nan_unless_finite(decode(nan_unless_finite(x0_hat)).float())


def of_measured(gradient: Tensor, measured: Measured) -> Tensor:
    """`gradient` [B, ...], NaN throughout where it is not finite or the similarity is NaN: a clamp on the way
    back makes zeros of them."""
    return nan_unless_finite(where_rows(~measured.similarity.isnan(), gradient, math.nan))


class Judge(NamedTuple):
    """A further index the finished images are held to, and its similarity of x0_hat."""

    index: Any
    similarity: Similarity

    @property
    def metric(self) -> str:
        """The index's."""
        return str(self.index.metric)


def similarity_for(index: Any, denoiser: Any) -> Similarity:
    """The similarity of an index's metric for a denoiser's x0_hat."""
    from amg.similarity.cosine import CosineSimilarity
    from amg.similarity.nl2 import NL2Similarity

    if index.metric == "cosine" and index.embedder is None:
        raise ValueError("`index` must have its embedder attached to guide: Index.open(path, embedder)")
    if index.metric == "cosine":
        return CosineSimilarity(index, denoiser.decode)
    return NL2Similarity(index, denoiser.decode, pixels=denoiser.pixels)


def judges_for(also: Sequence[Any], denoiser: Any) -> tuple[Judge, ...]:
    """The further indexes `also` as judges of a denoiser's x0_hat."""
    return tuple(Judge(index, similarity_for(index, denoiser)) for index in also)

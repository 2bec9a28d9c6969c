"""Which of an index's pictures a given picture is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from amg.index.change.contents import Contents
from amg.index.encode import check_embedder, resize_images, resize_to_embed, unit_vectors
from amg.index.errors import IndexBuildError
from amg.index.guard import sketch
from amg.index.shards import to_float
from amg.index.sources import open_source
from amg.index.store import DTYPES

# Levels of 255 on average, cosines: other decoders and resizers differ a little.
SAME_PIXELS, SAME_COSINE, SAME_SKETCH = 2.0, 0.999, 0.99
BLOCK_VALUES = 1 << 22


def contents_of(contents: Contents, pictures: Any, embedder: Any) -> set[tuple[int, int]]:
    """What the index holds of given pictures, as `Index.build` takes them: the contents (hashes of vector and
    sketch) of those that are the same but for how they were decoded. Raises IndexBuildError for one that it
    does not hold, or without the embedder; EmbedderMismatch."""
    manifest = contents.manifest
    if manifest.metric == "cosine":
        if embedder is None:
            raise IndexBuildError("`pictures` of an index of embeddings need its `embedder`, got None")
        check_embedder(embedder, manifest)
    found: set[tuple[int, int]] = set()
    by_place = {place: pair for pair, place in contents.places.items()}
    for image in open_source(pictures, background=manifest.background).read(0):
        pixels = to_float(image.load().pixels)[None]
        places = [*_alike(contents, _vector(contents, pixels, embedder), sketch(pixels)[0])]
        if not places:
            raise IndexBuildError(f"`pictures`: the index does not hold {image.source}")
        found |= {by_place[place] for place in places if place in by_place}
    return found


def _vector(contents: Contents, pixels: Tensor, embedder: Any) -> Tensor:
    manifest = contents.manifest
    if manifest.metric == "nl2":
        return (resize_images(pixels, manifest.image_size) * 255).round().clamp(0, 255).flatten()
    with torch.no_grad():
        vector = unit_vectors(resize_to_embed(pixels, manifest.image_size), embedder)[0]
    return vector.to("cpu", DTYPES[manifest.dtype]).float()


def _alike(contents: Contents, vector: Tensor, shape: Tensor) -> Iterator[int]:
    first = 0
    for part in contents.vectors:
        for block in part.split(max(1, BLOCK_VALUES // part.shape[1])):
            if contents.manifest.metric == "nl2":
                close = (block.float() - vector).abs().mean(1) <= SAME_PIXELS
            else:
                close = block.float() @ vector >= SAME_COSINE
            for place in (first + close.nonzero()[:, 0]).tolist():
                if _same_shape(contents.guard[place], shape):
                    yield place
            first += len(block)


def _same_shape(own: Tensor, other: Tensor) -> bool:
    """Of sketches; one without edges is zero, one of imported vectors empty."""
    if not len(own) or not (own.any() or other.any()):
        return True
    return float(own.float() @ other.float()) >= SAME_SKETCH * float(
        own.float().norm() * other.float().norm()
    )

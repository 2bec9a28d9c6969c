"""Images → what an index stores or compares: unit vectors under an embedder, or flattened pixels."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn.functional import interpolate

from amg.embed.precision import embedded
from amg.index.errors import EmbedderMismatch
from amg.index.store import EmbedderRecord, Manifest
from amg.index.usable import directions, require_directions

MOST_SQUARES = 16


class Embedder(Protocol):
    """float [B, 3, H, W] in [0, 1] → [B, dimension]; `sha` is of the weights, `preprocessing` optional."""

    name: str
    dimension: int
    sha: str

    def __call__(self, images: torch.Tensor, /) -> torch.Tensor: ...


def embedder_record(embedder: Any) -> EmbedderRecord:
    """What the manifest says of an embedder. Raises TypeError when it lacks an attribute."""
    if isinstance(embedder, str):
        raise TypeError(f"`embedder` must be callable, got {embedder!r}: give amg.embed.load({embedder!r})")
    for attribute, kind in (("name", str), ("dimension", int), ("sha", str)):
        value = getattr(embedder, attribute, None)
        if not callable(embedder) or not isinstance(value, kind):
            raise TypeError(
                "`embedder` must be a callable with `name: str`, `dimension: int` and `sha: str`; "
                f"{type(embedder).__name__}.{attribute} is {value!r}"
            )
    return EmbedderRecord(embedder.name, embedder.sha, str(getattr(embedder, "preprocessing", "")))


def check_embedder(embedder: Any, manifest: Manifest) -> None:
    """The embedder is the one the index was built with. Raises EmbedderMismatch naming what differs."""
    found, expected = embedder_record(embedder), manifest.embedder
    if expected is None:
        raise EmbedderMismatch(f"`embedder`: a pixel index has none, got {found.name!r}")
    pairs = {"name": (expected.name, found.name), "dimension": (manifest.dimension, embedder.dimension)}
    known = {"sha": (expected.sha256, found.sha256)}
    known["preprocessing"] = (expected.preprocessing, found.preprocessing)
    if manifest.imported is not None:  # of what made its vectors no more than the name may be known
        known = {key: pair for key, pair in known.items() if pair[0]}
    pairs |= known
    different = [f"{key} {ours!r}, got {theirs!r}" for key, (ours, theirs) in pairs.items() if ours != theirs]
    if different:
        raise EmbedderMismatch(f"`embedder` must be the one the index was built with: {'; '.join(different)}")


def resize_images(images: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    """[B, 3, H, W] → [B, 3, *size], bilinear, antialiased, aspect not kept; unchanged at that size."""
    if size is None or tuple(images.shape[-2:]) == size:
        return images
    return interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)


def is_long(height: int, width: int) -> bool:
    """Whether a picture is so long that to scale its short side up may make a giant of it."""
    return max(height, width) > MOST_SQUARES * min(height, width)


def resize_to_embed(images: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    """[B, 3, H, W] as an embedder gets it: resize_images(), and of what is more than MOST_SQUARES times as
    long as wide the long side squeezed to that, so that scaling the short side up stays bounded."""
    images = resize_images(images, size)
    height, width = images.shape[-2:]
    if not is_long(height, width):
        return images
    return resize_images(images, (min(height, MOST_SQUARES * width), min(width, MOST_SQUARES * height)))


def unit_vectors(images: torch.Tensor, embedder: Any) -> torch.Tensor:
    """float [B, 3, H, W] in [0, 1] → unit fp32 [B, dimension], differentiable if the embedder is.

    Raises ValueError for an output of another shape, of an integer dtype, non-finite, or zero.
    """
    return require_directions(embedded_directions(images, embedder), f"embedder {embedder.name!r} returned")


def embedded_directions(images: torch.Tensor, embedder: Any) -> torch.Tensor:
    """`unit_vectors` that looks at no value: NaN in the rows that are non-finite or zero."""
    found = embedded(embedder, images)
    expected = (len(images), embedder.dimension)
    if not isinstance(found, torch.Tensor) or tuple(found.shape) != expected or not found.is_floating_point():
        got = f"{list(found.shape)} {found.dtype}" if isinstance(found, torch.Tensor) else type(found)
        raise ValueError(f"embedder {embedder.name!r} must return float {list(expected)}, got {got}")
    return directions(found)

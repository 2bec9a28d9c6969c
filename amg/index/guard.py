"""The guard: a structural similarity that guidance never differentiates, kept for every picture indexed.

A metric that guidance has pushed below its threshold is no evidence any more. The guard is another measure
of the same pictures, which only ever looks: the cosine of their luminance gradients at 32x32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

import amg.kernels
from amg.index.errors import IndexVersionError
from amg.index.store import GUARD, Manifest, map_file
from amg.index.usable import nan_unless_finite, where_rows

SKETCH = "forward differences of luminance (Rec. 601) at 32x32, unit norm, version 1"
SKETCH_SIDE = 32
SKETCH_LENGTH = 2 * SKETCH_SIDE**2
SKETCH_DTYPE = torch.float16
LUMINANCE = (0.299, 0.587, 0.114)
FLAT = 0.05  # norm of the differences below which a picture has no structure to be recognised by


class Alike(NamedTuple):
    """Each picture's most alike training image: cosine of the sketches [B] fp32, row of the index [B]."""

    similarity: Tensor
    row: Tensor


@dataclass(frozen=True)
class Guard:
    """Sketches [G, 2048] fp16 of every picture indexed, folded ones too, and the row [G] that stands for each
    of them."""

    sketches: Tensor
    rows: Tensor

    def nearest(self, images: Tensor) -> Alike:
        """`images` float [B, 3, H, W], of which [0, 1] counts, anywhere -> Alike on the images' device.

        Exact search over all sketches, of each picture as it is and mirrored, whichever is closer: a model
        trained with flips repeats its pictures that way too. A picture without structure is like none (0).
        Looks at no value: of a picture that is not finite similarity is NaN and row 0.
        """
        return most_alike(images, self._search)

    def _search(self, directions: Tensor) -> Alike:
        found = amg.kernels.top1_cosine(directions.to(self.sketches.device), self.sketches)
        return Alike(found.similarity, self.rows[found.row])

    def to(self, device: torch.device) -> Guard:
        """This guard with its sketches on another device."""
        return Guard(self.sketches.to(device), self.rows.to(device))


def map_guard(directory: Path, manifest: Manifest, folded: Tensor) -> Guard | None:
    """The guard of an index on disk, None where it has none; `folded` [M]: the rows of its folded pictures.
    Raises IndexVersionError for sketches made in another way."""
    if manifest.guard is None:
        return None
    if manifest.guard != SKETCH:
        raise IndexVersionError(
            f"{directory / GUARD} holds {manifest.guard!r}, this package compares {SKETCH!r}: "
            "build the index again"
        )
    sketches = map_file(directory / GUARD, SKETCH_DTYPE, manifest.count + manifest.members, SKETCH_LENGTH)
    return Guard(sketches, torch.cat([torch.arange(manifest.count), folded]))


@torch.no_grad()
def most_alike(images: Tensor, search: Callable[[Tensor], Alike]) -> Alike:
    """What Guard.nearest says, where `search` finds the sketch closest to each of directions [2B, 2048]."""
    images = nan_unless_finite(images)
    found = search(torch.cat([_directions(images), _directions(images.flip(-1))]))
    similarity, view = found.similarity.view(2, -1).max(0)
    row = where_rows(~similarity.isnan(), found.row.view(2, -1).gather(0, view[None])[0], 0)
    return Alike(similarity.to(images.device), row.to(images.device))


@torch.no_grad()
def sketch(images: Tensor) -> Tensor:
    """float [B, 3, H, W] in [0, 1] -> fp16 [B, 2048]: unit vectors, shorter the flatter a picture is below
    `FLAT`."""
    differences = _differences(images)
    return (differences / differences.norm(dim=1, keepdim=True).clamp(min=FLAT)).to(SKETCH_DTYPE)


def _directions(images: Tensor) -> Tensor:
    """The queries' sketches, fp32, never zero: what a flat one lacks lies in a coordinate no sketch uses."""
    differences = _differences(images)
    missing = (FLAT**2 - differences.square().sum(1)).clamp(min=0).sqrt()
    differences[:, SKETCH_SIDE - 1] = missing  # across the last column of the first line, where none is
    return differences


def _differences(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> fp32 [B, 2·32·32]: horizontal, then vertical differences, 0 where there is no next."""
    images = images.detach().float().clamp(0, 1)
    red, green, blue = (colour * weight for colour, weight in zip(images.split(1, 1), LUMINANCE, strict=True))
    grey = red + green + blue
    size = (SKETCH_SIDE, SKETCH_SIDE)
    if grey.shape[-2:] != size:
        grey = interpolate(grey, size=size, mode="bilinear", antialias=True, align_corners=False)
    across = pad(grey[..., 1:] - grey[..., :-1], (0, 1))
    down = pad(grey[..., 1:, :] - grey[..., :-1, :], (0, 0, 0, 1))
    return torch.cat([across, down], 1).flatten(1)

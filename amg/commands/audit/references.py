"""The training images themselves, for judges that need pixels: read once, in a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from amg.commands.progress import counted
from amg.evaluate.judges import luminance_correlation

STRUCTURE_SIZE = 64  # the structural judge looks at pictures no larger than this
SHOWN_SIZE = 128  # pictures in the report are no larger than this, as the page carries them all
BLOCK = 64  # training images held at a time


@dataclass(frozen=True)
class References:
    """Training images to compare with. `read` gives (id, uint8 [3, H, W]) in a stream, an empty tensor for an
    image that cannot be read."""

    name: str
    read: Callable[[], Iterator[tuple[str, Tensor]]]


@dataclass
class Seen:
    """What one pass over the references found out.

    `structure`: per guidance, the largest luminance correlation of each picture, float32 [N]; `features` of
    the FID network float64 [M, D], None without one; `nearest`: by id, the pictures asked for, uint8
    [3, h, w], no larger than the report shows them; `count` references, `unreadable` ones left out.
    """

    structure: dict[str, Tensor]
    features: Tensor | None = None
    nearest: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    unreadable: int = 0


def of_index(index: Any) -> References:
    """The rows of a pixel index."""
    height, width = index.image_size

    def read() -> Iterator[tuple[str, Tensor]]:
        for identity, row in zip(index.ids, index.rows, strict=True):
            yield identity, row.cpu().reshape(3, height, width)

    return References(f"the rows of {index.path.name}", read)


def of_path(path: Path) -> References:
    """A folder of images, a Parquet file or a folder of them, as `amg index build` takes them."""
    from amg.index.decode import UnreadableImage
    from amg.index.sources import open_source

    source = open_source(path)

    def read() -> Iterator[tuple[str, Tensor]]:
        for image in source.read(0):
            try:
                yield image.id, image.load().pixels
            except UnreadableImage:
                yield image.id, torch.empty(0, dtype=torch.uint8)

    return References(f"the images of {path.name}", read)


def cover(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [3, H, W] as float32 [3, *size] in [0, 1]: scaled to cover, antialiased, the centre kept."""
    pixels = image.float()[None] / 255
    height, width = image.shape[1:]
    ratio = max(size[0] / height, size[1] / width)
    scaled = max(round(height * ratio), size[0]), max(round(width * ratio), size[1])
    if scaled != (height, width):
        pixels = interpolate(pixels, size=scaled, mode="bilinear", antialias=True).clamp(0, 1)
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    return pixels[0, :, top : top + size[0], left : left + size[1]]


def structure_size(size: tuple[int, int]) -> tuple[int, int]:
    """The size the structural judge looks at: the pictures' own, or the longer side `STRUCTURE_SIZE`."""
    return within(size, STRUCTURE_SIZE)


def within(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """(height, width) scaled down where its longer side exceeds `longest`."""
    ratio = min(1.0, longest / max(size))
    return max(round(size[0] * ratio), 1), max(round(size[1] * ratio), 1)


@torch.no_grad()
def look_through(
    references: References,
    small: dict[str, Tensor],
    size: tuple[int, int],
    network: Callable[[Tensor], Tensor] | None,
    wanted: set[str],
    device: str,
) -> Seen:
    """One pass over the references.

    small: per guidance its pictures float32 [N, 3, h, w] at `structure_size`; size: that of the pictures,
    which the references are brought to (`cover`); network: FID features; wanted: ids of pictures to keep.
    """
    seen = Seen(
        {name: torch.full((len(images),), -1.0, dtype=torch.float32) for name, images in small.items()}
    )
    features: list[Tensor] = []
    for block in _blocks(counted(references.read(), "training images"), size, wanted, seen):
        looked_at = torch.stack([cover(image, structure_size(size)) for image in block])
        for name, images in small.items():
            found = luminance_correlation(images, looked_at)[0]
            seen.structure[name] = torch.maximum(seen.structure[name], found)
        if network is not None:
            batch = torch.stack([cover(image, size) for image in block])
            features.append(network(batch.to(device)).double().cpu())
    if seen.count == 0:
        raise ValueError(f"`--images-of-index` must hold readable images, got none in {references.name}")
    seen.features = torch.cat(features) if network is not None else None
    return seen


def _blocks(
    images: Iterator[tuple[str, Tensor]], size: tuple[int, int], wanted: set[str], seen: Seen
) -> Iterator[list[Tensor]]:
    block: list[Tensor] = []
    for identity, image in images:
        if image.numel() == 0:
            seen.unreadable += 1
            continue
        seen.count += 1
        if identity in wanted:
            shown = cover(image, within(size, SHOWN_SIZE))
            seen.nearest[identity] = (shown * 255).round().to(torch.uint8)
        block.append(image)
        if len(block) == BLOCK:
            yield block
            block = []
    if block:
        yield block

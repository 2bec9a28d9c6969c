"""The training images, a shard at a time: decoded, checked and encoded batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any

import torch

from amg.index.captions import Captions
from amg.index.decode import Picture, UnreadableImage
from amg.index.encode import resize_images, unit_vectors
from amg.index.errors import IndexBuildError
from amg.index.guard import SKETCH_DTYPE, SKETCH_LENGTH, sketch
from amg.index.images import TrainingImage
from amg.index.journal import LogEntry
from amg.index.notes import pack_notes
from amg.index.plan import BuildPlan
from amg.index.store import DTYPES


@dataclass(frozen=True)
class Shard:
    """rows [n, D] and guard sketches [n, 2048] of the n readable images; a log entry for each image; digest
    of the last one's pixels, and of every image up to there."""

    rows: torch.Tensor
    guard: torch.Tensor
    entries: list[LogEntry]
    last_digest: str
    all_digest: str


class ShardReader:
    """Draws shards from a stream of images; image_size is what the first image of a pixel index set."""

    def __init__(
        self,
        stream: Iterator[TrainingImage],
        captions: Captions,
        plan: BuildPlan,
        image_size: tuple[int, int] | None,
        bar: Any = None,
        all_digest: str = "",
    ):
        self.stream, self.captions, self.plan, self.bar = stream, captions, plan, bar
        self.image_size, self.all_digest = image_size or plan.size, all_digest

    def read(self) -> Shard | None:
        """The next shard, None at the end. Raises IndexBuildError."""
        rows: list[torch.Tensor] = []
        guard: list[torch.Tensor] = [torch.empty(0, SKETCH_LENGTH, dtype=SKETCH_DTYPE)]
        entries: list[LogEntry] = []
        digest = ""
        while len(entries) < self._shard_images():
            window = list(islice(self.stream, self.plan.batch_size))
            if not window:
                break
            loaded = [self._load(image) for image in window]
            entries += [self._entry(image, picture) for image, picture in zip(window, loaded, strict=True)]
            for picture in loaded:
                digest = content_digest(picture if isinstance(picture, str) else picture.pixels)
                self.all_digest = chain_digest(self.all_digest, digest)
            readable = [picture.pixels for picture in loaded if not isinstance(picture, str)]
            if readable:
                rows.append(self._encode(readable, entries[-len(window) :]))
                guard += [sketch(to_float(pixels)[None]) for pixels in readable]
            if self.bar is not None:
                self.bar.update(len(window))
        if not entries:
            return None
        if not rows and self.image_size is None and self.plan.embedder is None:
            raise IndexBuildError(
                f"`images`: none of the first {len(entries)} could be read "
                f"(first: {entries[0].id}: {entries[0].reason})"
            )
        vectors = torch.cat(rows) if rows else self._no_rows()
        return Shard(vectors, torch.cat(guard), entries, digest, self.all_digest)

    def _shard_images(self) -> int:
        known = self.plan.embedder is not None or self.image_size is not None
        return self.plan.shard_images(self.dimension() if known else 1)

    def dimension(self) -> int:
        """Length of a row."""
        if self.plan.embedder is not None:
            return self.plan.embedder.dimension
        assert self.image_size is not None
        return 3 * self.image_size[0] * self.image_size[1]

    def _no_rows(self) -> torch.Tensor:
        return torch.empty(0, self.dimension(), dtype=DTYPES[self.plan.dtype])

    def _load(self, image: TrainingImage) -> Picture | str:
        """Its picture, or why there are none."""
        try:
            return image.load()
        except UnreadableImage as error:
            if self.plan.on_error == "raise":
                raise IndexBuildError(f"`images`: {image.source} cannot be read: {error}") from error
            return str(error)

    def _entry(self, image: TrainingImage, picture: Picture | str) -> LogEntry:
        ids = self.plan.ids
        if ids is not None and image.position >= len(ids):
            raise IndexBuildError(
                f"`ids` do not match `images`: {len(ids)} ids, image {image.position} has none"
            )
        name = image.id if ids is None else ids[image.position]
        caption = self.captions.of(image, name)
        reason, notes = (picture, ()) if isinstance(picture, str) else (None, picture.notes)
        packed = pack_notes((*notes, *caption.notes))
        return LogEntry(image.position, name, image.source, caption.text, -1, reason, packed)

    def _encode(self, images: list[torch.Tensor], entries: list[LogEntry]) -> torch.Tensor:
        names = [entry.id for entry in entries if entry.reason is None]
        if self.plan.embedder is None:
            return torch.stack([self._pixel_row(*pair) for pair in zip(images, names, strict=True)])
        try:
            return self._embed(images)
        except ValueError as error:
            raise IndexBuildError(f"{error} (images {names[0]} to {names[-1]})") from error

    def _pixel_row(self, image: torch.Tensor, name: str) -> torch.Tensor:
        """[3, H, W] → uint8 [3 * H * W] at the size of the index."""
        size = (image.shape[1], image.shape[2])
        if self.image_size is None:
            self.image_size = size
        if size != self.image_size:
            if self.plan.size is None:
                raise IndexBuildError(
                    f"`images` have mixed sizes: {name} is {size[0]}x{size[1]}, the first was "
                    f"{self.image_size[0]}x{self.image_size[1]}; pass size=(H, W) to resize them all"
                )
            image = resize_images(to_float(image)[None], self.plan.size)[0]
        if image.is_floating_point():
            image = (image * 255).round().clamp(0, 255).to(torch.uint8)
        return image.flatten()

    @torch.no_grad()
    def _embed(self, images: list[torch.Tensor]) -> torch.Tensor:
        """[3, H, W] each → unit rows [n, D]; images of one size go through the embedder together."""
        embedder = self.plan.embedder
        groups: dict[tuple[int, ...] | None, list[int]] = {}
        for at, image in enumerate(images):
            groups.setdefault(tuple(image.shape) if self.plan.size is None else None, []).append(at)
        rows = torch.empty(len(images), embedder.dimension, dtype=DTYPES[self.plan.dtype])
        for members in groups.values():
            resized = [resize_images(to_float(images[at])[None], self.plan.size) for at in members]
            batch = torch.cat(resized).to(getattr(embedder, "device", None) or "cpu")
            rows[members] = unit_vectors(batch, embedder).to("cpu", rows.dtype)
        return rows


def to_float(image: torch.Tensor) -> torch.Tensor:
    """uint8 → float32 in [0, 1]; floats stay."""
    return image.float() / 255 if image.dtype == torch.uint8 else image


def content_digest(pixels: torch.Tensor | str) -> str:
    """What a resumed build compares: a hash of an image's pixels, or that it was unreadable."""
    if isinstance(pixels, str):
        return "unreadable"
    content = blake2b(repr((tuple(pixels.shape), pixels.dtype)).encode(), digest_size=16)
    content.update(pixels.contiguous().numpy().tobytes())
    return content.hexdigest()


def chain_digest(before: str, digest: str) -> str:
    """The digest of all images so far, out of that of those before the last one and the last one's own."""
    return blake2b(f"{before} {digest}".encode(), digest_size=16).hexdigest()

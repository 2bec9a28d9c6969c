"""The training images, a shard at a time: decoded, checked and encoded batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from typing import Any

import torch

from amg.index.captions import Captions
from amg.index.decode import MissingImage, Picture, UnreadableImage
from amg.index.encode import MOST_SQUARES, is_long, resize_images, resize_to_embed, unit_vectors
from amg.index.errors import IndexBuildError
from amg.index.guard import SKETCH_DTYPE, SKETCH_LENGTH, sketch
from amg.index.journal import LogEntry
from amg.index.notes import Note, pack_notes
from amg.index.plan import BATCH_BYTES, BuildPlan
from amg.index.sources.source import TrainingImage
from amg.index.store import DTYPES
from amg.index.text import Caption

SQUEEZED = f"more than {MOST_SQUARES} times as long as wide, squeezed to that for the embedder"


@dataclass(frozen=True)
class Shard:
    """rows [n, D] and guard sketches [n, 2048] of the n readable images; a log entry for each image; digest
    of the last one's pixels, and of every image up to there."""

    rows: torch.Tensor
    guard: torch.Tensor
    entries: list[LogEntry]
    last_digest: str
    all_digest: str


@dataclass
class _Draft:
    """A shard that is being read. waiting: ids and pixels (or pixel rows) of the next batch; bytes: of these
    as float32."""

    rows: list[torch.Tensor] = field(default_factory=list)
    guard: list[torch.Tensor] = field(
        default_factory=lambda: [torch.empty(0, SKETCH_LENGTH, dtype=SKETCH_DTYPE)]
    )
    entries: list[LogEntry] = field(default_factory=list)
    waiting: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    bytes: int = 0
    digest: str = ""


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
        draft = _Draft()
        while len(draft.entries) < self._shard_images():
            before = len(draft.entries)
            for image in islice(self.stream, self.plan.batch_size):
                self._add(image, draft)
            self._encode(draft)
            if len(draft.entries) == before:
                break
            if self.bar is not None:
                self.bar.update(len(draft.entries) - before)
        entries = draft.entries
        if not entries:
            return None
        if not draft.rows and self.image_size is None and self.plan.embedder is None:
            raise IndexBuildError(
                f"`images`: none of the first {len(entries)} could be read "
                f"(first: {entries[0].id}: {entries[0].reason})"
            )
        vectors = torch.cat(draft.rows) if draft.rows else self._no_rows()
        return Shard(vectors, torch.cat(draft.guard), entries, draft.digest, self.all_digest)

    def _add(self, image: TrainingImage, draft: _Draft) -> None:
        """One image: its log entry, digest and sketch, and its pixels for the next batch; those waiting are
        embedded first where it would have them exceed BATCH_BYTES."""
        picture = self._load(image)
        draft.entries.append(self._entry(image, picture))
        draft.digest = content_digest(picture.pixels if isinstance(picture, Picture) else str(picture))
        self.all_digest = chain_digest(self.all_digest, draft.digest)
        if not isinstance(picture, Picture):
            return
        draft.guard.append(sketch(to_float(picture.pixels)[None]))
        prepared = self._prepare(picture.pixels, draft.entries[-1].id)
        if draft.bytes + 4 * prepared.numel() > BATCH_BYTES:
            self._encode(draft)
        draft.waiting.append((draft.entries[-1].id, prepared))
        draft.bytes += 4 * prepared.numel()

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

    def _load(self, image: TrainingImage) -> Picture | UnreadableImage:
        """Its picture, or why there is none."""
        try:
            picture = image.load()
        except UnreadableImage as error:
            if self.plan.on_error == "raise" and not isinstance(error, MissingImage):
                raise IndexBuildError(f"`images`: {image.source} cannot be read: {error}") from error
            return error
        if self.plan.embedder is None or not is_long(*(self.plan.size or picture.pixels.shape[1:])):
            return picture
        return picture._replace(notes=(*picture.notes, Note(SQUEEZED)))

    def _entry(self, image: TrainingImage, picture: Picture | UnreadableImage) -> LogEntry:
        ids = self.plan.ids
        if ids is not None and image.position >= len(ids):
            raise IndexBuildError(
                f"`ids` do not match `images`: {len(ids)} ids, image {image.position} has none"
            )
        name = image.id if ids is None else ids[image.position]
        caption = Caption() if isinstance(picture, MissingImage) else self.captions.of(image, name)
        reason, notes = (None, picture.notes) if isinstance(picture, Picture) else (str(picture), ())
        packed = pack_notes((*notes, *caption.notes))
        return LogEntry(image.position, name, image.source, caption.text, -1, reason, packed)

    def _prepare(self, pixels: torch.Tensor, name: str) -> torch.Tensor:
        """[3, H, W] → what waits for its batch: a row of a pixel index, or what the embedder is to get."""
        if self.plan.embedder is None:
            return self._pixel_row(pixels, name)
        size = self.plan.size
        if (size is None or tuple(pixels.shape[1:]) == size) and not is_long(*pixels.shape[1:]):
            return pixels
        return resize_to_embed(to_float(pixels)[None], size)[0]

    def _encode(self, draft: _Draft) -> None:
        """Rows out of what waits."""
        waiting, draft.waiting, draft.bytes = draft.waiting, [], 0
        if not waiting:
            return
        pixels = [prepared for _, prepared in waiting]
        if self.plan.embedder is None:
            draft.rows.append(torch.stack(pixels))
            return
        try:
            draft.rows.append(self._embed(pixels))
        except ValueError as error:
            raise IndexBuildError(f"{error} (images {waiting[0][0]} to {waiting[-1][0]})") from error

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
        groups: dict[tuple[int, ...], list[int]] = {}
        for at, image in enumerate(images):
            groups.setdefault(tuple(image.shape), []).append(at)
        rows = torch.empty(len(images), embedder.dimension, dtype=DTYPES[self.plan.dtype])
        for shape, members in groups.items():
            batch = torch.empty(len(members), *shape, dtype=torch.float32)
            for slot, at in enumerate(members):
                batch[slot] = to_float(images[at])
            place = getattr(embedder, "device", None) or "cpu"
            rows[members] = unit_vectors(batch.to(place), embedder).to("cpu", rows.dtype)
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

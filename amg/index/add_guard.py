"""A guard for an index that an earlier version built, from the pictures it was built of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import amg.kernels
from amg.index.build import progress_bar
from amg.index.decode import UnreadableImage
from amg.index.encode import check_embedder, resize_images, unit_vectors
from amg.index.errors import IndexBuildError
from amg.index.guard import SKETCH, SKETCH_DTYPE, SKETCH_LENGTH, SKETCH_SIDE, sketch
from amg.index.shards import to_float
from amg.index.sources import TrainingImage, open_source
from amg.index.store import (
    DTYPES,
    GUARD,
    MEMBER_ROWS,
    SKETCH_BYTES,
    Manifest,
    append,
    check_hashes,
    file_record,
    map_file,
    map_rows,
    read_manifest,
    read_meta,
    write_manifest,
)

BLOCK = 1024
SAME_PIXELS, SAME_COSINE = (
    2.0,
    0.99,
)  # mean difference in levels of 255; other versions decode a little otherwise
GUARD_ONLY = "folded pictures that the guard alone knows (`amg index guard` with --embedder)"


def add_guard(path: str | os.PathLike, images: Any, embedder: Any = None, *, progress: bool = True) -> None:
    """Give the index at `path` the sketches of its pictures; `images` as they were given to the build.

    Each row is found by where its picture lay, and compared: a pixel index with the row's pixels, one of
    embeddings with the picture's embedding where its `embedder` is given. Pictures that were folded are
    counted to the row they are most alike to, and kept for the final check's metric as well where they could
    be compared; `info` says where they could not. The index gets its guard when all is written, or stays as
    it was. Raises IndexBuildError where it has a guard already, or where `images` are not what it was built
    of; EmbedderMismatch for another embedder.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    if manifest.guard is not None:
        raise IndexBuildError(
            f"`path` must be an index without a guard, {directory} has one ({manifest.guard})"
        )
    if manifest.imported is not None:
        raise IndexBuildError(
            f"`path` must be an index of pictures, {directory} is of imported vectors: its pictures would "
            "all have to be embedded again, and an index built of them has a guard"
        )
    check_hashes(directory, manifest)
    if embedder is not None:
        check_embedder(embedder, manifest)
    task = _Task(directory, manifest, embedder)
    try:
        task.read(open_source(images, background=manifest.background), progress)
        task.write_folded()
        files = task.publish()
    finally:
        for temporary in task.temporary.values():
            temporary.unlink(missing_ok=True)
    alone = 0 if task.compares else task.members
    notes = {**manifest.notes, **({GUARD_ONLY: alone} if alone else {})}
    records = {**manifest.files, **{name: file_record(directory / name) for name in files}}
    write_manifest(directory, replace(manifest, files=records, guard=SKETCH, notes=notes))


class _Task:
    """The sketches of an index's pictures on their way to disk; `folded`: of those that are no row's own."""

    def __init__(self, directory: Path, manifest: Manifest, embedder: Any):
        self.directory, self.manifest, self.embedder = directory, manifest, embedder
        self.compares = manifest.metric == "nl2" or embedder is not None
        self.stored = map_rows(directory, manifest)
        places = read_meta(directory, manifest)["source"]
        self.rows = {place: row for row, place in enumerate(places)}
        if len(self.rows) < len(places):
            raise IndexBuildError(
                f"`path`: {directory} has rows whose pictures lay at one place: build it again"
            )
        names = (GUARD, MEMBER_ROWS, manifest.members_file)
        self.temporary = {name: directory / f"{name}.tmp" for name in names}
        for temporary in self.temporary.values():
            temporary.unlink(missing_ok=True)  # what a killed run left
        self.folded: list[tuple[Tensor, Tensor | None]] = []
        self.members = 0

    def read(self, source: Any, progress: bool) -> None:
        """Write the sketch of each row's own picture to its place, and gather those of the others."""
        missing, seen = dict(self.rows), 0
        with (
            open(self.temporary[GUARD], "xb") as file,
            progress_bar(source.length, 0, progress) as bar,
        ):
            for image in source.read(0):
                row = missing.pop(image.source, None)
                found = self._look(image, row)
                seen += found is not None
                if row is not None and found is not None:
                    file.seek(row * SKETCH_BYTES)
                    file.write(found[0].numpy().tobytes())
                elif found is not None:
                    self.folded.append(found)
                if bar is not None:
                    bar.update()
            file.flush()
            os.fsync(file.fileno())
        if missing:
            raise IndexBuildError(
                f"`images` must hold the picture of every row: {len(missing)} of {len(self.rows)} are not "
                f"among them, first {next(iter(missing))!r}"
            )
        if seen != self.manifest.images:
            raise IndexBuildError(
                f"`images` must be the {self.manifest.images} pictures the index was built of, got {seen}"
            )

    def _look(self, image: TrainingImage, row: int | None) -> tuple[Tensor, Tensor | None] | None:
        """Sketch [2048] and, where it can be compared, vector of one picture; None for an unreadable one,
        which the build passed over as well."""
        try:
            pixels = to_float(image.load().pixels)[None]
        except UnreadableImage as error:
            if row is None:
                return None
            raise IndexBuildError(f"`images`: {image.source}, the picture of row {row}: {error}") from error
        vector = self._vector(pixels) if self.compares else None
        if row is not None and vector is not None:
            self._require_same(vector, row, image.source)
        return sketch(pixels)[0], vector

    def _vector(self, pixels: Tensor) -> Tensor:
        resized = resize_images(pixels, self.manifest.image_size)
        if self.embedder is None:
            return (resized * 255).round().clamp(0, 255).to(torch.uint8).flatten()
        with torch.no_grad():
            return unit_vectors(resized, self.embedder)[0].to("cpu", DTYPES[self.manifest.dtype])

    def _require_same(self, vector: Tensor, row: int, place: str) -> None:
        own = self.stored[row]
        if vector.shape == own.shape:
            if self.embedder is None and float((vector.float() - own.float()).abs().mean()) <= SAME_PIXELS:
                return
            if self.embedder is not None and float(vector.float() @ own.float()) >= SAME_COSINE:
                return
        raise IndexBuildError(
            f"`images`: {place} is not the picture of row {row} that the index was built of"
        )

    def write_folded(self) -> None:
        """Append the folded pictures that are not their row's own: sketches, rows, and vectors where
        known."""
        own = map_file(self.temporary[GUARD], SKETCH_DTYPE, self.manifest.count, SKETCH_LENGTH)
        for name in (MEMBER_ROWS, self.manifest.members_file):
            self.temporary[name].touch()
        seen: set[bytes] = set()
        for start in range(0, len(self.folded), BLOCK):
            block = self.folded[start : start + BLOCK]
            sketches = torch.stack([made for made, _ in block])
            owners = self._owners(sketches, block, own)
            kept = []
            for at, (made, vector) in enumerate(block):
                row = int(owners[at])
                content = made.numpy().tobytes() + (b"" if vector is None else vector.numpy().tobytes())
                same = torch.equal(made, own[row]) and (
                    vector is None or torch.equal(vector, self.stored[row])
                )
                if not same and content not in seen:
                    seen.add(content)
                    kept.append(at)
            self.members += len(kept)
            append(self.temporary[GUARD], sketches[kept])
            append(self.temporary[MEMBER_ROWS], owners[kept])
            if self.compares and kept:
                vectors = [vector for at in kept if (vector := block[at][1]) is not None]
                append(self.temporary[self.manifest.members_file], torch.stack(vectors))

    def _owners(self, sketches: Tensor, block: Sequence[tuple[Tensor, Tensor | None]], own: Tensor) -> Tensor:
        """The row each folded picture belongs to: the closest vector where it is known, else sketch."""
        if self.embedder is not None:
            vectors = torch.stack([vector for _, vector in block if vector is not None])
            return amg.kernels.top1_cosine(vectors.float(), self.stored).row
        if self.compares:
            pixels = torch.stack([vector for _, vector in block if vector is not None])
            return amg.kernels.nl2(pixels.float() / 255, self.stored, k=1).row
        queries = sketches.float()
        queries[:, SKETCH_SIDE - 1] += 1e-6  # a flat one's is zero, which nothing is nearest to
        return amg.kernels.top1_cosine(queries, own).row

    def publish(self) -> list[str]:
        """Give the files that hold something their names -> these."""
        written = [name for name, temporary in self.temporary.items() if temporary.stat().st_size]
        for name in written:
            os.replace(self.temporary[name], self.directory / name)
        return written

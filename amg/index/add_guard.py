"""A guard for an index that an earlier version built: from the same pictures, without embedding them
again."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import amg.kernels
from amg.index.build import progress_bar
from amg.index.decode import UnreadableImage
from amg.index.errors import IndexBuildError
from amg.index.guard import SKETCH, SKETCH_DTYPE, SKETCH_LENGTH, sketch
from amg.index.images import TrainingImage, open_source
from amg.index.shards import to_float
from amg.index.store import (
    GUARD,
    MEMBER_ROWS,
    SKETCH_BYTES,
    append,
    check_hashes,
    file_record,
    map_file,
    read_manifest,
    read_meta,
    write_manifest,
)

BLOCK = 1024


def add_guard(path: str | os.PathLike, images: Any, *, progress: bool = True) -> None:
    """Give the index at `path` the sketches of its pictures; `images` as they were given to the build.

    Each row is found by where its picture lay; pictures that were folded are counted to the row they are most
    alike to. The index gets its guard when all is written, or stays as it was. Raises IndexBuildError where
    the index has a guard already, or where the picture of a row is not among `images` or cannot be read.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    if manifest.guard is not None:
        raise IndexBuildError(
            f"`path` must be an index without a guard, {directory} has one: {manifest.guard}"
        )
    check_hashes(directory, manifest)
    rows = {place: row for row, place in enumerate(read_meta(directory, manifest)["source"])}
    names = {name: directory / f"{name}.{os.getpid()}.tmp" for name in (GUARD, MEMBER_ROWS)}
    with ExitStack() as cleaning:
        for temporary in names.values():
            cleaning.callback(temporary.unlink, missing_ok=True)
        source = open_source(images, background=manifest.background)
        folded = _write_rows(source, rows, names[GUARD], progress)
        _write_folded(names, folded, manifest.count)
        written = {name: temporary for name, temporary in names.items() if temporary.stat().st_size}
        for name, temporary in written.items():
            os.replace(temporary, directory / name)
    files = {**manifest.files, **{name: file_record(directory / name) for name in written}}
    write_manifest(directory, replace(manifest, files=files, guard=SKETCH))


def _write_rows(source: Any, rows: dict[str, int], target: Path, progress: bool) -> list[Tensor]:
    """Write the sketch of each row's own picture to its place -> those of the other pictures."""
    folded: list[Tensor] = []
    missing = dict(rows)
    with open(target, "wb") as file, progress_bar(source.length, 0, progress) as bar:
        for image in source.read(0):
            row = rows.get(image.source)
            made = _sketch_of(image, row)
            if row is not None and made is not None:
                file.seek(row * SKETCH_BYTES)
                file.write(made.numpy().tobytes())
                missing.pop(image.source, None)
            elif made is not None:
                folded.append(made)
            if bar is not None:
                bar.update()
        file.flush()
        os.fsync(file.fileno())
    if missing:
        raise IndexBuildError(
            f"`images` must hold the picture of every row: {len(missing)} of {len(rows)} are not among them, "
            f"first {next(iter(missing))!r}"
        )
    return folded


def _sketch_of(image: TrainingImage, row: int | None) -> Tensor | None:
    """The sketch [2048] of one picture; None for an unreadable one, which the build passed over as well."""
    try:
        return sketch(to_float(image.load().pixels)[None])[0]
    except UnreadableImage as error:
        if row is None:
            return None
        raise IndexBuildError(f"`images`: {image.source}, the picture of row {row}: {error}") from error


def _write_folded(names: dict[str, Path], folded: list[Tensor], count: int) -> None:
    """Append the sketches of folded pictures that are not their row's own, and write which row that is."""
    own = map_file(names[GUARD], SKETCH_DTYPE, count, SKETCH_LENGTH)
    names[MEMBER_ROWS].touch()
    seen: set[bytes] = set()
    for start in range(0, len(folded), BLOCK):
        block = torch.stack(folded[start : start + BLOCK])
        structured = block.float().norm(dim=1) > 0  # a picture without structure is like none
        block = block[structured]
        if not len(block):
            continue
        owner = amg.kernels.top1_cosine(block.float(), own).row
        fresh = []
        for at, (made, row) in enumerate(zip(block, owner.tolist(), strict=True)):
            content = made.numpy().tobytes()
            if not torch.equal(made, own[row]) and content not in seen:
                seen.add(content)
                fresh.append(at)
        append(names[GUARD], block[fresh])
        append(names[MEMBER_ROWS], owner[fresh].to(torch.int64))

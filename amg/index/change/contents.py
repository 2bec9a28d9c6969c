"""What an index holds of every picture, one by one again: what a changed index is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from amg.index.errors import IndexBuildError, IndexCorrupt
from amg.index.fold import row_hashes
from amg.index.guard import SKETCH_DTYPE, SKETCH_LENGTH
from amg.index.journal import LogEntry
from amg.index.store import (
    DTYPES,
    GUARD,
    PICTURES,
    Manifest,
    import_parquet,
    map_file,
    map_rows,
)

HASH_ROWS = 1 << 13


class Part(NamedTuple):
    """Some pictures: vectors [n, D] and sketches [n, 2048 or 0] of those that were not skipped, and the log
    entry of every one."""

    rows: Tensor
    guard: Tensor
    entries: list[LogEntry]


class Contents:
    """Vector and sketch of every picture of an index, found by what its log says of them."""

    def __init__(self, data: Path, manifest: Manifest):
        self.data, self.manifest = data, manifest
        self.vectors = [map_rows(data, manifest)]
        count, kept = manifest.count, manifest.members
        if kept:
            dtype = DTYPES[manifest.dtype]
            self.vectors.append(map_file(data / manifest.members_file, dtype, kept, manifest.dimension))
        self.guard = torch.empty(count + kept, 0, dtype=SKETCH_DTYPE)
        if manifest.guard is not None:
            self.guard = map_file(data / GUARD, SKETCH_DTYPE, count + kept, SKETCH_LENGTH)
        self.places = self._places()

    def _places(self) -> dict[tuple[int, int], int]:
        """Where what lies, by content: a row's number, or `count` and a member's."""
        vectors = np.concatenate(
            [row_hashes(block) for part in self.vectors for block in part.split(HASH_ROWS)]
        )
        sketches = np.concatenate([row_hashes(block) for block in self.guard.split(HASH_ROWS)])
        pairs = zip(vectors.tolist(), sketches.tolist(), strict=True)
        return {pair: place for place, pair in reversed([*enumerate(pairs)])}

    def vector(self, place: int) -> Tensor:
        """[D] of a place."""
        return (
            self.vectors[0][place]
            if place < self.manifest.count
            else self.vectors[1][place - self.manifest.count]
        )

    def parts(self, size: int, dropped: np.ndarray | None = None, start: int = 0) -> Iterator[Part]:
        """The pictures in order, `size` at a time, without those `dropped` [seen]; of the rest from `start`
        on. Positions count what is left."""
        position = 0
        for entries in _by_size(self._entries(dropped), size):
            if position >= start:
                yield self._part([*_numbered(entries, position)])
            position += len(entries)

    def length(self, dropped: np.ndarray | None = None) -> int:
        """Pictures seen, without those `dropped`."""
        seen = sum(len(table) for table in logs(self.data))
        return seen if dropped is None else seen - int(np.count_nonzero(dropped))

    def _entries(self, dropped: np.ndarray | None) -> Iterator[LogEntry]:
        number = 0
        for table in logs(self.data):
            for record in table.to_pylist():
                if dropped is None or not dropped[number]:
                    yield LogEntry(**{**record, "row": -1})
                number += 1

    def _part(self, entries: list[LogEntry]) -> Part:
        places = []
        for entry in entries:
            if entry.reason is None:
                assert entry.vector is not None and entry.sketch is not None
                found = self.places.get((entry.vector, entry.sketch))
                if found is None:
                    raise IndexCorrupt(
                        f"{self.data / PICTURES} names a picture, {entry.id!r}, that is nowhere"
                    )
                places.append(found)
        rows = torch.empty(len(places), self.manifest.dimension, dtype=self.vectors[0].dtype)
        for at, place in enumerate(places):
            rows[at] = self.vector(place)
        return Part(rows, self.guard[places], entries)


def _numbered(entries: list[LogEntry], first: int) -> Iterator[LogEntry]:
    for at, entry in enumerate(entries):
        yield dataclasses.replace(entry, position=first + at)


def _by_size(entries: Iterator[LogEntry], size: int) -> Iterator[list[LogEntry]]:
    held: list[LogEntry] = []
    for entry in entries:
        held.append(entry)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held


def logs(data: Path) -> Iterator[Any]:
    """pictures.parquet, a table at a time. Raises IndexBuildError where an earlier version wrote none,
    IndexCorrupt."""
    path = data / PICTURES
    if not path.is_file():
        raise IndexBuildError(
            f"`path`: {data} does not say which pictures it holds (it was built by an earlier version): "
            "build it again to change it later"
        )
    try:
        with import_parquet().ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group)
    except Exception as error:  # pyarrow raises many types on damaged files
        raise IndexCorrupt(f"{path} cannot be read ({error})") from error

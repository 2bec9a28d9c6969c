"""One shard of an index: some of its rows, of its folded pictures and of their sketches, and what may be
asked of them. Knows nothing of Ray."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import amg.kernels
from amg.index.codes import map_codes
from amg.index.errors import IndexCorrupt
from amg.index.exact import closest_pixels
from amg.index.guard import map_guard
from amg.index.members import map_members, member_rows
from amg.index.seal import Seal
from amg.index.store import META, Manifest, check_hashes, check_sizes, import_parquet, map_rows
from amg.index.usable import finite_rows, where_rows
from amg.kernels import Codes, Panels

COLUMNS = ("id", "caption", "count", "source", "caption_count")


class Part(NamedTuple):
    """What one shard holds: rows [start, stop) of the index, and [start, stop) of its folded pictures."""

    rows: tuple[int, int]
    members: tuple[int, int]


class Ranked(NamedTuple):
    """The closest of some entries to each query, best first, [B, m] each. closeness: fp32, the cosine or −ℓ2;
    place: the entry's number among all of the index, to which ties go by; row: the row that stands for it.

    NaN and 0 throughout for a query that is not finite, or zero under cosine."""

    closeness: Tensor
    place: Tensor
    row: Tensor


def parts_of(manifest: Manifest, shards: int) -> list[Part]:
    """The index in `shards` equal parts. Raises ValueError unless each has a row."""
    if isinstance(shards, bool) or not isinstance(shards, int) or not 1 <= shards <= manifest.count:
        raise ValueError(
            f"`shards` must be an int in [1, {manifest.count}] (rows of the index), got {shards!r}"
        )
    return [
        Part(*pair) for pair in zip(_cut(manifest.count, shards), _cut(manifest.members, shards), strict=True)
    ]


def _cut(total: int, parts: int) -> list[tuple[int, int]]:
    return [*itertools.pairwise(total * at // parts for at in range(parts + 1))]


class Shard:
    """`part` of the generation that `manifest` tells of, in the index at `directory`.

    Every answer is of files that are, byte for byte, what the manifest says (`seal`): the first one reads all
    of them. Raises IndexCorrupt. Threads may share it.
    """

    def __init__(self, directory: Path, manifest: Manifest, part: Part):
        self.data, self.manifest, self.part = directory / manifest.folder, manifest, part
        check_sizes(self.data, manifest)
        self.seal = Seal(self.data, manifest)
        start, stop = part.rows
        self.rows = map_rows(self.data, manifest)[start:stop]
        self.codes = _codes_of(self.rows, map_codes(self.data, manifest), part)
        self.members = map_members(self.data, manifest)
        self.guard = map_guard(self.data, manifest, member_rows(self.data, manifest))

    def answer(self, question: str, *arguments: Any) -> Any:
        """What the method `question` says, of files that are as they should be."""
        self.seal.check()
        return getattr(self, question)(*arguments)

    def check(self) -> None:
        """Nothing more than any answer makes sure of."""

    def verify(self) -> None:
        """Read every file again. Raises IndexCorrupt."""
        check_hashes(self.data, self.manifest)

    def closest(self, queries: Tensor, k: int) -> Ranked:
        """The k rows closest to each of `queries` [B, D], or all there are."""
        return self._among(self.rows, self.codes, queries, k, self.part.rows[0])

    def member(self, queries: Tensor) -> Ranked:
        """The closest folded picture; m = 0 where this shard has none."""
        start, stop = self.part.members
        if self.members is None:
            return self._among(self.rows[:0], None, queries, 1, 0)
        found = self._among(self.members.vectors[start:stop], None, queries, 1, start)
        return found._replace(row=self.members.rows[found.place])

    def alike(self, directions: Tensor) -> Ranked:
        """The most alike sketch of a row, and that of a folded picture, of each of `directions` [B, 2048]."""
        if self.guard is None:
            raise ValueError(f"`question` must not be of the guard, which {self.data} has none of")
        count, found = self.manifest.count, []
        for start, stop in (self.part.rows, tuple(count + at for at in self.part.members)):
            found.append(_cosine(self.guard.sketches[start:stop], None, directions, 1, start))
        closeness, place, _ = (torch.cat(column, 1) for column in zip(*found, strict=True))
        return Ranked(closeness, place, self.guard.rows[place])

    def vectors(self, rows: Tensor) -> Tensor:
        """Rows [n, D] of the index by their numbers, as stored."""
        return self.rows[rows - self.part.rows[0]]

    def about(self, rows: Sequence[int]) -> list[tuple]:
        """The COLUMNS of rows by their numbers."""
        columns = [self._meta[name] for name in COLUMNS]
        return [tuple(column[row - self.part.rows[0]] for column in columns) for row in rows]

    def column(self, name: str) -> list:
        """One of the COLUMNS, of every row of this shard."""
        return self._meta[name]

    def captioned(self) -> int:
        """Rows that have a caption with a word in it."""
        return sum(caption is not None and bool(caption.strip()) for caption in self._meta["caption"])

    def _among(
        self, rows: Tensor, codes: Codes | Panels | None, queries: Tensor, k: int, first: int
    ) -> Ranked:
        if self.manifest.metric == "nl2":
            return _pixels(rows, queries, k, first)
        return _cosine(rows, codes, queries, k, first)

    @functools.cached_property
    def _meta(self) -> dict[str, list]:
        try:
            tables = [*_lines(self.data / META, *self.part.rows)]
        except Exception as error:  # pyarrow raises many types on damaged files
            raise IndexCorrupt(f"{self.data / META} cannot be read ({error})") from error
        return {name: [value for table in tables for value in table[name].to_pylist()] for name in COLUMNS}


def _codes_of(rows: Tensor, codes: Codes | Panels | None, part: Part) -> Codes | Panels | None:
    """The codes of a shard's rows: cut out, or where they lie in panels of many rows made anew."""
    if isinstance(codes, Panels):
        return amg.kernels.encode_panels(rows, rotation=codes.rotation)
    return None if codes is None else Codes(*(column[slice(*part.rows)] for column in codes))


def _lines(path: Path, start: int, stop: int) -> Iterator[Any]:
    """Lines [start, stop) of a Parquet file, a table for each row group that has some."""
    with import_parquet().ParquetFile(path) as file:
        first = 0
        for group in range(file.num_row_groups):
            after = first + file.metadata.row_group(group).num_rows
            if first < stop and after > start:
                table = file.read_row_group(group, columns=[*COLUMNS])
                low = max(start - first, 0)
                yield table.slice(low, min(stop, after) - first - low)
            first = after


def _cosine(rows: Tensor, codes: Codes | Panels | None, queries: Tensor, k: int, first: int) -> Ranked:
    """The k closest of unit `rows`, of which the first is number `first`."""
    if len(rows) == 0:
        return _nothing(queries)
    closeness, place = amg.kernels.topk_cosine(queries, rows, min(k, len(rows)), codes=codes)
    place = place + first
    return Ranked(closeness, place, place)


def _pixels(rows: Tensor, queries: Tensor, k: int, first: int) -> Ranked:
    """The k closest of uint8 `rows`, by −ℓ2."""
    if len(rows) == 0:
        return _nothing(queries)
    usable = finite_rows(queries)
    distance, place = closest_pixels(where_rows(usable, queries.double(), 0.0), rows, k)
    place = place + first
    return Ranked(where_rows(usable, -distance, torch.nan), place, place)


def _nothing(queries: Tensor) -> Ranked:
    numbers = torch.empty(len(queries), 0, dtype=torch.int64)
    return Ranked(torch.empty(len(queries), 0), numbers, numbers)

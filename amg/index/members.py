"""Folded pictures: a row stands for them in the search, but the final check is over every picture indexed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import amg.kernels
from amg.index.exact import Nearest
from amg.index.fold import row_hashes
from amg.index.guard import SKETCH_DTYPE, SKETCH_LENGTH
from amg.index.store import DTYPES, GUARD, MEMBER_ROWS, MEMBERS_FILE, Manifest, append, map_file, truncate

MEMBER_SKETCHES = "members.sketches.f16"  # during a build; at its end they follow the rows' own
HASH_BLOCK = 1 << 13


@dataclass(frozen=True)
class Members:
    """Vectors [M, D] of the folded pictures that are not their row's bit for bit, and that row [M]."""

    vectors: Tensor
    rows: Tensor

    def nearer(self, queries: Tensor, found: Nearest) -> Nearest:
        """What was `found` of each query [B, D] among the rows, or the row of a member that is closer.

        Exact. nl2: over the rows' denominator, which duplicates among the nearest would make small. NaN where
        either similarity is: what could not be measured is no evidence.
        """
        if found.extras is None:
            cosine = amg.kernels.top1_cosine(queries, self.vectors)
            closeness, member = cosine.similarity, cosine.row
        else:
            pixels = amg.kernels.nl2(queries, self.vectors, k=1)
            closeness, member = -pixels.distance, pixels.row
        return closer(found, closeness, self.rows.to(member.device)[member])

    def to(self, device: torch.device) -> Members:
        """These members on another device."""
        return Members(self.vectors.to(device), self.rows.to(device))


def closer(found: Nearest, closeness: Tensor, row: Tensor) -> Nearest:
    """What was `found` among the rows, or the closest folded picture: its cosine or −ℓ2 [B], and its row."""
    if found.extras is None:
        similarity = closeness.clamp(-1, 1)
    else:
        similarity = torch.where(closeness == 0, 0.0, closeness / found.extras.denominator)
    return found._replace(
        similarity=torch.maximum(similarity, found.similarity),
        row=torch.where(similarity > found.similarity, row, found.row),
    )


def map_members(directory: Path, manifest: Manifest) -> Members | None:
    """The folded pictures of an index on disk, None where it has none or was built without keeping them."""
    name = manifest.members_file
    if name not in manifest.files or not manifest.members:
        return None
    vectors = map_file(directory / name, DTYPES[manifest.dtype], manifest.members, manifest.dimension)
    return Members(vectors, member_rows(directory, manifest))


def member_rows(directory: Path, manifest: Manifest) -> Tensor:
    """The row that each folded picture of an index on disk was folded into, int64 [M]."""
    if not manifest.members:
        return torch.empty(0, dtype=torch.int64)
    return map_file(directory / MEMBER_ROWS, torch.int64, manifest.members)


class MemberLog:
    """The members of a build, appended shard by shard; what lies beyond `count` is cut off."""

    def __init__(self, partial: Path, dtype: str, dimension: int, count: int, guard: int = SKETCH_LENGTH):
        self.count, self.dimension = count, dimension
        self.paths = {
            partial / MEMBERS_FILE[dtype]: (DTYPES[dtype], dimension),
            partial / MEMBER_SKETCHES: (SKETCH_DTYPE, guard),
            partial / MEMBER_ROWS: (torch.int64, 1),
        }
        for path, (kind, width) in self.paths.items():
            truncate(path, count * width * kind.itemsize)
        self.seen = set(_pairs(*self._written()))

    def _written(self) -> list[Tensor]:
        return [
            map_file(path, kind, self.count, width)
            if self.count * width
            else torch.empty(self.count, width, dtype=kind)
            for path, (kind, width) in self.paths.items()
        ]

    def add(self, vectors: Tensor, sketches: Tensor, rows: list[int]) -> None:
        """Members with these vectors [n, D], sketches [n, guard] and rows, unless they are there."""
        owners = torch.tensor(rows, dtype=torch.int64).view(-1, 1)
        fresh = []
        for at, pair in enumerate(_pairs(vectors, sketches, owners)):
            if pair not in self.seen:
                self.seen.add(pair)
                fresh.append(at)
        for path, values in zip(self.paths, (vectors, sketches, owners), strict=True):
            append(path, values[fresh])
        self.count += len(fresh)

    def finish(self, partial: Path) -> list[str]:
        """Put the sketches behind the rows' own in the guard -> names of the files that go into the index."""
        vectors, _, rows = self.paths
        for block in self._written()[1].split(HASH_BLOCK):
            append(partial / GUARD, block)
        return [vectors.name, rows.name] if self.count else []

    def clear(self) -> None:
        """Remove what is not part of the finished index."""
        vectors, sketches, rows = self.paths
        for path in (sketches,) if self.count else (sketches, vectors, rows):
            path.unlink(missing_ok=True)


def differing(vectors: Tensor, sketches: Tensor, own: Tensor, own_sketches: Tensor) -> Tensor:
    """[n] bool: the pictures whose vector or sketch is not that of the row they were folded into."""
    return (vectors != own).any(1) | (sketches != own_sketches).any(1)


def _pairs(vectors: Tensor, sketches: Tensor, _rows: Tensor) -> list[tuple[int, int]]:
    """Content hashes of each member's vector and sketch."""
    pairs: list[tuple[int, int]] = []
    for block, shapes in zip(vectors.split(HASH_BLOCK), sketches.split(HASH_BLOCK), strict=True):
        pairs += zip(row_hashes(block).tolist(), row_hashes(shapes).tolist(), strict=True)
    return pairs

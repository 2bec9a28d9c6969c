"""Duplicates: which images of a shard become rows, and which fold into a row that is already there.

Complete and exact: amg.kernels.near_pairs finds every pair within the threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from amg.index.sketches import RowSketches, Sketcher
from amg.kernels import NearPairs, near_pairs

DEFAULT_NEAR_DUPLICATE = {"cosine": 0.98, "nl2": 0.02}
FOLD_BLOCK = 1024  # images that are compared with one another at once


@dataclass(frozen=True)
class FoldRule:
    """Fold at cosine ≥ threshold, or at RMS pixel distance ≤ threshold on [0, 1]; None: exact copies only."""

    metric: str
    threshold: float | None
    image_size: tuple[int, int] | None = None


def row_hashes(rows: torch.Tensor) -> np.ndarray:
    """A 64-bit content hash of each stored row [n, D]."""
    raw = rows.contiguous().numpy()
    digests = b"".join(blake2b(row.tobytes(), digest_size=8).digest() for row in raw)
    return np.frombuffer(digests, dtype="<u8")


class HashTable:
    """Row numbers by content hash: sorted runs, each longer than all after it; 16 bytes a row."""

    def __init__(self) -> None:
        self.runs: list[tuple[np.ndarray, np.ndarray]] = []

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """Row of each hash [n], −1 where unknown; of several rows the first."""
        found = np.full(len(hashes), -1, dtype=np.int64)
        for known, rows in reversed(self.runs):
            place = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            found = np.where(known[place] == hashes, rows[place], found)
        return found

    def add(self, hashes: np.ndarray, first_row: int) -> None:
        """Rows first_row, first_row + 1, … with these hashes [n]."""
        if not len(hashes):
            return
        rows = np.arange(first_row, first_row + len(hashes))
        while self.runs and len(self.runs[-1][0]) <= len(hashes):
            known, of_known = self.runs.pop()
            hashes, rows = np.concatenate([known, hashes]), np.concatenate([of_known, rows])
        order = np.argsort(hashes, kind="stable")
        self.runs.append((hashes[order], rows[order]))


@dataclass(frozen=True)
class Closest:
    """Of each of n images the closest row within the threshold: closeness [n] fp32 and row [n], −1: none."""

    closeness: np.ndarray
    row: np.ndarray

    def or_nearer(self, other: Closest) -> Closest:
        """The closer of the two, and of equal ones this one."""
        nearer = other.closeness > self.closeness
        return Closest(
            np.where(nearer, other.closeness, self.closeness), np.where(nearer, other.row, self.row)
        )


def closest(pairs: NearPairs, count: int, first_row: int) -> Closest:
    """The closest row of each of `count` images, of equal ones the lowest; others are rows first_row, …"""
    left, right, close = (part.numpy() for part in pairs)
    order = np.lexsort((right, -close, left))
    image, at = np.unique(left[order], return_index=True)
    found = Closest(np.full(count, -np.inf, dtype=np.float32), np.full(count, -1, dtype=np.int64))
    found.closeness[image], found.row[image] = close[order[at]], first_row + right[order[at]]
    return found


@dataclass
class Shard:
    """The images of a shard that are not exact copies, as they are folded: rows [n, D], sketches [n, 64] and
    their codes; kept: which of them became rows so far, first_row the first one's number."""

    rows: Tensor
    sketches: RowSketches
    first_row: int
    kept: list[int]

    def fold(self, block: range, old: Tensor, of_old: RowSketches, least: float) -> list[int]:
        """The row of each image of a block, given rows `old` [first_row, D] and those kept so far."""
        rows, sketches = self.rows[block.start : block.stop], self.sketches.part(block)
        near = _pairs(rows, sketches, old, of_old, least)
        found = closest(near, len(rows), 0)
        near = _pairs(rows, sketches, self.rows[self.kept], self.sketches.chosen(self.kept), least)
        found = found.or_nearer(closest(near, len(rows), self.first_row))
        return self._greedy(block, found, _pairs(rows, sketches, rows, sketches, least, earlier=True))

    def _greedy(self, block: range, found: Closest, links: NearPairs) -> list[int]:
        """In order: an image goes to the closest row there is, or becomes one."""
        left, right, close = (part.numpy() for part in links)
        ends = np.searchsorted(left, np.arange(len(block) + 1))
        assigned: list[int] = []
        new_row = np.full(len(block), -1, dtype=np.int64)  # of the images of the block that became rows
        for at, (closeness, row) in enumerate(zip(found.closeness.tolist(), found.row.tolist(), strict=True)):
            some = slice(ends[at], ends[at + 1])
            for earlier, link in zip(right[some].tolist(), close[some].tolist(), strict=True):
                if new_row[earlier] >= 0 and link > closeness:
                    closeness, row = link, int(new_row[earlier])
            if row < 0:
                row = self.first_row + len(self.kept)
                new_row[at] = row
                self.kept.append(block.start + at)
            assigned.append(row)
        return assigned


def _pairs(
    rows: Tensor,
    sketches: RowSketches,
    others: Tensor,
    of_others: RowSketches,
    least: float,
    earlier: bool = False,
) -> NearPairs:
    return near_pairs(
        rows, others, sketches=sketches.sketches, codes=of_others.codes, least=least, earlier=earlier
    )


def fold_shard(
    rows: Tensor, duplicate_of: np.ndarray, old: Tensor, sketcher: Sketcher, rule: FoldRule
) -> tuple[list[int], list[int]]:
    """Assign each image of a shard to a row, in order: an old row, an earlier image's row, or a new one.

    rows [n, D]: the shard; duplicate_of [n]: old row with the same content (−1: none), or −2 − j where it
    has the content of image j of this shard; old [m, D]: rows so far, all of which the sketcher has. Returns
    (row of each image, images that become rows m, m + 1, …).
    """
    fresh = np.flatnonzero(duplicate_of == -1)
    assigned = duplicate_of.copy()
    assigned[fresh], kept = _fold_fresh(rows[torch.from_numpy(fresh)], old, sketcher, rule)
    for image in np.flatnonzero(duplicate_of <= -2).tolist():
        assigned[image] = assigned[-2 - duplicate_of[image]]
    return assigned.tolist(), fresh[kept].tolist()


def _fold_fresh(rows: Tensor, old: Tensor, sketcher: Sketcher, rule: FoldRule) -> tuple[list[int], list[int]]:
    """The row of each of rows [n, D] that are no exact copies, and which of them become rows."""
    if rule.threshold is None:
        return list(range(len(old), len(old) + len(rows))), list(range(len(rows)))
    least = rule.threshold if rule.metric == "cosine" else -rule.threshold
    shard, assigned = Shard(rows, sketcher.sketch(rows), len(old), []), list[int]()
    for start in range(0, len(rows), FOLD_BLOCK):
        block = range(start, min(start + FOLD_BLOCK, len(rows)))
        assigned += shard.fold(block, old, sketcher.known(), least)
    return assigned, shard.kept


def same_content(hashes: np.ndarray, rows: torch.Tensor, table: HashTable, kept: torch.Tensor) -> np.ndarray:
    """`duplicate_of` for fold_shard: equal hashes [n] whose bytes were compared and are equal."""
    known = table.find(hashes)
    first_seen: dict[int, int] = {}
    found = np.full(len(hashes), -1, dtype=np.int64)
    for i, (content, row) in enumerate(zip(hashes.tolist(), known.tolist(), strict=True)):
        if row >= 0 and torch.equal(kept[row], rows[i]):
            found[i] = row
        elif content in first_seen and torch.equal(rows[first_seen[content]], rows[i]):
            found[i] = -2 - first_seen[content]
        else:
            first_seen.setdefault(content, i)
    return found

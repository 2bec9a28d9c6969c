"""Duplicates: which images of a shard become rows, and which fold into a row that is already there.

Exact, though short: an orthogonal projection P never lengthens a vector, ‖P(a − b)‖ ≤ ‖a − b‖, so a pair
whose sketches Pa, Pb lie farther apart than the threshold does so in full. Survivors are measured in full.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

DEFAULT_NEAR_DUPLICATE = {"cosine": 0.98, "nl2": 0.02}
SKETCH_GRID = 4
SKETCH_COSINE = 64
KEPT_BLOCK = 4096
PAIR_BLOCK_VALUES = 1 << 22
PART_STRIDE = 16


@dataclass(frozen=True)
class FoldRule:
    """Fold at cosine ≥ threshold, or at RMS pixel distance ≤ threshold on [0, 1]; None: exact copies only."""

    metric: str
    threshold: float | None
    image_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Pairs:
    """Pairs within the threshold, left ascending, then right: indices [p], [p] and closeness [p] fp32."""

    left: torch.Tensor
    right: torch.Tensor
    closeness: torch.Tensor


def row_hashes(rows: torch.Tensor) -> np.ndarray:
    """A 64-bit content hash of each stored row [n, D]."""
    raw = rows.contiguous().numpy()
    digests = b"".join(blake2b(row.tobytes(), digest_size=8).digest() for row in raw)
    return np.frombuffer(digests, dtype="<u8")


class HashTable:
    """Row numbers by content hash: two sorted arrays, 16 bytes a row."""

    def __init__(self) -> None:
        self.hashes = np.empty(0, dtype=np.uint64)
        self.rows = np.empty(0, dtype=np.int64)

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """Row of each hash [n], −1 where unknown."""
        if not len(self.hashes):
            return np.full(len(hashes), -1, dtype=np.int64)
        place = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return np.where(self.hashes[place] == hashes, self.rows[place], -1)

    def add(self, hashes: np.ndarray, first_row: int) -> None:
        """Rows first_row, first_row + 1, … with these hashes [n]."""
        merged = np.concatenate([self.hashes, hashes])
        rows = np.concatenate([self.rows, np.arange(first_row, first_row + len(hashes))])
        order = np.argsort(merged, kind="stable")
        self.hashes, self.rows = merged[order], rows[order]


def sketch_dimension(dimension: int, rule: FoldRule) -> int:
    """Length of a sketch."""
    if rule.image_size is None:
        return min(SKETCH_COSINE, dimension)
    return 3 * min(SKETCH_GRID, rule.image_size[0]) * min(SKETCH_GRID, rule.image_size[1])


def sketch_rows(rows: torch.Tensor, rule: FoldRule) -> torch.Tensor:
    """Rows [n, D] → sketches [n, d ≤ 64] fp32: block means of pixels, a fixed rotation of embeddings."""
    if rule.image_size is None:
        return rows.float() @ _rotation(rows.shape[1])
    step = max(1, PAIR_BLOCK_VALUES // rows.shape[1])
    return torch.cat([_block_means(block, rule.image_size) for block in rows.split(step)])


def _block_means(rows: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
    """Orthonormal coordinates of a 4x4 grid of cells a channel; what the cells do not cover is dropped."""
    height, width = image_size
    grid = (min(SKETCH_GRID, height), min(SKETCH_GRID, width))
    cell = (height // grid[0], width // grid[1])
    pixels = rows.view(len(rows), 3, height, width)[:, :, : grid[0] * cell[0], : grid[1] * cell[1]]
    means = adaptive_avg_pool2d(pixels.float() / 255 - 0.5, grid)
    return means.flatten(1) * (cell[0] * cell[1]) ** 0.5


def _rotation(dimension: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (dimension, min(SKETCH_COSINE, dimension))
    gaussian = torch.randn(shape, generator=generator, dtype=torch.float32)
    return torch.linalg.qr(gaussian).Q


def _squared_limit(rule: FoldRule, dimension: int) -> float:
    """Largest squared distance of a pair within the threshold, with room for fp16 norms and fp32 sums."""
    assert rule.threshold is not None
    if rule.metric == "cosine":
        return 2 - 2 * rule.threshold + 4e-3
    return dimension * (rule.threshold**2 + 1e-5)


def closeness(left: torch.Tensor, right: torch.Tensor, rule: FoldRule) -> torch.Tensor:
    """Pair by pair [p, D] × [p, D] → [p] fp32: the cosine, or minus the RMS distance."""
    if rule.metric == "cosine":
        return (left.float() * right.float()).sum(1)
    return -((left.float() - right.float()) / 255).square().mean(1).sqrt()


def near_pairs(
    rows: torch.Tensor,
    sketches: torch.Tensor,
    others: torch.Tensor,
    other_sketches: torch.Tensor,
    rule: FoldRule,
) -> Pairs:
    """Pairs of rows [n, D] and others [m, D] within the rule's threshold."""
    assert rule.threshold is not None
    norms = sketches.square().sum(1)[:, None] + other_sketches.square().sum(1)[None, :]
    squared = torch.addmm(norms, sketches, other_sketches.T, alpha=-2)
    left, right = (squared <= _squared_limit(rule, rows.shape[1])).nonzero(as_tuple=True)
    if rule.metric == "nl2":
        left, right = _near_in_part(rows, others, left, right, rule)
    step = max(1, PAIR_BLOCK_VALUES // rows.shape[1])
    measured = [
        closeness(rows[left[at : at + step]], others[right[at : at + step]], rule)
        for at in range(0, len(left), step)
    ]
    close = torch.cat(measured) if measured else torch.empty(0, dtype=torch.float32)
    within = close >= (rule.threshold if rule.metric == "cosine" else -rule.threshold)
    return Pairs(left[within], right[within], close[within])


def _near_in_part(
    rows: torch.Tensor, others: torch.Tensor, left: torch.Tensor, right: torch.Tensor, rule: FoldRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs within the limit over every 16th pixel alone: noise, whose sketches are all alike, ends here."""
    some, part = rows[:, ::PART_STRIDE], others[:, ::PART_STRIDE]
    limit = 255**2 * _squared_limit(rule, rows.shape[1])
    step = max(1, PAIR_BLOCK_VALUES // some.shape[1])
    near = [
        (some[i].float() - part[j].float()).square().sum(1) <= limit
        for i, j in zip(left.split(step), right.split(step), strict=True)
    ]
    within = torch.cat(near)
    return left[within], right[within]


def closest_kept(
    rows: torch.Tensor,
    sketches: torch.Tensor,
    kept: torch.Tensor,
    kept_sketches: torch.Tensor,
    rule: FoldRule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row [n, D] the closest kept row within the threshold: closeness [n], row [n] (−1: none)."""
    best = torch.full((len(rows),), -torch.inf, dtype=torch.float32)
    best_row = torch.full((len(rows),), -1, dtype=torch.int64)
    for start in range(0, len(kept), KEPT_BLOCK):
        block = slice(start, start + KEPT_BLOCK)
        pairs = near_pairs(rows, sketches, kept[block], kept_sketches[block], rule)
        for left, right, close in zip(
            pairs.left.tolist(), pairs.right.tolist(), pairs.closeness.tolist(), strict=True
        ):
            if close > best[left].item():  # ascending order: ties stay with the lowest row
                best[left], best_row[left] = close, start + right
    return best, best_row


def fold_shard(
    rows: torch.Tensor,
    sketches: torch.Tensor | None,
    duplicate_of: np.ndarray,
    kept: torch.Tensor,
    kept_sketches: torch.Tensor | None,
    rule: FoldRule,
) -> tuple[list[int], list[int]]:
    """Assign each image of a shard to a row, in order: an old row, an earlier image's row, or a new one.

    rows [n, D]: the shard; duplicate_of [n]: kept row with the same content (−1: none), or −2 − j where it
    has the content of image j of this shard; kept [m, D]: rows so far. Returns (row of each image, images
    that become rows m, m + 1, …).
    """
    fresh = [i for i, row in enumerate(duplicate_of.tolist()) if row == -1]
    nearest, links = _near_of_fresh(rows, sketches, fresh, kept, kept_sketches, rule)
    assigned: list[int] = []
    new_rows: dict[int, int] = {}
    for i, duplicate in enumerate(duplicate_of.tolist()):
        if duplicate >= 0:
            assigned.append(duplicate)
        elif duplicate <= -2:
            assigned.append(assigned[-2 - duplicate])
        else:
            close, row = nearest.get(i, (-torch.inf, -1))
            for earlier, link in links.get(i, ()):
                if earlier in new_rows and link > close:
                    close, row = link, new_rows[earlier]
            if row < 0:
                row = new_rows[i] = len(kept) + len(new_rows)
            assigned.append(row)
    return assigned, list(new_rows)


def _near_of_fresh(
    rows: torch.Tensor,
    sketches: torch.Tensor | None,
    fresh: list[int],
    kept: torch.Tensor,
    kept_sketches: torch.Tensor | None,
    rule: FoldRule,
) -> tuple[dict[int, tuple[float, int]], dict[int, list[tuple[int, float]]]]:
    """For each fresh image: its closest kept row, and every earlier fresh image within the threshold."""
    if rule.threshold is None or not fresh:
        return {}, {}
    assert sketches is not None and kept_sketches is not None
    some, short = rows[fresh], sketches[fresh]
    best, best_row = closest_kept(some, short, kept, kept_sketches, rule)
    nearest = {i: (best[at].item(), int(best_row[at])) for at, i in enumerate(fresh) if best_row[at] >= 0}
    links: dict[int, list[tuple[int, float]]] = {}
    pairs = near_pairs(some, short, some, short, rule)
    for left, right, close in zip(
        pairs.left.tolist(), pairs.right.tolist(), pairs.closeness.tolist(), strict=True
    ):
        if right < left:
            links.setdefault(fresh[left], []).append((fresh[right], close))
    return nearest, links


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

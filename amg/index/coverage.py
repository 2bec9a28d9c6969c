"""What share of a training set an index covers: counted by a build, said wherever the index is used."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SKIPPED = "skipped.jsonl"
NAMED, REASONS = 1000, 100  # names that are written out; reasons that are counted apart
REMOVED = "removed, and the model was not said to be retrained"
OTHER_REASONS = "other reasons"
LEAST = 0.99  # of coverage without a warning


@dataclass(frozen=True)
class Coverage:
    """Pictures that a build saw, and what became of them. indexed: rows; folded: into one of these; skipped:
    how many by reason; share: (indexed + folded) / seen, which the promise covers."""

    seen: int
    indexed: int
    folded: int
    skipped: dict[str, int] = field(default_factory=dict)
    share: float = 1.0


def make_coverage(indexed: int, folded: int, skipped: dict[str, int]) -> Coverage:
    """The record of a build out of its numbers."""
    seen = indexed + folded + sum(skipped.values())
    return Coverage(seen, indexed, folded, skipped, (indexed + folded) / max(seen, 1))


class SkippedFile:
    """Counts skipped pictures by reason, and keeps the names of the first."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.lines: list[str] = []

    def add(self, position: int, name: str, reason: str) -> None:
        kind = reason if reason in self.counts or len(self.counts) < REASONS else OTHER_REASONS
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(self.lines) < NAMED:
            record = {"position": position, "id": name, "reason": reason}
            self.lines.append(json.dumps(record, ensure_ascii=False))

    def write(self, directory: Path) -> None:
        """skipped.jsonl: of the first 1,000 position, id and reason, a line each; no file where there are
        none."""
        if self.lines:
            with open(directory / SKIPPED, "w", encoding="utf-8") as file:
                file.write("\n".join(self.lines) + "\n")


def warn_of_gaps(indexes: Iterable[Any]) -> None:
    """Say to the caller's caller which of the indexes cover less than 99 % of their training sets, and which
    hold imported vectors that were compared with no picture."""
    for index in indexes:
        coverage = getattr(index, "coverage", 1.0)
        if coverage < LEAST:
            warnings.warn(
                f"`index` covers {100 * coverage:.1f} % of its training set ({index.path}): pictures that "
                "were skipped when it was built can be copied unseen; "
                f"`amg index info {index.path}` says which",
                stacklevel=3,
            )
        if not getattr(index, "verified", True):
            warnings.warn(
                f"`index` holds imported vectors that nobody has compared with pictures ({index.path}): "
                "`Index.verify_embeddings` does",
                stacklevel=3,
            )


def warn_of_no_guard(directory: Path, manifest: Any) -> None:
    """Say to the caller's caller that an index has no guard, why, and what gives it one."""
    if manifest.guard is not None:
        return
    why, remedy = "built by an earlier version", f"`amg index guard {directory} IMAGES` adds one"
    if manifest.imported is not None:
        why, remedy = "made of vectors, no picture was seen", "an index built of the pictures has one"
    warnings.warn(
        f"{directory} has no guard (it was {why}): copies that guidance pushed just under the metric's "
        f"threshold pass its final check; {remedy}",
        stacklevel=3,
    )


def warn_of_a_name_alone(directory: Path, manifest: Any) -> None:
    """Say to the caller's caller that an embedder is held to its name and length only."""
    if manifest.imported is None or manifest.embedder.sha256 or manifest.verified:
        return
    warnings.warn(
        f"{directory} says no more than the name {manifest.embedder.name!r} of what made its vectors, and "
        "nobody has verified them: `Index.verify_embeddings` compares some pictures",
        stacklevel=3,
    )

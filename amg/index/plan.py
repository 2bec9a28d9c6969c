"""The arguments of a build, checked once and before any image is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch

from amg.index.captions import Captions
from amg.index.decode import check_background
from amg.index.encode import embedder_record
from amg.index.errors import IndexBuildError
from amg.index.fold import DEFAULT_NEAR_DUPLICATE, FoldRule
from amg.index.guard import SKETCH
from amg.index.images import ImageSource
from amg.index.store import DTYPES, EmbedderRecord

SHARD_IMAGES = 1024
SHARD_BYTES = 1 << 25


@dataclass(frozen=True)
class BuildPlan:
    """How images become rows. dtype: of the stored rows; size: (H, W) to resize to, None to keep theirs."""

    embedder: Any
    record: EmbedderRecord | None
    metric: str
    dtype: str
    size: tuple[int, int] | None
    batch_size: int
    near_duplicate: float | None
    on_error: str
    ids: Sequence[str] | None
    background: str

    def shard_images(self, dimension: int) -> int:
        """Images in a shard: whole batches, so that a resumed build embeds the same; ≤ 32 MiB of rows."""
        row_bytes = dimension * torch.empty((), dtype=DTYPES[self.dtype]).element_size()
        most = min(SHARD_IMAGES, SHARD_BYTES // row_bytes)
        return max(1, most // self.batch_size) * self.batch_size

    def fold_rule(self, image_size: tuple[int, int] | None) -> FoldRule:
        """What counts as a duplicate; image_size is that of the rows of a pixel index."""
        return FoldRule(self.metric, self.near_duplicate, image_size if self.metric == "nl2" else None)

    def check_totals(self, captions: Captions, total: int) -> None:
        """As many captions and ids as images. Raises IndexBuildError."""
        captions.check_total(total)
        if self.ids is not None and len(self.ids) != total:
            raise IndexBuildError(f"`ids` do not match `images`: {len(self.ids)} ids for {total} images")

    def identity(self, source: ImageSource, captions: Captions) -> dict[str, Any]:
        """What must be equal for a build to be resumed."""
        record = None if self.record is None else dataclasses.asdict(self.record)
        ids = None if self.ids is None else blake2b("\n".join(self.ids).encode()).hexdigest()
        return {
            "images": source.identity,
            "captions": captions.identity,
            "ids": ids,
            "embedder": record,
            "size": None if self.size is None else list(self.size),
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "shard": [SHARD_IMAGES, SHARD_BYTES],
            "near_duplicate": self.near_duplicate,
            "guard": SKETCH,
            "background": self.background,
        }


def make_plan(
    embedder: Any,
    ids: Sequence[str] | None,
    size: int | tuple[int, int] | None,
    dtype: str,
    batch_size: int,
    near_duplicate: float | bool,
    on_error: str,
    background: str,
) -> BuildPlan:
    """Check the arguments that need no image. Raises IndexBuildError, TypeError for the embedder."""
    metric = "nl2" if embedder is None else "cosine"
    if dtype not in ("float16", "float32"):
        raise IndexBuildError(f'`dtype` must be "float16" or "float32", got {dtype!r}')
    if batch_size < 1:
        raise IndexBuildError(f"`batch_size` must be at least 1, got {batch_size}")
    if on_error not in ("skip", "raise"):
        raise IndexBuildError(f'`on_error` must be "skip" or "raise", got {on_error!r}')
    if ids is not None and (len(set(ids)) != len(ids) or not all(isinstance(name, str) for name in ids)):
        raise IndexBuildError("`ids` must be distinct strings")
    for name in ids or ():
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise IndexBuildError(f"`ids` must be text, {name!r} holds half a surrogate pair")
    return BuildPlan(
        embedder=embedder,
        record=None if embedder is None else embedder_record(embedder),
        metric=metric,
        dtype="uint8" if embedder is None else dtype,
        size=_check_size(size),
        batch_size=batch_size,
        near_duplicate=_check_near_duplicate(near_duplicate, metric),
        on_error=on_error,
        ids=ids,
        background=check_background(background),
    )


def _check_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    pair = (size, size) if isinstance(size, int) else size
    if pair is None:
        return None
    if len(pair) != 2 or not all(isinstance(extent, int) and extent > 0 for extent in pair):
        raise IndexBuildError(f"`size` must be (H, W) or an int, both positive, got {size!r}")
    return (pair[0], pair[1])


def _check_near_duplicate(threshold: float | bool, metric: str) -> float | None:
    if isinstance(threshold, bool):
        return DEFAULT_NEAR_DUPLICATE[metric] if threshold else None
    low, high = (-1, 1) if metric == "cosine" else (0, 1)
    if not low <= threshold <= high:
        raise IndexBuildError(
            f"`near_duplicate` must be True, False or within [{low}, {high}] for {metric}, got {threshold}"
        )
    return float(threshold)

"""The arguments of a build, checked once and before any image is read."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from amg.index.captions import Captions
from amg.index.decode import check_background
from amg.index.encode import embedder_record
from amg.index.errors import IndexBuildError
from amg.index.fold import DEFAULT_NEAR_DUPLICATE, FoldRule
from amg.index.guard import SKETCH, SKETCH_SIDE
from amg.index.sources.source import ImageSource
from amg.index.store import DTYPES, EmbedderRecord

SHARD_IMAGES = 1024
SHARD_BYTES = 1 << 25
BATCH_BYTES = 1 << 28  # of float32 pixels that an embedder gets at once, unless one picture has more
MOST_BATCH, MOST_PIXELS = 1 << 20, 1 << 14  # a batch; height and width


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
    ids: list[str] | None
    background: str
    image_column: str | None = None

    def shard_images(self, dimension: int) -> int:
        """Images in a shard: whole batches, so that a resumed build embeds the same; ≤ 32 MiB of rows."""
        row_bytes = dimension * torch.empty((), dtype=DTYPES[self.dtype]).element_size()
        most = min(SHARD_IMAGES, SHARD_BYTES // row_bytes)
        return max(1, most // self.batch_size) * self.batch_size

    @property
    def least(self) -> int | None:
        """Pixels a side of which a picture has enough to be resized well, None where its size is kept."""
        return None if self.size is None else 4 * max(*self.size, SKETCH_SIDE)

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
        ids = None if self.ids is None else blake2b(json.dumps(self.ids).encode()).hexdigest()
        return {
            "images": source.identity,
            "captions": captions.identity,
            "ids": ids,
            "embedder": record,
            "size": None if self.size is None else list(self.size),
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "shard": [SHARD_IMAGES, SHARD_BYTES, BATCH_BYTES],
            "near_duplicate": self.near_duplicate,
            "guard": SKETCH,
            "background": self.background,
            "image_column": self.image_column,
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
    image_column: str | None = None,
) -> BuildPlan:
    """Check the arguments that need no image. Raises IndexBuildError, TypeError for the embedder."""
    metric = "nl2" if embedder is None else "cosine"
    if dtype not in ("float16", "float32"):
        raise IndexBuildError(f'`dtype` must be "float16" or "float32", got {dtype!r}')
    if image_column is not None and not isinstance(image_column, str):
        raise IndexBuildError(f"`image_column` must be the name of a column or None, got {image_column!r}")
    if on_error not in ("skip", "raise"):
        raise IndexBuildError(f'`on_error` must be "skip" or "raise", got {on_error!r}')
    return BuildPlan(
        embedder=embedder,
        record=None if embedder is None else embedder_record(embedder),
        metric=metric,
        dtype="uint8" if embedder is None else dtype,
        size=_check_size(size),
        batch_size=_check_extent(batch_size, "batch_size", MOST_BATCH),
        near_duplicate=_check_near_duplicate(near_duplicate, metric),
        on_error=on_error,
        ids=_check_ids(ids),
        background=check_background(background),
        image_column=image_column,
    )


def _check_ids(ids: Any) -> list[str] | None:
    """Ids as a list of str: they are looked up by position, so that what has no order is refused."""
    if ids is None:
        return None
    array = hasattr(ids, "__array__") and getattr(ids, "ndim", 0) == 1
    if not array and (isinstance(ids, (str, bytes, bytearray)) or not isinstance(ids, Sequence)):
        raise IndexBuildError(
            f"`ids` must be distinct strings, a list of one for each image, got {type(ids).__name__}"
        )
    names = list(ids)
    for at, name in enumerate(names):
        if not isinstance(name, str):
            raise IndexBuildError(f"`ids` must be distinct strings, got {name!r} at {at}")
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise IndexBuildError(f"`ids` must be text, {name!r} holds half a surrogate pair")
    if len(set(names)) != len(names):
        repeated = Counter(names).most_common(1)[0]
        raise IndexBuildError(f"`ids` must be distinct strings, got {repeated[0]!r} {repeated[1]} times")
    return [str(name) for name in names]


def _check_extent(value: Any, name: str, most: int) -> int:
    """An int of any make, no bool. Raises IndexBuildError naming the argument."""
    whole = None if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__") else value
    try:
        number = 0 if whole is None else operator.index(whole)
    except TypeError:  # arrays of several
        number = 0
    if not 1 <= number <= most:
        raise IndexBuildError(f"`{name}` must be an int in [1, {most}], got {value!r}")
    return number


def _check_size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    several = isinstance(size, (list, tuple)) or getattr(size, "ndim", 0) == 1
    pair = list(size) if several else [size, size]
    try:
        if len(pair) == 2:
            return (_check_extent(pair[0], "size", MOST_PIXELS), _check_extent(pair[1], "size", MOST_PIXELS))
    except IndexBuildError:
        pass
    raise IndexBuildError(
        f"`size` must be (H, W) or an int, both positive and at most {MOST_PIXELS}, got {size!r}"
    )


def _check_near_duplicate(threshold: Any, metric: str) -> float | None:
    if isinstance(threshold, (bool, np.bool_)):
        return DEFAULT_NEAR_DUPLICATE[metric] if threshold else None
    low, high = (-1, 1) if metric == "cosine" else (0, 1)
    number = float(threshold) if isinstance(threshold, numbers.Real) else math.nan
    if not low <= number <= high:
        raise IndexBuildError(
            f"`near_duplicate` must be True, False or within [{low}, {high}] for {metric}, got {threshold!r}"
        )
    return number

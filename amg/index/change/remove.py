"""Fewer pictures."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from amg.index.change.alike import contents_of
from amg.index.change.contents import Contents, logs
from amg.index.change.generations import change, gc
from amg.index.change.replay import opened, removed_from, replay
from amg.index.errors import IndexBuildError
from amg.index.journal import State


def remove(
    path: str | os.PathLike,
    *,
    ids: Sequence[str] = (),
    sources: Sequence[str] = (),
    pictures: Any = None,
    embedder: Any = None,
    retrained: bool = False,
    keep_old: bool = False,
    progress: bool = True,
    resume: bool = True,
) -> int:
    """Take pictures out of the index at `path`, by id, by where they lay, or by the pictures themselves → how
    many; it becomes what a build of the others would be.

    pictures: as `Index.build` takes them, with the index's embedder if it has one; every picture that is the
    same goes, exact copies too.

    Nothing of them stays: not their vectors, sketches, captions or names, nor, unless keep_old, the files of
    before (whoever has the index open is told to open it again). A model that still knows such a picture is
    then not kept from copying it: coverage falls by them, which is warned of, unless it was `retrained`
    without them. Raises IndexBuildError for a name that no picture has, or where none would be left.
    """
    directory, manifest = opened(path)
    data = directory / manifest.folder
    shown = set() if pictures is None else contents_of(Contents(data, manifest), pictures, embedder)
    dropped, indexed = _chosen(data, ids, sources, shown)
    if indexed == manifest.images:
        raise IndexBuildError(f"`ids`, `sources`: no picture would be left in {directory}")
    gone = removed_from(manifest) + (0 if retrained else indexed)

    def fill(state: State, partial: Path) -> None:
        contents = Contents(data, manifest)
        replay([(contents, dropped, "")], manifest, state, partial, progress, gone)

    named = blake2b(np.packbits(dropped).tobytes()).hexdigest()
    change(directory, manifest, {"removes": named, "gone": gone}, resume, fill)
    if not keep_old:
        gc(directory)
    if indexed and not retrained:
        warnings.warn(
            f"{indexed} pictures were taken out of {directory}: a model that was trained on them is no "
            "longer kept from copying them, and coverage says so; retrained=True (--retrained) says that it "
            "is another model",
            stacklevel=2,
        )
    return int(dropped.sum())


def _chosen(
    data: Path, ids: Sequence[str], sources: Sequence[str], shown: set[tuple[int, int]]
) -> tuple[np.ndarray, int]:
    """Which pictures are named [seen] bool, and how many of these are indexed. Raises IndexBuildError."""
    for name, given in (("ids", ids), ("sources", sources)):
        if isinstance(given, str) or not all(isinstance(one, str) for one in given):
            raise IndexBuildError(f"`{name}` must be a list of texts, got {given!r:.100}")
    wanted = {"id": set(ids), "source": set(sources)}
    if not wanted["id"] and not wanted["source"] and not shown:
        raise IndexBuildError(
            "`ids`, `sources` or `pictures` must name the pictures that are to go, got none"
        )
    missing = {name: set(values) for name, values in wanted.items()}
    parts, indexed = [], 0
    for log in logs(data):
        hit = np.zeros(log.num_rows, dtype=bool)
        for name, values in wanted.items():
            column = log[name].to_pylist()
            hit |= np.fromiter((value in values for value in column), bool, len(column))
            missing[name] -= set(column)
        contents = zip(log["vector"].to_pylist(), log["sketch"].to_pylist(), strict=True)
        hit |= np.fromiter((pair in shown for pair in contents), bool, log.num_rows)
        indexed += int((hit & (log["row"].to_numpy() >= 0)).sum())
        parts.append(hit)
    for name, values in missing.items():
        if values:
            raise IndexBuildError(f"`{name}s`: no picture has the {name} {min(values)!r}")
    return np.concatenate(parts), indexed

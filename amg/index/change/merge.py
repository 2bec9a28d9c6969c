"""Several indexes into one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from amg.index.build import require_new, require_place, write_whole
from amg.index.change.contents import Contents, logs
from amg.index.change.replay import digest_of, opened, removed_from, replay
from amg.index.errors import IndexBuildError
from amg.index.journal import State

ALIKE = ("metric", "dimension", "dtype", "image_size", "embedder", "near_duplicate", "guard", "background")


def merge(
    paths: Sequence[str | os.PathLike],
    path: str | os.PathLike,
    *,
    prefix: bool = False,
    progress: bool = True,
    resume: bool = True,
) -> None:
    """Join indexes of one embedder, metric and size into one at `path`: what a build of all their pictures,
    in this order, would be.

    prefix: put the name of its index before every id; without it ids must be distinct. Raises
    IndexBuildError.
    """
    place = require_place(path)
    require_new(place)
    if isinstance(paths, (str, os.PathLike)) or len(paths) < 2:
        raise IndexBuildError(f"`paths` must be two indexes or more, got {paths!r}")
    given = [opened(one) for one in paths]
    first = given[0][1]
    for directory, manifest in given[1:]:
        for name in ALIKE:
            ours, theirs = getattr(first, name), getattr(manifest, name)
            if ours != theirs:
                raise IndexBuildError(
                    f"`paths` must be alike in `{name}`: {ours} in {given[0][0]}, {theirs} in {directory}"
                )
    labels = [f"{directory.name}/" if prefix else "" for directory, _ in given]
    _require_distinct(
        [
            (directory / manifest.folder, label)
            for (directory, manifest), label in zip(given, labels, strict=True)
        ]
    )
    removed = sum(removed_from(manifest) for _, manifest in given)

    def fill(state: State, partial: Path) -> None:
        parts = [
            (Contents(directory / manifest.folder, manifest), None, label)
            for (directory, manifest), label in zip(given, labels, strict=True)
        ]
        replay(parts, first, state, partial, progress, removed, generation=0)

    digests = [digest_of(directory) for directory, _ in given]
    write_whole(place, {"merges": digests, "prefix": prefix}, resume, fill)


def _require_distinct(given: Sequence[tuple[Path, str]]) -> None:
    known: dict[str, Path] = {}
    for data, label in given:
        for log in logs(data):
            for name in log["id"].to_pylist():
                other = known.setdefault(label + name, data)
                if other != data:
                    raise IndexBuildError(
                        f"`paths`: {other} and {data} both have a picture {label + name!r}: pass prefix=True "
                        "(--prefix) to put the index's name before every id"
                    )

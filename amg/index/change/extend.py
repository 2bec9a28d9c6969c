"""More pictures."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from amg.index.build import progress_bar, resume_stream
from amg.index.captions import Captions, caption_column, read_captions
from amg.index.change.contents import logs
from amg.index.change.generations import change
from amg.index.change.replay import opened, passed_over_of, plan_of, removed_from
from amg.index.encode import check_embedder
from amg.index.errors import IndexBuildError
from amg.index.finish import finish_index
from amg.index.journal import Journal, State, log_path
from amg.index.members import MEMBER_SKETCHES
from amg.index.plan import BuildPlan
from amg.index.shards import ShardReader
from amg.index.sources import ImageSource, open_source
from amg.index.store import (
    GUARD,
    MEMBER_ROWS,
    PICTURES,
    SKETCH_BYTES,
    Manifest,
)

COPIED = 1 << 24  # bytes at once


def extend(
    path: str | os.PathLike,
    images: Any,
    captions: Any = None,
    embedder: Any = None,
    *,
    ids: Sequence[str] | None = None,
    batch_size: int = 64,
    on_error: str = "skip",
    image_column: str | None = None,
    progress: bool = True,
    resume: bool = True,
) -> None:
    """Add pictures to the index at `path`; it becomes what a build of the old ones and then these would be.

    Arguments as in `Index.build`; what is not among them (size, dtype, threshold, background) is the index's
    own. Whoever has it open keeps what it opened. Raises IndexBuildError, also for an id that the index has;
    IndexStorageError; EmbedderMismatch.
    """
    directory, manifest = opened(path)
    if manifest.imported is not None:
        raise IndexBuildError(
            f"`path` must be an index of pictures to be extended by some, {directory} is of vectors"
        )
    if manifest.metric == "cosine" or embedder is not None:
        check_embedder(embedder, manifest)
    plan = plan_of(manifest, embedder, ids, batch_size, on_error, image_column)
    given = caption_column(images, captions)
    source = open_source(images, given, plan.background, image_column=image_column, least=plan.least)
    table = read_captions(None if given else captions, images).settle(source, plan.ids)
    if source.length is not None:
        plan.check_totals(table, source.length)

    def fill(state: State, partial: Path) -> None:
        before = sum(log.num_rows for log in logs(directory / manifest.folder))
        if state.shards == 0:
            state = _seeded(state, partial, directory / manifest.folder, manifest, before)
        _add(source, table, plan, state, partial, before, manifest, progress)

    change(directory, manifest, {"extends": True, **plan.identity(source, table)}, resume, fill)


def _add(
    source: ImageSource,
    table: Captions,
    plan: BuildPlan,
    state: State,
    partial: Path,
    before: int,
    manifest: Manifest,
    progress: bool,
) -> None:
    """Shards of new pictures behind what was `before`, then the finished files."""
    journal = Journal(partial, state, plan.dtype, plan.fold_rule(state.image_size))
    known = {name for log in _first_log(partial) for name in log["id"].to_pylist()}
    own = dataclasses.replace(state, position=state.position - before)
    with progress_bar(source.length, own.position, progress) as bar:
        stream = resume_stream(source, own)
        reader = ShardReader(stream, table, plan, state.image_size, bar, state.all_digest)
        while shard := reader.read():
            for entry in shard.entries:
                if entry.id in known:
                    raise IndexBuildError(
                        f"`images`: the index has a picture with the id {entry.id!r} already"
                    )
            entries = [dataclasses.replace(one, position=one.position + before) for one in shard.entries]
            journal.commit(shard.rows, shard.guard, entries, (shard.last_digest, shard.all_digest))
    plan.check_totals(table, journal.state.position - before)
    passed_over = passed_over_of(manifest)
    passed_over.join(source.passed_over, "")
    number = manifest.generation + 1
    finish_index(journal, plan, passed_over, None, manifest, removed_from(manifest), number)


def _first_log(partial: Path) -> Iterator[Any]:
    from amg.index.store import import_parquet

    yield import_parquet().read_table(log_path(partial, 0), columns=["id"])


def _seeded(state: State, partial: Path, data: Path, manifest: Manifest, before: int) -> State:
    """The files of a build that has come as far as the index: its own, copied."""
    guarded = manifest.count * SKETCH_BYTES
    files = [(manifest.rows_file, manifest.rows_file, 0, None), (GUARD, GUARD, 0, guarded)]
    if manifest.members:
        files += [(GUARD, MEMBER_SKETCHES, guarded, None), (MEMBER_ROWS, MEMBER_ROWS, 0, None)]
        files.append((manifest.members_file, manifest.members_file, 0, None))
    log_path(partial, 0).parent.mkdir(exist_ok=True)
    for name, target, start, size in files:
        _copy(data / name, partial / target, start, size)
    _copy(data / PICTURES, log_path(partial, 0), 0, None)
    return dataclasses.replace(
        state,
        position=before,
        kept=manifest.count,
        shards=1,
        dimension=manifest.dimension,
        image_size=manifest.image_size,
        members=manifest.members,
    )


def _copy(source: Path, target: Path, start: int, size: int | None) -> None:
    left = source.stat().st_size - start if size is None else size
    with open(source, "rb") as read, open(target, "wb") as write:
        read.seek(start)
        while left > 0 and (block := read.read(min(COPIED, left))):
            write.write(block)
            left -= len(block)
        write.flush()
        os.fsync(write.fileno())

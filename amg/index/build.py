"""Images in, an index on disk out: streaming, folding duplicates, resumable, all or nothing."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from amg.extras import needed
from amg.index.captions import Captions, caption_column, read_captions
from amg.index.claim import claimed, empty, publish, remove
from amg.index.decode import UnreadableImage
from amg.index.errors import IndexBuildError, IndexStorageError
from amg.index.finish import finish_index
from amg.index.journal import STATE, Journal, State, check_identity, read_state
from amg.index.plan import BuildPlan
from amg.index.shards import ShardReader, chain_digest, content_digest
from amg.index.sources import ImageSource, TrainingImage, open_source
from amg.index.store import partial_path

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def build_index(
    images: Any, captions: Any, path: Path, plan: BuildPlan, *, progress: bool, resume: bool
) -> None:
    """Build an index at `path`: in `path`.partial first, renamed when whole.

    A killed build leaves only path.partial, and the same call goes on from its last shard. A failed one
    leaves path.partial only where going on makes sense (disk full after some shards); the message says so.
    A path.partial that is not ours is refused and left as it is (`amg.index.claim`).
    Raises IndexBuildError for the input, IndexStorageError for the disk.
    """
    require_new(path)
    source, table = opened(images, captions, plan)

    def fill(state: State, partial: Path) -> None:
        read_all(source, table, plan, state, partial, progress)

    write_whole(path, plan.identity(source, table), resume, fill)


def opened(images: Any, captions: Any, plan: BuildPlan) -> tuple[ImageSource, Captions]:
    """What a build reads, as it is given to one. Raises IndexBuildError."""
    source = open_source(
        images,
        caption_column(images, captions),
        plan.background,
        image_column=plan.image_column,
        least=plan.least,
    )
    table = read_captions(None if caption_column(images, captions) else captions, images)
    table = table.settle(source, plan.ids)
    if source.length is not None:
        plan.check_totals(table, source.length)
    return source, table


def require_place(path: Any) -> Path:
    """`path` as one. Raises IndexBuildError."""
    if not isinstance(path, (str, os.PathLike)) or os.fspath(path) in ("", b"") or "\0" in str(path):
        raise IndexBuildError(
            f"`path` must be a str or path that says where the index is to be written, got {path!r}"
        )
    return Path(path)


def require_new(path: Path) -> None:
    """Raises IndexBuildError where something lies at `path`."""
    if os.path.lexists(path):
        kind = "is a link to nothing" if not path.exists() else "exists already"
        raise IndexBuildError(f"`path` {kind}: {path}; remove it, or build elsewhere")


def write_whole(
    path: Path, identity: dict[str, Any], resume: bool, fill: Callable[[State, Path], None]
) -> None:
    """Files of an index in the directory `path`, which `fill(state, partial)` completes in a directory of
    ours, from where an earlier run of the same identity stopped."""
    partial = partial_path(path)
    with claimed(partial, lambda: _of_earlier_version(partial), IndexBuildError):
        state = read_state(partial) if resume else None
        if state is None:
            empty(partial)
            state = State(identity)
        check_identity(state, identity, partial)
        try:
            fill(state, partial)
        except BaseException as error:
            _after_failure(error, partial)
            raise
        publish(partial, path)


def _of_earlier_version(partial: Path) -> bool:
    """Whether a directory without a marker is what a killed build left before there were markers."""
    state = read_state(partial)
    return state is not None and isinstance(state.identity, dict)


def _after_failure(error: BaseException, partial: Path) -> None:
    """Keep a partial build that can go on; remove it where there is nothing to go on from."""
    state = read_state(partial)
    hopeless = isinstance(error, IndexBuildError) and not isinstance(error.__cause__, UnreadableImage)
    resumable = state is not None and state.shards > 0 and not hopeless
    if not resumable:
        remove(partial)
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        rest = "nothing was left behind"
        if resumable and state is not None:
            rest = f"free space and run the same build again to resume {partial} at image {state.position}"
        raise IndexStorageError(
            error.errno, f"disk full while building ({os.strerror(error.errno)}); {rest}"
        ) from error


def read_all(
    source: ImageSource, captions: Captions, plan: BuildPlan, state: State, partial: Path, progress: bool
) -> None:
    """Shards from where the state stands to the end, then the finished files."""
    journal = None
    if state.shards:
        _check_rows(state, plan, partial)
        journal = Journal(partial, state, plan.dtype, plan.fold_rule(state.image_size))
    with progress_bar(source.length, state.position, progress) as bar:
        reader = ShardReader(
            resume_stream(source, state), captions, plan, state.image_size, bar, state.all_digest
        )
        while shard := reader.read():
            if journal is None:
                state = dataclasses.replace(state, dimension=reader.dimension(), image_size=reader.image_size)
                journal = Journal(partial, state, plan.dtype, plan.fold_rule(state.image_size))
            digests = (shard.last_digest, shard.all_digest)
            journal.commit(shard.rows, shard.guard, shard.entries, digests)
    if journal is None:
        raise IndexBuildError("`images` is empty")
    if journal.state.kept == 0:
        raise IndexBuildError(f"`images`: none of the {journal.state.position} images could be read")
    plan.check_totals(captions, journal.state.position)
    finish_index(journal, plan, source.passed_over)


def _check_rows(state: State, plan: BuildPlan, partial: Path) -> None:
    """The rows of a resumed build must be as long as those to come. Raises IndexBuildError."""
    size = plan.size if plan.embedder is not None else plan.size or state.image_size
    length = plan.embedder.dimension if plan.embedder is not None else 3 * math.prod(size or (0,))
    if state.image_size != size or state.dimension != length:
        raise IndexBuildError(
            f"{partial / STATE} has rows of {state.dimension} from images of {state.image_size}, this build "
            f"makes rows of {length} from images of {size}: it has to start again"
        )


def resume_stream(source: ImageSource, state: State) -> Iterator[TrainingImage]:
    """Images from the state's position on, after checking that those before it are still the same.

    Where the source's identity tells of changes, the last of them is enough; else every one is loaded again.
    """
    if state.position == 0:
        return source.read(0)
    stream = source.read(state.position - 1 if source.identity_tells else 0)
    seen, digest, last = "", "", None
    for last in islice(stream, 1 if source.identity_tells else state.position):
        try:
            digest = content_digest(last.load().pixels)
        except UnreadableImage as error:
            digest = content_digest(str(error))
        seen = chain_digest(seen, digest)
    whole = last is not None and last.position == state.position - 1
    found, known = (digest, state.last_digest) if source.identity_tells else (seen, state.all_digest)
    if not whole or found != known:
        which = (
            f"image {state.position - 1}" if source.identity_tells else f"one of the first {state.position}"
        )
        raise IndexBuildError(
            f"`images` changed since the build was interrupted ({which} differs): "
            "pass resume=False (--no-resume) to start again"
        )
    return stream


@contextmanager
def progress_bar(total: int | None, position: int, shown: bool, unit: str = "image") -> Iterator[Any]:
    if not shown:
        yield None
        return
    tqdm = needed("tqdm", "progress=True").tqdm
    with tqdm(total=total, initial=position, unit=unit, desc="index", dynamic_ncols=True) as bar:
        yield bar

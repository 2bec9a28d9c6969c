"""Index.from_embeddings: vectors in, an index out, without the pictures they are of."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from amg.embed.network import is_sha256
from amg.index.build import progress_bar, require_new, require_place, write_whole
from amg.index.encode import embedder_record
from amg.index.errors import IndexBuildError
from amg.index.finish import finish_index
from amg.index.imported.names import Distinct
from amg.index.imported.vectors import BLOCK, Block, Columns, VectorSource, open_vectors
from amg.index.journal import Journal, LogEntry, State
from amg.index.notes import Tally, pack_notes
from amg.index.plan import BuildPlan, make_plan
from amg.index.shards import chain_digest
from amg.index.store import DTYPES, EmbedderRecord, Imported

if TYPE_CHECKING:
    from amg.index.index import Index

SMALLEST_NORM = 1e-12


def from_embeddings(
    vectors: Any,
    captions: Sequence[str | None] | str | None = None,
    embedder: Any = None,
    path: str | os.PathLike = "",
    *,
    ids: Sequence[str] | None = None,
    dtype: str = "float16",
    near_duplicate: float | bool = True,
    vector_column: str | None = None,
    id_column: str | None = None,
    progress: bool = True,
    resume: bool = True,
) -> Index:
    """Build an index at `path` of vectors that were embedded elsewhere, and open it; streams, resumes.

    vectors: floating [N, D], an array or tensor; or files, a folder of them or a list: .npy arrays, with
    clip-retrieval's `metadata_N.parquet` or a table of the same name beside them, or Parquet and Arrow with
    a column of lists of floats. Rows are unit vectors; a vector that is zero, not finite, missing or of
    another length is skipped by reason, as an unreadable picture is. embedder: what made them: an embedder,
    its name, or a dict of name, sha256 and preprocessing; what is not given is held to nothing, until
    `Index.verify_embeddings` fills it in. captions: as many as an array's vectors, or for files the name of
    a column (by default a usual one); ids: distinct, as many as an array's vectors (by default the
    position). vector_column, id_column: of files, by default a usual one; ids of a column that was named
    must be distinct, else rows without an id, or with one that was there before, are called by file and
    row, which is noted.
    dtype, near_duplicate, progress, resume: as in `Index.build`.
    No picture is seen: the index has no guard, and `manifest.verified` is False, which is warned of wherever
    it is used, until `Index.verify_embeddings` has compared some. Raises IndexBuildError, IndexStorageError.
    """
    from amg.index.index import Index

    directory = require_place(path)
    require_new(directory)
    plan = _plan(embedder, ids, dtype, near_duplicate)
    source = open_vectors(vectors, plan.ids, captions, Columns(vector_column, id_column))

    def fill(state: State, partial: Path) -> None:
        _run(source, plan, state, partial, progress)

    write_whole(directory, _identity(source, plan), resume, fill)
    return Index.open(directory)


def _plan(embedder: Any, ids: Any, dtype: str, near_duplicate: float | bool) -> BuildPlan:
    checked = make_plan(None, ids, None, dtype, 1, False, "skip", "white")
    folding = make_plan(_Named, None, None, dtype, 1, near_duplicate, "skip", "white").near_duplicate
    return dataclasses.replace(
        checked, record=record_of(embedder), metric="cosine", dtype=dtype, near_duplicate=folding
    )


class _Named:
    """Stands for an embedder where only a cosine index's arguments are checked."""

    name, dimension, sha = "", 1, ""


def record_of(embedder: Any) -> EmbedderRecord:
    """What made the vectors, by an embedder, or by a name alone or with sha256 and preprocessing. Raises
    IndexBuildError."""
    if isinstance(embedder, EmbedderRecord):
        return embedder
    if isinstance(embedder, str) and embedder.strip():
        return EmbedderRecord(embedder, "", "")
    if isinstance(embedder, Mapping):
        given = {"sha256": "", "preprocessing": "", **embedder}
        names = {field.name for field in dataclasses.fields(EmbedderRecord)}
        if set(given) == names and all(isinstance(value, str) for value in given.values()) and given["name"]:
            record = EmbedderRecord(**{**given, "sha256": given["sha256"].lower()})
            if record.sha256 and not is_sha256(record.sha256):
                raise IndexBuildError(
                    f"`embedder` must have a sha256 of 64 hex digits, got {record.sha256!r}"
                )
            return record
    elif callable(embedder):
        return embedder_record(embedder)
    raise IndexBuildError(
        "`embedder` must be what made the vectors: an embedder, its name, or a dict of name, sha256 and "
        f"preprocessing, got {embedder!r:.100}"
    )


def _identity(source: VectorSource, plan: BuildPlan) -> dict[str, Any]:
    """What must be equal for an import to be resumed; that the vectors are is seen when they are read."""
    ids = None if plan.ids is None else blake2b("\0".join(plan.ids).encode()).hexdigest()
    return {
        "vectors": [source.length, source.dimension],
        "ids": ids,
        "embedder": dataclasses.asdict(plan.record) if plan.record is not None else None,
        "dtype": plan.dtype,
        "near_duplicate": plan.near_duplicate,
        "shard": BLOCK,
    }


def _run(source: VectorSource, plan: BuildPlan, state: State, partial: Path, progress: bool) -> None:
    state = dataclasses.replace(state, dimension=source.dimension)
    journal = Journal(partial, state, plan.dtype, plan.fold_rule(None), guard=0)
    blocks = _resumed(_distinct(source), state)
    with progress_bar(source.length, state.position, progress, "vector") as bar:
        for block, digest in blocks:
            rows, entries = _usable(block, plan.dtype)
            journal.commit(rows, torch.empty(len(rows), 0, dtype=torch.float16), entries, digest)
            if bar is not None:
                bar.update(len(entries))
    if journal.state.kept == 0:
        raise IndexBuildError(f"`vectors`: none of {source.length} has a direction")
    finish_index(journal, plan, Tally(), Imported())


def _distinct(source: VectorSource) -> Iterator[Block]:
    distinct = Distinct(source.asked_for)
    for block in source.read():
        yield dataclasses.replace(block, named=distinct(block.named))


def _resumed(blocks: Iterator[Block], state: State) -> Iterator[tuple[Block, tuple[str, str]]]:
    """The blocks from the state's position on, with the digests of each and of all so far; those before are
    read again and have to be the same. Raises IndexBuildError."""
    seen = ""
    for block in islice(blocks, state.shards):
        seen = chain_digest(seen, _digest(block))
    if seen != state.all_digest:
        raise IndexBuildError(
            f"`vectors` changed since the import was interrupted (one of the first {state.position} "
            "differs): pass resume=False (--no-resume) to start again"
        )
    for block in blocks:
        digest = _digest(block)
        seen = chain_digest(seen, digest)
        yield block, (digest, seen)


def _digest(block: Block) -> str:
    content = blake2b(block.vectors.tobytes(), digest_size=16)
    content.update(repr((block.named.ids, block.named.captions)).encode(errors="surrogatepass"))
    return content.hexdigest()


def _usable(block: Block, dtype: str) -> tuple[torch.Tensor, list[LogEntry]]:
    """Unit rows of the vectors that have a direction, and a log entry for every one."""
    vectors = torch.from_numpy(np.array(block.vectors, dtype=np.float64))
    norms = torch.linalg.vector_norm(vectors, dim=1)
    finite, some = torch.isfinite(norms), norms > SMALLEST_NORM
    entries, named = [], block.named
    for at, (usable, number) in enumerate(zip((finite & some).tolist(), finite.tolist(), strict=True)):
        reason = block.reasons.get(at)
        if reason is None and not usable:
            reason = "a vector of zeros" if number else "a vector that is not finite"
        place = (block.position + at, named.ids[at], named.sources[at], named.captions[at])
        entries.append(LogEntry(*place, -1, reason, pack_notes(named.notes.get(at, ()))))
    kept = torch.tensor([entry.reason is None for entry in entries])
    return (vectors[kept] / norms[kept, None]).to(DTYPES[dtype]), entries

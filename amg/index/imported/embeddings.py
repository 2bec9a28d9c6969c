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

from amg.index.build import progress_bar, require_new, require_place, write_whole
from amg.index.encode import check_embedder, embedder_record, resize_to_embed, unit_vectors
from amg.index.errors import IndexBuildError
from amg.index.finish import finish_index
from amg.index.imported.vectors import BLOCK, Block, Columns, VectorSource, open_vectors
from amg.index.journal import Journal, LogEntry, State
from amg.index.notes import Tally
from amg.index.plan import BuildPlan, make_plan
from amg.index.shards import chain_digest, to_float
from amg.index.sources import open_source
from amg.index.store import (
    DTYPES,
    EmbedderRecord,
    Imported,
    map_rows,
    read_manifest,
    read_meta,
    write_manifest,
)

if TYPE_CHECKING:
    from amg.index.index import Index

LEAST_COSINE = 0.98  # of a picture embedded again with its row: other decoders and resizers are a little off
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
    its name, or a dict of name, sha256 and preprocessing; by a name alone it is taken at its word. captions:
    as many as vectors, or for files the name of a column (by default a usual one); ids: distinct, as many as
    an array's vectors (by default the position, or file and row); vector_column, id_column: of files.
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
            return EmbedderRecord(**given)
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
    blocks = _resumed(source, state)
    with progress_bar(source.length, state.position, progress, "vector") as bar:
        for block, digest in blocks:
            rows, entries = _usable(block, plan.dtype)
            journal.commit(rows, torch.empty(len(rows), 0, dtype=torch.float16), entries, digest)
            if bar is not None:
                bar.update(len(entries))
    if journal.state.kept == 0:
        raise IndexBuildError(f"`vectors`: none of {source.length} has a direction")
    finish_index(journal, plan, Tally(), Imported())


def _resumed(source: VectorSource, state: State) -> Iterator[tuple[Block, tuple[str, str]]]:
    """The blocks from the state's position on, with the digests of each and of all so far; those before are
    read again and have to be the same. Raises IndexBuildError."""
    blocks, seen = source.read(), ""
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
    content.update(repr((block.ids, block.captions)).encode(errors="surrogatepass"))
    return content.hexdigest()


def _usable(block: Block, dtype: str) -> tuple[torch.Tensor, list[LogEntry]]:
    """Unit rows of the vectors that have a direction, and a log entry for every one."""
    vectors = torch.from_numpy(np.array(block.vectors, dtype=np.float64))
    norms = torch.linalg.vector_norm(vectors, dim=1)
    finite, some = torch.isfinite(norms), norms > SMALLEST_NORM
    entries = []
    for at, (usable, number) in enumerate(zip((finite & some).tolist(), finite.tolist(), strict=True)):
        reason = block.reasons.get(at)
        if reason is None and not usable:
            reason = "a vector of zeros" if number else "a vector that is not finite"
        place = (block.position + at, block.ids[at], block.sources[at], block.captions[at])
        entries.append(LogEntry(*place, -1, reason))
    kept = torch.tensor([entry.reason is None for entry in entries])
    return (vectors[kept] / norms[kept, None]).to(DTYPES[dtype]), entries


def verify(path: Path, embedder: Any, pictures: Any, least: float) -> Imported:
    """See `Index.verify_embeddings`: what is recorded in the manifest. Raises IndexBuildError naming the
    picture that is least alike to its row; EmbedderMismatch."""
    manifest = read_manifest(path)
    if manifest.imported is None:
        raise IndexBuildError(f"`path` must be an index of imported vectors, {path} was built of pictures")
    check_embedder(embedder, manifest.embedder, manifest.dimension)
    data = path / manifest.folder
    ids, rows = read_meta(data, manifest)["id"], map_rows(data, manifest)
    known = {Path(name).stem: row for row, name in enumerate(ids)} | {
        name: row for row, name in enumerate(ids)
    }
    compared, worst = 0, (2.0, "")
    for name, picture in _named(pictures):
        row = known.get(name, known.get(Path(name).stem))
        if row is None:
            continue
        with torch.no_grad():
            vector = unit_vectors(resize_to_embed(to_float(picture)[None], manifest.image_size), embedder)[0]
        worst = min(worst, (float(vector.double() @ rows[row].double()), name))
        compared += 1
    if compared == 0:
        raise IndexBuildError(f"`pictures` must be of rows of {path}: none has the id of one, or its name")
    if worst[0] < least:
        raise IndexBuildError(
            f"`pictures`: {worst[1]} is at cosine {worst[0]:.4f} from its row, at least {least:g} was asked "
            f"for: {path} was not made by this embedder, or of other pictures"
        )
    found = Imported(compared, min(worst[0], 1.0))
    for place in dict.fromkeys((data, path)):
        write_manifest(place, dataclasses.replace(manifest, imported=found))
    return found


def _named(pictures: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and pixels [3, H, W]: of a dict of pictures by id, or of what `Index.build` takes."""
    names = [str(name) for name in pictures] if isinstance(pictures, Mapping) else None
    source = open_source([*pictures.values()] if isinstance(pictures, Mapping) else pictures)
    for at, image in enumerate(source.read(0)):
        yield (image.id if names is None else names[at]), image.load().pixels

"""The last step of a build: meta.parquet from the logs, int8 codes, the manifest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from amg.index.codes import write_codes
from amg.index.coverage import REMOVED, SkippedFile, make_coverage
from amg.index.decode import DEPTH_RULE
from amg.index.encode import MOST_SQUARES
from amg.index.guard import SKETCH
from amg.index.journal import Journal, read_logs
from amg.index.notes import Tally, unpack_notes
from amg.index.plan import BuildPlan
from amg.index.store import (
    CODES,
    FORMAT_VERSION,
    GUARD,
    META,
    PICTURES,
    ROWS_FILE,
    Imported,
    Manifest,
    Skipped,
    file_record,
    folder_of,
    import_parquet,
    write_manifest,
)

SKIPPED_KEPT = 100  # names in the manifest


@dataclass(frozen=True)
class Folding:
    """Per row [count]: images folded in, its first, the one that gives the caption, that caption's total."""

    counts: np.ndarray
    first_image: np.ndarray
    caption_image: np.ndarray
    caption_counts: np.ndarray


def finish_index(
    journal: Journal,
    plan: BuildPlan,
    passed_over: Tally,
    imported: Imported | None = None,
    after: Manifest | None = None,
    removed: int = 0,
    generation: int = 0,
) -> None:
    """Complete the partial directory: afterwards it needs only its final name. after: what the index was
    before it was changed; removed: pictures taken out that the model may still know."""
    partial, state = journal.partial, journal.state
    folding = fold_captions(partial, state.shards, state.kept)
    _write_meta(partial, state.shards, folding)
    names = [ROWS_FILE[plan.dtype], META]
    names += write_codes(partial, journal.rows()) if plan.metric == "cosine" else []
    names += [GUARD] if journal.guard_length else []
    names.append(_write_pictures(partial, state.shards))
    names += journal.members.finish(partial)
    notes, skipped = _tally_notes(partial, state.shards), SkippedFile()
    first: list[Skipped] = []
    for entry in _skipped(partial, state.shards):
        skipped.add(entry.position, entry.id, entry.reason)
        first += [entry] if len(first) < SKIPPED_KEPT else []
    skipped.write(partial)
    images = state.position - sum(skipped.counts.values())
    if removed:
        skipped.counts[REMOVED] = removed
    assert state.dimension is not None
    manifest = Manifest(
        metric=plan.metric,
        dimension=state.dimension,
        count=state.kept,
        images=images,
        dtype=plan.dtype,
        image_size=state.image_size,
        embedder=plan.record,
        preprocessing=_preprocessing(plan, imported, after),
        near_duplicate=plan.near_duplicate,
        skipped=tuple(first),
        files={name: file_record(partial / name) for name in sorted(names)},
        guard=SKETCH if journal.guard_length else None,
        background=plan.background,
        passed_over=passed_over.counts,
        notes=notes.counts,
        examples={**passed_over.examples, **notes.examples},
        coverage=make_coverage(state.kept, images - state.kept, skipped.counts),
        imported=imported,
        version=FORMAT_VERSION if CODES in names else 2 if generation else 1,
        generation=generation,
        folder=folder_of(generation),
    )
    write_manifest(partial, manifest)
    journal.clear()


def _preprocessing(plan: BuildPlan, imported: Imported | None, after: Manifest | None) -> str:
    if after is not None:
        return after.preprocessing
    return _describe(plan) if imported is None else f"imported vectors, unit {plan.dtype}"


def _describe(plan: BuildPlan) -> str:
    steps = ["RGB", f"transparent over {plan.background}", DEPTH_RULE, "first frame"]
    if plan.size is not None:
        steps.append(f"JPEG at the smallest of its sizes of {plan.least} or more")
        steps.append(f"bilinear antialiased to {plan.size[0]}x{plan.size[1]}")
    if plan.record is None:
        steps.append("uint8, CHW")
    else:
        steps += [
            "[0, 1]",
            f"squeezed to {MOST_SQUARES}:1 where longer",
            f"{plan.record.name}: {plan.record.preprocessing or 'own'}",
            f"unit {plan.dtype}",
        ]
    return ", ".join(steps)


def _skipped(partial: Path, shards: int) -> Iterator[Skipped]:
    for log in read_logs(partial, shards):
        for entry in log.filter(log["reason"].is_valid()).to_pylist():
            yield Skipped(entry["position"], entry["id"], entry["reason"])


def _tally_notes(partial: Path, shards: int) -> Tally:
    tally = Tally()
    for log in read_logs(partial, shards):
        for entry in log.filter(log["notes"].is_valid()).select(["source", "notes"]).to_pylist():
            for note in unpack_notes(entry["notes"]):
                tally.add(note.what, note.where or entry["source"], note.amount)
    return tally


def caption_hash(caption: str | None) -> int:
    """A non-zero 64-bit hash of a caption, 0 for none."""
    if caption is None:
        return 0
    return int.from_bytes(blake2b(caption.encode(), digest_size=8).digest(), "little") or 1


def fold_captions(partial: Path, shards: int, count: int) -> Folding:
    """Which caption each row keeps: the most frequent of its images' captions, the earliest among equals."""
    row_parts, hash_parts = [], []
    for log in read_logs(partial, shards):
        row_parts.append(log["row"].to_numpy())
        hash_parts.append(
            np.array([caption_hash(text) for text in log["caption"].to_pylist()], dtype=np.uint64)
        )
    rows, hashes = np.concatenate(row_parts), np.concatenate(hash_parts)
    images = np.flatnonzero(rows >= 0)
    rows, hashes = rows[images], hashes[images]
    counts = np.bincount(rows, minlength=count)
    first_image = images[np.unique(rows, return_index=True)[1]]
    caption_at = _most_frequent(rows, hashes)
    known, inverse, occurrences = np.unique(hashes, return_inverse=True, return_counts=True)
    occurrences = np.where(known == 0, 0, occurrences)
    return Folding(counts, first_image, images[caption_at], occurrences[inverse[caption_at]])


def _most_frequent(rows: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Per row, the first position of its most frequent non-null hash (null only where there is no other)."""
    order = np.lexsort((hashes, rows))  # stable: positions ascend within a (row, hash) run
    starts = np.flatnonzero(
        np.r_[True, (rows[order][1:] != rows[order][:-1]) | (hashes[order][1:] != hashes[order][:-1])]
    )
    lengths = np.diff(np.r_[starts, len(order)])
    first = order[starts]
    best = np.lexsort((first, -lengths, hashes[first] == 0, rows[first]))
    leader = np.r_[True, rows[first][best][1:] != rows[first][best][:-1]]
    return first[best][leader]


def _write_meta(partial: Path, shards: int, folding: Folding) -> None:
    """meta.parquet, one row group for each shard that has rows; only borrowed captions are held in memory."""
    import pyarrow

    borrowed = _borrowed_captions(partial, shards, folding)
    kinds = {
        "id": "string",
        "caption": "string",
        "count": "int64",
        "source": "string",
        "caption_count": "int64",
    }
    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in kinds.items()])
    with open(partial / META, "wb") as file:
        with import_parquet().ParquetWriter(file, schema) as writer:
            row = 0
            for kept in _kept_entries(partial, shards, folding):
                rows = range(row, row + kept.num_rows)
                captions = kept["caption"].to_pylist()
                columns: dict[str, Any] = {
                    "id": kept["id"].to_pylist(),
                    "caption": [borrowed.get(r, text) for r, text in zip(rows, captions, strict=True)],
                    "count": folding.counts[row : rows.stop],
                    "source": kept["source"].to_pylist(),
                    "caption_count": folding.caption_counts[row : rows.stop],
                }
                writer.write_table(pyarrow.table(columns, schema=schema))
                row = rows.stop
        file.flush()
        os.fsync(file.fileno())


def _write_pictures(partial: Path, shards: int) -> str:
    """pictures.parquet, the logs one after the other."""
    writer = None
    with open(partial / PICTURES, "wb") as file:
        for log in read_logs(partial, shards):
            writer = writer or import_parquet().ParquetWriter(file, log.schema, write_page_checksum=True)
            writer.write_table(log)
        assert writer is not None
        writer.close()
        file.flush()
        os.fsync(file.fileno())
    return PICTURES


def _kept_entries(partial: Path, shards: int, folding: Folding) -> Iterator[Any]:
    """Log entries of the images that became rows, a table for each shard that has any."""
    position = 0
    for log in read_logs(partial, shards):
        low, high = np.searchsorted(folding.first_image, [position, position + log.num_rows])
        if low < high:
            yield log.take(folding.first_image[low:high] - position)
        position += log.num_rows


def _borrowed_captions(partial: Path, shards: int, folding: Folding) -> dict[int, str | None]:
    """Captions of rows whose most frequent caption is not that of their first image."""
    rows = np.flatnonzero(folding.caption_image != folding.first_image)
    rows = rows[np.argsort(folding.caption_image[rows], kind="stable")]
    images, position = folding.caption_image[rows], 0
    borrowed: dict[int, str | None] = {}
    for log in read_logs(partial, shards) if len(rows) else ():
        low, high = np.searchsorted(images, [position, position + log.num_rows])
        texts = log["caption"].take(images[low:high] - position).to_pylist()
        borrowed.update(zip(rows[low:high].tolist(), texts, strict=True))
        position += log.num_rows
    return borrowed

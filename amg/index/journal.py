"""A build's progress on disk: kept rows appended shard by shard, one log a shard, one small state file.

A shard counts once state.json names it; whatever a killed build wrote beyond that is cut off on resume.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from amg.index.errors import IndexBuildError
from amg.index.fields import read_fields
from amg.index.fold import FoldRule, HashTable, fold_shard, row_hashes, same_content
from amg.index.guard import SKETCH_DTYPE, SKETCH_LENGTH
from amg.index.members import MemberLog, differing
from amg.index.sketches import Sketcher
from amg.index.store import (
    DTYPES,
    GUARD,
    ROWS_FILE,
    TEMPORARY,
    append,
    import_parquet,
    map_file,
    truncate,
    write_atomically,
)

STATE, SHARDS = "state.json", "shards"
HASH_BLOCK_BYTES = 1 << 26


@dataclass(frozen=True)
class State:
    """Where a build stands: the next image, rows kept, shards written, digest of the last image, (H, W),
    folded images kept beside their rows, and digest of all images."""

    identity: dict[str, Any]
    position: int = 0
    kept: int = 0
    shards: int = 0
    last_digest: str = ""
    image_size: tuple[int, int] | None = None
    dimension: int | None = None
    members: int = 0
    all_digest: str = ""


@dataclass(frozen=True)
class LogEntry:
    """One training image: the row it became or folded into, or −1 with the reason it was skipped."""

    position: int
    id: str
    source: str
    caption: str | None
    row: int
    reason: str | None
    notes: str | None = None  # notes.pack_notes()
    vector: int | None = None  # content hashes, by which a picture is found again: of its row or of a member
    sketch: int | None = None


def read_state(partial: Path) -> State | None:
    """The state a killed build left, None if it left none that can be used."""
    try:
        state = read_fields(State, json.loads((partial / STATE).read_bytes()))
    except (OSError, ValueError, RecursionError):
        return None
    size = state.image_size
    whole = (
        state.shards and state.dimension and (size is None or min(size)) and state.members <= state.position
    )
    return state if whole and _logged(partial, state.shards) == (state.position, state.kept) else None


def _logged(partial: Path, shards: int) -> tuple[int, int] | None:
    """Images and rows in the logs of so many shards, None where one is missing or damaged."""
    parquet, images, rows = import_parquet(), 0, 0
    for shard in range(shards):
        try:
            log = parquet.read_metadata(log_path(partial, shard))
            at = log.schema.names.index("row")
            last = [log.row_group(group).column(at).statistics.max for group in range(log.num_row_groups)]
            images, rows = images + log.num_rows, max(rows, *(row + 1 for row in last))
        except Exception:  # pyarrow raises many types on damaged files
            return None
    return images, rows


def check_identity(state: State, identity: dict[str, Any], partial: Path) -> None:
    """A resumed build must be the same build. Raises IndexBuildError naming what differs."""
    theirs = state.identity
    different = sorted(key for key in theirs.keys() | identity.keys() if theirs.get(key) != identity.get(key))
    if different:
        raise IndexBuildError(
            f"{partial} holds an unfinished build with a different {', '.join(different)}: "
            "resume it with the same arguments, or pass resume=False (--no-resume) to discard it"
        )


def read_logs(partial: Path, shards: int) -> Iterator[Any]:
    """The log table of each shard, in order."""
    parquet = import_parquet()
    for shard in range(shards):
        path = log_path(partial, shard)
        try:
            log = parquet.read_table(path, page_checksum_verification=True)
        except Exception as error:  # pyarrow raises many types on damaged files
            raise IndexBuildError(f"{path} is damaged ({error}): the build has to start again") from error
        yield log


def _logged_hashes(partial: Path, state: State) -> tuple[np.ndarray, np.ndarray]:
    """Content hashes [kept] of the rows' vectors and sketches, as logged with the first image of each."""
    vectors, sketches = np.zeros((2, state.kept), dtype=np.uint64)
    kept = 0
    for log in read_logs(partial, state.shards):
        if not {"vector", "sketch"} <= {*log.column_names}:
            raise IndexBuildError(
                f"{partial} was begun by an earlier version: pass resume=False to discard it"
            )
        number = log["row"].to_numpy()
        new = np.flatnonzero(number >= kept)
        rows, first = np.unique(number[new], return_index=True)
        for name, hashes in (("vector", vectors), ("sketch", sketches)):
            hashes[rows] = log[name].fill_null(0).to_numpy()[new[first]]
        kept += len(rows)
    return vectors, sketches


def _require_logged(path: Path, found: np.ndarray, expected: np.ndarray, start: int) -> None:
    wrong = np.flatnonzero(found != expected)
    if len(wrong):
        raise IndexBuildError(
            f"{path} was changed since the build was stopped, at row {start + int(wrong[0])}: pass "
            "resume=False (--no-resume) to discard the build"
        )


def log_path(partial: Path, shard: int) -> Path:
    return partial / SHARDS / f"{shard:07d}.parquet"


class Journal:
    """The rows kept so far and the way to add a shard to them; one writer. guard: length of the pictures'
    sketches, 0 where there are no pictures."""

    def __init__(self, partial: Path, state: State, dtype: str, rule: FoldRule, guard: int = SKETCH_LENGTH):
        assert state.dimension is not None
        self.partial, self.state, self.rule = partial, state, rule
        self.dtype, self.dimension = DTYPES[dtype], state.dimension
        self.rows_path, self.sketcher = partial / ROWS_FILE[dtype], Sketcher(rule.image_size)
        self.guard_path, self.guard_length = partial / GUARD, guard
        self.members = MemberLog(partial, dtype, state.dimension, state.members, guard)
        self.table = HashTable()
        (partial / SHARDS).mkdir(exist_ok=True)
        self._cut_back()

    def _cut_back(self) -> None:
        """Drop what lies beyond the state, and hash and sketch the rows that stay. IndexBuildError where
        they, or their guard sketches, are not those that were logged."""
        row_bytes = self.dimension * torch.empty((), dtype=self.dtype).element_size()
        truncate(self.rows_path, self.state.kept * row_bytes)
        truncate(self.guard_path, self.state.kept * self.guard_length * SKETCH_DTYPE.itemsize)
        rows, step = self.rows(), max(1, HASH_BLOCK_BYTES // row_bytes)
        logged = _logged_hashes(self.partial, self.state)
        for start in range(0, self.state.kept, step):
            block, shapes = rows[start : start + step], self.guard()[start : start + step]
            hashes = row_hashes(block)
            for path, found, expected in (
                (self.rows_path, hashes, logged[0]),
                (self.guard_path, row_hashes(shapes), logged[1]),
            ):
                _require_logged(path, found, expected[start : start + step], start)
            self.table.add(hashes, start)
            self._sketch(block)

    def _sketch(self, rows: torch.Tensor) -> None:
        if self.rule.threshold is not None:
            self.sketcher.keep(self.sketcher.sketch(rows).codes)

    def rows(self) -> torch.Tensor:
        """Rows kept so far [kept, D], memory-mapped."""
        if self.state.kept == 0:
            return torch.empty(0, self.dimension, dtype=self.dtype)
        return map_file(self.rows_path, self.dtype, self.state.kept, self.dimension)

    def guard(self) -> torch.Tensor:
        """The guard's sketches of the rows kept so far [kept, guard], memory-mapped."""
        if self.state.kept * self.guard_length == 0:
            return torch.empty(self.state.kept, self.guard_length, dtype=SKETCH_DTYPE)
        return map_file(self.guard_path, SKETCH_DTYPE, self.state.kept, self.guard_length)

    def commit(
        self, rows: torch.Tensor, guard: torch.Tensor, entries: list[LogEntry], digests: tuple[str, str]
    ) -> None:
        """Fold a shard in and flush it: rows [n, D] and guard sketches [n, guard] of the n of its entries
        whose reason is None; digests: of the last image and of all so far."""
        hashes, kept = row_hashes(rows), self.rows()
        duplicate_of = same_content(hashes, rows, self.table, kept)
        assigned, keep = fold_shard(rows, duplicate_of, kept, self.sketcher, self.rule)
        append(self.rows_path, rows[keep])
        append(self.guard_path, guard[keep])
        self._sketch(rows[keep])
        self._add_members(rows, guard, assigned, keep)
        contents = zip(assigned, hashes.tolist(), row_hashes(guard).tolist(), strict=True)
        numbered = [entry if entry.reason else _placed(entry, *next(contents)) for entry in entries]
        _write_log(log_path(self.partial, self.state.shards), numbered)
        self.table.add(hashes[keep], self.state.kept)
        self._advance(entries[-1].position + 1, self.state.kept + len(keep), digests)

    def _add_members(
        self, rows: torch.Tensor, guard: torch.Tensor, assigned: list[int], keep: list[int]
    ) -> None:
        """Keep the folded images of a shard that are not their row's bit for bit."""
        kept, own = {*keep}, torch.tensor(assigned, dtype=torch.int64)
        folded = torch.tensor([at for at in range(len(rows)) if at not in kept], dtype=torch.int64)
        if not len(folded):
            return
        own_rows, own_guard = (
            _of_rows(old, new[keep], own[folded]) for old, new in ((self.rows(), rows), (self.guard(), guard))
        )
        other = folded[differing(rows[folded], guard[folded], own_rows, own_guard)]
        self.members.add(rows[other], guard[other], own[other].tolist())

    def _advance(self, position: int, kept: int, digests: tuple[str, str]) -> None:
        shards = self.state.shards + 1
        state = dataclasses.replace(
            self.state,
            position=position,
            kept=kept,
            shards=shards,
            last_digest=digests[0],
            all_digest=digests[1],
            members=self.members.count,
        )
        write_atomically(self.partial / STATE, json.dumps(dataclasses.asdict(state)))
        self.state = state

    def clear(self) -> None:
        """Remove everything that is not part of the finished index; the state first."""
        (self.partial / STATE).unlink(missing_ok=True)
        for temporary in self.partial.glob(TEMPORARY + "*"):
            temporary.unlink()
        self.members.clear()
        if not self.guard_length:
            self.guard_path.unlink()
        shutil.rmtree(self.partial / SHARDS)


def _placed(entry: LogEntry, row: int, vector: int, sketch: int) -> LogEntry:
    return dataclasses.replace(entry, row=row, vector=vector, sketch=sketch)


def _of_rows(old: torch.Tensor, new: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Lines `numbers` [n] of `old` [m, D] followed by `new`, without joining the two."""
    taken = torch.empty(len(numbers), new.shape[1], dtype=new.dtype)
    before = numbers < len(old)
    taken[before] = old[numbers[before]]
    taken[~before] = new[numbers[~before] - len(old)]
    return taken


def _write_log(path: Path, entries: list[LogEntry]) -> None:
    import pyarrow

    kinds = {"position": "int64", "id": "string", "source": "string", "caption": "string"}
    kinds |= {"row": "int64", "reason": "string", "notes": "string", "vector": "uint64", "sketch": "uint64"}
    columns = {
        name: pyarrow.array([getattr(entry, name) for entry in entries], getattr(pyarrow, kind)())
        for name, kind in kinds.items()
    }
    content = io.BytesIO()
    import_parquet().write_table(pyarrow.table(columns), content, write_page_checksum=True)
    with open(path, "wb") as file:
        file.write(content.getvalue())
        file.flush()
        os.fsync(file.fileno())

"""Whether an index is still, byte for byte, what its manifest says: what the final check may rest on."""

from __future__ import annotations

import functools
import os
import threading
import time
import weakref
from pathlib import Path

import torch

from amg.index.coverage import SKIPPED
from amg.index.errors import IndexCorrupt
from amg.index.store import (
    DTYPES,
    MANIFEST,
    META,
    PICTURES,
    Manifest,
    check_hashes,
    map_file,
    read_manifest,
    sha256_of,
)

NORM_TOLERANCE = 2e-3  # of unit rows stored in fp16
ROW_BLOCK_VALUES = 1 << 22
SAMPLED_ROWS = 1024  # looked at under trust="size"
CLOCK_TICK_NS = 20_000_000  # two writes that lie closer may leave a file the same times
READ_WHOLE = (META, PICTURES, SKIPPED)  # not through a map
REMEMBERED = 4096  # files whose content this process knows
TRUSTS = ("hashes", "size")

Stamp = tuple[int, int, int, int, int]  # device, inode, size, mtime_ns, ctime_ns: the identity of a file


class Seal:
    """Of the files behind one opened index, shared by its copies; threads may share it.

    The first `check` reads every file against its sha256, and rows of a cosine index for unit norms; later
    ones ask the file system whether a file was written to since (a few microseconds). A file that this
    process, or the one it was forked from, has read is not read again while its identity is the same, however
    often the index is opened. Memory-mapped rows change when their file does, so an index damaged or
    exchanged while open is refused, never searched.

    trust: "hashes", or "size": files are taken for what they were when the index was opened, by their sizes;
    some rows are looked at for unit norms. One that was written to since is read against its sha256.
    """

    def __init__(self, directory: Path, manifest: Manifest, trust: str = "hashes"):
        if trust not in TRUSTS:
            raise ValueError(f'`trust` must be "hashes" or "size", got {trust!r}')
        self.directory, self.manifest, self.trust = directory, manifest, trust
        self._paths = {name: str(directory / name) for name in (MANIFEST, *sorted(manifest.files))}
        self._mapped = tuple(name for name in manifest.files if name not in READ_WHOLE)
        self.opened = self._stamps()
        self._checked: dict[str, Stamp] | None = None
        self._renew_lock()
        _renew_after_fork(weakref.ref(self))

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raises IndexCorrupt, naming the file."""
        with self._lock:
            before = self._stamps()
            if before == self._checked:
                return
            for name, stamp in before.items():
                self._require_same_file(name, stamp)
            _let_the_clock_tick(before)
            check_hashes(self.directory, self.manifest, functools.partial(self._digest, before))
            self._require_unit_rows(before)
            if self._stamps() != before:
                raise IndexCorrupt(f"{self.directory} was written to while it was being checked")
            self._checked = before

    def require_whole(self, *names: str) -> None:
        """That the mapped files, and `names`, are those that were opened, as long as they were: reading a map
        beyond the end of its file ends the process. Raises IndexCorrupt, naming the file."""
        for name in (*self._mapped, *names):
            now, opened = _stamp(self._paths[name]), self.opened[name]
            self._require_same_file(name, now)
            if now[2] != opened[2]:
                raise IndexCorrupt(
                    f"{self._paths[name]} has {now[2]} bytes, {opened[2]} when the index was opened: "
                    "open the index again"
                )

    def _stamps(self) -> dict[str, Stamp]:
        return {name: _stamp(path) for name, path in self._paths.items()}

    def _require_same_file(self, name: str, now: Stamp) -> None:
        if now[:2] != self.opened[name][:2] and not (name == MANIFEST and self._succeeded()):
            raise IndexCorrupt(
                f"{self._paths[name]} was exchanged since the index was opened: open the index again"
            )

    def _succeeded(self) -> bool:
        """Whether the manifest is that of a later generation, which leaves the files of this one alone."""
        return read_manifest(self.directory).generation > self.manifest.generation

    def _digest(self, stamps: dict[str, Stamp], path: Path) -> str:
        stamp = stamps[path.name]
        if self.trust == "size" and stamp == self.opened[path.name]:
            return self.manifest.files[path.name].sha256
        return _digest_of(path, stamp)

    def _require_unit_rows(self, stamps: dict[str, Stamp]) -> None:
        manifest = self.manifest
        if manifest.metric != "cosine":
            return
        stamp = stamps[manifest.rows_file]
        sampled = self.trust == "size" and stamp == self.opened[manifest.rows_file]
        path = self.directory / manifest.rows_file
        _require_unit_rows(path, stamp, manifest.dtype, manifest.count, manifest.dimension, sampled)


@functools.lru_cache(REMEMBERED)
def _digest_of(path: Path, stamp: Stamp) -> str:
    """The sha256 of the file of this identity; remembered, also by processes that are forked afterwards."""
    digest = sha256_of(path)
    if _stamp(path) != stamp:
        raise IndexCorrupt(f"{path} was written to while it was being checked")
    return digest


@functools.lru_cache(REMEMBERED)
def _require_unit_rows(
    path: Path, stamp: Stamp, dtype: str, count: int, dimension: int, sampled: bool
) -> None:
    """Every row a unit vector, or of evenly spread ones; remembered of the file of this identity."""
    rows = map_file(path, DTYPES[dtype], count, dimension)
    stride = max(1, count // SAMPLED_ROWS) if sampled else 1
    rows, start = rows[::stride], 0
    for block in rows.split(max(1, ROW_BLOCK_VALUES // dimension)):
        norms = torch.linalg.vector_norm(block, dim=1, dtype=torch.float64)
        wrong = ~((norms - 1).abs() <= NORM_TOLERANCE)  # a NaN is wrong too
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise IndexCorrupt(
                f"{path} must hold unit vectors, row {(start + row) * stride} has norm "
                f"{norms[row].item():g}: build the index again"
            )
        start += len(block)


def _let_the_clock_tick(stamps: dict[str, Stamp]) -> None:
    """A file that is written to in the tick of the clock in which it was read looks as if it were not: wait
    until that of the last write is over."""
    age = time.time_ns() - max(stamp[4] for stamp in stamps.values())
    if 0 <= age < CLOCK_TICK_NS:
        time.sleep((CLOCK_TICK_NS - age) / 1e9)


def _renew_after_fork(seal: weakref.ref[Seal]) -> None:
    """A lock that another thread holds while the process forks would never be released in the child."""

    def renew() -> None:
        found = seal()
        if found is not None:
            found._renew_lock()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=renew)


def _stamp(path: str | Path) -> Stamp:
    try:
        found = os.stat(path)
    except OSError as error:
        raise IndexCorrupt(
            f"{path} cannot be read any more ({error.strerror}): open the index again"
        ) from error
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

"""Whether an index is still, byte for byte, what its manifest says: what the final check may rest on."""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path

import torch

from amg.index.errors import IndexCorrupt
from amg.index.store import MANIFEST, Manifest, check_hashes, map_rows, read_manifest

NORM_TOLERANCE = 2e-3  # of unit rows stored in fp16
ROW_BLOCK_VALUES = 1 << 22

Stamp = tuple[int, int, int, int, int]


class Seal:
    """Of the files behind one opened index, shared by its copies; threads may share it.

    The first `check` reads every file against its sha256, and rows of a cosine index for unit norms; later
    ones ask the file system whether a file was written to since (a few microseconds). Memory-mapped rows
    change when their file does, so an index damaged or exchanged while open is refused, never searched.
    """

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory, self.manifest = directory, manifest
        self.opened = self._stamps()
        self._checked: dict[str, Stamp] | None = None
        self._renew_lock()
        _renew_after_fork(weakref.ref(self))

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raises IndexCorrupt, naming the file."""
        with self._lock:
            if self._checked is not None and self._stamps() == self._checked:
                return
            before = self._stamps()
            self._require_same_files(before)
            check_hashes(self.directory, self.manifest)
            self._require_unit_rows()
            if self._stamps() != before:
                raise IndexCorrupt(f"{self.directory} was written to while it was being checked")
            self._checked = before

    def _stamps(self) -> dict[str, Stamp]:
        names = [MANIFEST, *sorted(self.manifest.files)]
        return {name: _stamp(self.directory / name) for name in names}

    def _require_same_files(self, now: dict[str, Stamp]) -> None:
        for name, (device, inode, *_) in self.opened.items():
            if now[name][:2] != (device, inode) and not (name == MANIFEST and self._succeeded()):
                raise IndexCorrupt(
                    f"{self.directory / name} was exchanged since the index was opened: open the index again"
                )

    def _succeeded(self) -> bool:
        """Whether the manifest is that of a later generation, which leaves the files of this one alone."""
        return read_manifest(self.directory).generation > self.manifest.generation

    def _require_unit_rows(self) -> None:
        if self.manifest.metric != "cosine":
            return
        rows, start = map_rows(self.directory, self.manifest), 0
        for block in rows.split(max(1, ROW_BLOCK_VALUES // rows.shape[1])):
            norms = torch.linalg.vector_norm(block, dim=1, dtype=torch.float64)
            wrong = ~((norms - 1).abs() <= NORM_TOLERANCE)  # a NaN is wrong too
            if bool(wrong.any()):
                row = int(wrong.nonzero()[0])
                raise IndexCorrupt(
                    f"{self.directory / self.manifest.rows_file} must hold unit vectors, row {start + row} "
                    f"has norm {norms[row].item():g}: build the index again"
                )
            start += len(block)


def _renew_after_fork(seal: weakref.ref[Seal]) -> None:
    """A lock that another thread holds while the process forks would never be released in the child."""

    def renew() -> None:
        found = seal()
        if found is not None:
            found._renew_lock()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=renew)


def _stamp(path: Path) -> Stamp:
    try:
        found = os.stat(path)
    except OSError as error:
        raise IndexCorrupt(
            f"{path} cannot be read any more ({error.strerror}): open the index again"
        ) from error
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

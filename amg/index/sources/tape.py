"""A tar archive, compressed or not, read front to back: what its members are, and their bytes."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

BLOCK = tarfile.BLOCKSIZE
_OPENERS: tuple[tuple[bytes, Callable[[Any], Any]], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\0", lzma.open),
)
DAMAGED = (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, OSError, ValueError)
NO_END = "archives without an end mark, which may be cut short"


class Member(NamedTuple):
    """A file in an archive. name: a path that does not lead out of it; size: −1 for what is no plain file;
    target: of a link, "" where that leads out of the archive; fault: of the archive itself."""

    name: str
    offset: int
    size: int
    target: str | None = None
    fault: str | None = None


class Tape:
    """The bytes of an archive as they were before compression; opened when first read."""

    def __init__(self, path: Path):
        self.path = path
        self._file: Any = None

    def file(self) -> Any:
        if self._file is None:
            self._file = _opener(self.path)(self.path)
        return self._file

    def read(self, offset: int, size: int) -> bytes:
        """Bytes from an offset on, fewer where the archive ends before. Backwards is slow when compressed."""
        file = self.file()
        if file.tell() != offset:
            file.seek(offset)
        return file.read(size)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _opener(path: Path) -> Callable[[Any], Any]:
    with open(path, "rb") as file:
        start = file.read(8)
    return next((opener for magic, opener in _OPENERS if start.startswith(magic)), _open_plain)


def _open_plain(path: Path) -> Any:
    return open(path, "rb")


def is_tar(path: str | os.PathLike, empty: bool = True) -> bool:
    """Whether a file begins as a tar archive does, under its compression; empty: one without members too."""
    try:
        with _opener(Path(path))(path) as file:
            head = file.read(BLOCK)
        if len(head) == BLOCK and not any(head):
            return empty
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
        return True
    except DAMAGED:
        return False


def members(tape: Tape) -> Iterator[Member]:
    """What an archive holds beside directories, in order; where it is cut short or damaged a last Member with
    the fault says where."""
    start = 0
    while True:
        archive, end = None, start
        try:
            tape.file().seek(start)
            archive = tarfile.TarFile(fileobj=tape.file(), errorlevel=0, encoding="utf-8")
            while (info := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined] # else it keeps all of them
                if not info.isdir():
                    yield _member(info)
            end = archive.offset
            after = _after_end(tape, end)
        except DAMAGED as error:
            at = start if archive is None else archive.offset
            yield Member("", at, 0, fault=f"the archive is damaged or cut short after byte {at:,}: {error}")
            return
        if isinstance(after, str):
            yield Member("", end, 0, fault=after)
            return
        if after is None:
            return
        start = after


def _member(info: tarfile.TarInfo) -> Member:
    name = inside(info.name)
    if info.issym():
        return Member(name, 0, 0, target=_target(name, info.linkname))
    if info.islnk():
        return Member(name, 0, 0, target=inside(info.linkname))
    if not info.isreg() or info.issparse():
        return Member(name, info.offset_data, -1)
    return Member(name, info.offset_data, info.size)


def inside(name: str) -> str:
    """A member's name as a path within its archive: what leads out of it, or begins at the root, does not."""
    return posixpath.normpath(f"/{name}").lstrip("/")


def _target(name: str, link: str) -> str:
    """What a symbolic link leads to within the archive, "" where it leads out of it."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(name), link))
    return "" if target.startswith(("/", "..")) else target


def _after_end(tape: Tape, end: int) -> int | str | None:
    """What follows the last member: None where the archive ends as it should, the offset of another archive
    that was appended, or what is wrong."""
    block = tape.read(end, BLOCK)
    if not block:
        return NO_END
    if len(block) < BLOCK or any(block):
        return f"the archive is damaged or cut short after byte {end:,}"
    while block := tape.read(end, BLOCK):
        if any(block):
            return end if _begins(block) else f"the archive goes on after its end, at byte {end:,}, as none"
        end += len(block)
    return None


def _begins(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True

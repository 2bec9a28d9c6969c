"""Directories that are filled over several runs and emptied again: only ever our own, told by a marker."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from amg.index.store import TEMPORARY, write_atomically

MARKER = ".amg-unfinished.json"
FORMAT = "amg unfinished directory"


@contextmanager
def claimed(
    directory: Path, of_earlier_version: Callable[[], bool], error: type[ValueError] = ValueError
) -> Iterator[None]:
    """Hold a directory against other processes, after making sure that it is ours to fill and to empty.

    It is made where there is none, and then has our marker and mode 0700. Ours too are an empty one and one
    that was made by a version without markers, which `of_earlier_version` tells; these get the marker.
    Raises `error`, with everything left as it is, for a link, what is no directory, one of another user, one
    with anybody else's files, and one that another process holds.
    """
    made = _make(directory, error)
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as held:
            raise error(f"another process is building in {directory}") from held
        if not os.path.lexists(directory) or not os.path.samestat(os.fstat(handle), os.lstat(directory)):
            raise error(f"another process was building in {directory}, which is gone")
        try:
            _mark(directory, handle, of_earlier_version, error)
        except OSError:
            if made:
                shutil.rmtree(directory)
            raise
        yield
    finally:
        os.close(handle)


def _make(directory: Path, error: type[ValueError]) -> bool:
    """Make sure that a directory is there, and no link; whether it is a new one."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        directory.mkdir()
        return True
    except FileExistsError:
        pass
    if directory.is_symlink() or not directory.is_dir():
        kind = "a link" if directory.is_symlink() else "a file"
        raise error(f"{directory} must be a directory of amg's own, got {kind}: move it away")
    return False


def _mark(
    directory: Path, handle: int, of_earlier_version: Callable[[], bool], error: type[ValueError]
) -> None:
    """Refuse a directory that is not ours; give the marker to one that is and has none."""
    found = os.fstat(handle)
    if found.st_uid != os.geteuid():
        raise error(
            f"{directory} must be a directory of amg's own, got one of user {found.st_uid}: move it away"
        )
    if _mode(directory) is None:
        others = sorted(  # a marker that was cut short is ours, and so is one that was being written
            name for name in os.listdir(handle) if name != MARKER and not name.startswith(TEMPORARY)
        )
        if others and not of_earlier_version():
            raise error(
                f"{directory} must be a directory of amg's own, got one without its marker that holds "
                f"{others[0]!r}: nothing in it was touched; move it away, or remove it yourself"
            )
        record = {"format": FORMAT, "mode": stat.S_IMODE(found.st_mode)}
        write_atomically(directory / MARKER, json.dumps(record) + "\n")
    os.fchmod(handle, stat.S_IMODE(found.st_mode) & ~0o077)


def _mode(directory: Path) -> int | None:
    """The mode that a directory with our marker had when it was made or found; None for any other."""
    path = directory / MARKER
    try:
        record = json.loads(path.read_bytes())
        mode = record["mode"] if record["format"] == FORMAT and not path.is_symlink() else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return mode if type(mode) is int and 0 <= mode <= 0o7777 else None


def is_marked(directory: Path) -> bool:
    """Whether a directory holds our marker: that of a build or an audit that is under way or was stopped."""
    return _mode(directory) is not None


def empty(directory: Path) -> None:
    """Remove everything but the marker from a directory that is held by `claimed`."""
    _require_ours(directory)
    for entry in directory.iterdir():
        if entry.name == MARKER:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def remove(directory: Path) -> None:
    """Remove a directory that is held by `claimed`, with everything in it."""
    _require_ours(directory)
    shutil.rmtree(directory)


def is_held(directory: Path) -> bool:
    """Whether a process holds a directory by `claimed` now."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def publish(directory: Path, path: Path) -> None:
    """Give a directory that is held by `claimed` its final name and mode, and take the marker away.

    The mode has the bits of access that the marker tells and a new directory would have, and no others.
    """
    access = _require_ours(directory) & _usual_access(directory)
    own = stat.S_IMODE(directory.stat().st_mode)
    os.chmod(directory, (own & (stat.S_ISGID | stat.S_ISVTX)) | access)
    os.rename(directory, path)
    (path / MARKER).unlink()


def _usual_access(directory: Path) -> int:
    """What the umask leaves of 0777, seen at a new directory: to read the umask is to change it."""
    probe = directory / f"{TEMPORARY}{secrets.token_hex(8)}"
    probe.mkdir()
    try:
        return stat.S_IMODE(probe.stat().st_mode) & 0o777
    finally:
        probe.rmdir()


def _require_ours(directory: Path) -> int:
    mode = None if directory.is_symlink() else _mode(directory)
    if mode is None:
        raise RuntimeError(f"{directory} lost its marker {MARKER} while it was held: it is left as it is")
    return mode

"""Files that are there whole or not at all, and folders that one run at a time writes to."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from amg.index.store import TEMPORARY

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new name beside `path`, its own in every process, to write to: what is there afterwards is flushed to
    disk and takes the place of `path`; after an error nothing of it is left and `path` is as it was."""
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}.{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Remove what killed writes left in a folder that is held."""
    for left in folder.glob(f"{TEMPORARY}*"):
        left.unlink(missing_ok=True)


@contextmanager
def held(folder: Path, option: str = "--out") -> Iterator[None]:
    """Hold a folder, made where there is none, against other runs; no file is left in it by that.

    ValueError, naming the `option` it comes from, where another process holds it or it is no folder. Where
    the file system has no locks this is said, and nothing is held.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`{option}` must be a folder, got {folder}, which is none")
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"`{option}` must be a folder that no other run writes to, got {folder}, where one is under "
                "way: wait for it, or give another folder"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warnings.warn(
                f"{folder} is on a file system without locks: see to it that no other run writes to it",
                stacklevel=3,
            )
        yield
    finally:
        os.close(handle)

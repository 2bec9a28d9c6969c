"""Generations of an index: a change writes a whole new set of files into a folder of the index, then replaces
its manifest, which is the only switch. Killed at any byte, an index is what it was or what it was to become.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amg.index.build import write_whole
from amg.index.change.replay import digest_of
from amg.index.claim import MARKER, is_held, is_marked
from amg.index.errors import IndexBuildError
from amg.index.journal import State
from amg.index.store import MANIFEST, OWN_FILES, TEMPORARY, Manifest, folder_of, read_manifest, write_manifest

GENERATION = re.compile(r"generation-[1-9]\d*(\.partial)?")


def gc(path: str | os.PathLike) -> list[str]:
    """Delete what the index at `path` does not need: files of earlier generations, and changes that were
    stopped and are not under way → their names; nothing that is not the index's own. Whoever has an earlier
    generation open is told to open it again."""
    directory = Path(path)
    manifest, gone = read_manifest(directory), []
    for entry in sorted(directory.iterdir()):
        if GENERATION.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
            partial = entry.name.endswith(".partial")
            stopped = is_marked(entry) and not is_held(entry) if partial else _foreign(entry) is None
            if entry.name == manifest.folder or not stopped:
                continue
            shutil.rmtree(entry)
        elif manifest.folder and entry.name in OWN_FILES and entry.is_file():
            entry.unlink()
        else:
            continue
        gone.append(entry.name)
    return gone


def change(
    directory: Path,
    manifest: Manifest,
    identity: dict[str, Any],
    resume: bool,
    fill: Callable[[State, Path], None],
) -> None:
    """The next generation, filled and then switched to."""
    folder = directory / folder_of(manifest.generation + 1)
    if os.path.lexists(folder):  # whole, but never switched to
        if (other := _foreign(folder)) is not None:
            raise IndexBuildError(
                f"{folder} must be files of this index, got one with {other}: nothing in it was touched; "
                "move it away"
            )
        shutil.rmtree(folder)
    write_whole(folder, {"of": digest_of(directory), **identity}, resume, fill)
    write_manifest(directory, read_manifest(folder))


def _foreign(folder: Path) -> str | None:
    """What says that a folder in the place of a generation is somebody else's; None where it is ours."""
    if folder.is_symlink() or not folder.is_dir():
        return "a link in its place" if folder.is_symlink() else "a file in its place"
    for entry in sorted(folder.iterdir()):
        ours = entry.name in {*OWN_FILES, MANIFEST, MARKER} or entry.name.startswith(TEMPORARY)
        if not ours or entry.is_symlink() or not entry.is_file():
            return repr(entry.name)
    return None

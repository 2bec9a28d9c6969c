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
from amg.index.claim import is_held, is_marked
from amg.index.coverage import SKIPPED
from amg.index.journal import State
from amg.index.store import (
    CODE_ERRORS,
    CODE_ROTATION,
    CODE_SCALES,
    CODE_SQUARES,
    CODES,
    GUARD,
    MEMBER_ROWS,
    MEMBERS_FILE,
    META,
    PICTURES,
    ROWS_FILE,
    Manifest,
    folder_of,
    read_manifest,
    write_manifest,
)

OWN = {*ROWS_FILE.values(), *MEMBERS_FILE.values(), CODES, CODE_SCALES, CODE_ERRORS, META, PICTURES, GUARD}
OWN |= {CODE_SQUARES, CODE_ROTATION, MEMBER_ROWS, SKIPPED}
GENERATION = re.compile(r"generation-[1-9]\d*(\.partial)?")


def gc(path: str | os.PathLike) -> list[str]:
    """Delete what the index at `path` does not need: files of earlier generations, and changes that were
    stopped and are not under way → their names. Whoever has an earlier generation open is told to open it
    again."""
    directory = Path(path)
    manifest, gone = read_manifest(directory), []
    for entry in sorted(directory.iterdir()):
        if GENERATION.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
            partial = entry.name.endswith(".partial")
            if entry.name == manifest.folder or (partial and (not is_marked(entry) or is_held(entry))):
                continue
            shutil.rmtree(entry)
        elif manifest.folder and entry.name in OWN and entry.is_file():
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
    if folder.exists():  # whole, but never switched to
        shutil.rmtree(folder)
    write_whole(folder, {"of": digest_of(directory), **identity}, resume, fill)
    write_manifest(directory, read_manifest(folder))

"""What one tar archive holds, found in one pass over its headers and texts: its pictures are not read."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from amg.index.notes import Note, Tally
from amg.index.sources.listing import (
    HIDDEN,
    METADATA,
    PICTURE,
    SIDECARS,
    SIGNATURE_BYTES,
    SPECIAL,
    SYSTEM_FILES,
    look,
)
from amg.index.sources.tape import DAMAGED, NO_END, Member, Tape, members
from amg.index.text import MOST_BYTES, TOO_LARGE

MOST_METADATA = 1 << 30


class Text(NamedTuple):
    """A member that may hold a caption: its name, what follows its key, its bytes or why there are none."""

    name: str
    rest: str
    content: bytes | Note


@dataclass
class Contents:
    """Members by what they are. Members with the same key that follow each other are a run, WebDataset's
    sample. pictures: each with the number of its run; texts_of: of each run, texts by what follows the key;
    metadata: name and bytes; faults: what is wrong with the archive."""

    pictures: list[tuple[Member, int]] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    texts_of: dict[int, dict[str, int]] = field(default_factory=dict)
    links: list[Member] = field(default_factory=list)
    metadata: list[tuple[str, bytes]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def key_of(name: str) -> tuple[str, str]:
    """WebDataset's key of a member, up to the first dot of the file's name; what follows, in lower case."""
    folder, base = posixpath.split(name)
    stem, _, rest = base.partition(".")
    return posixpath.join(folder, stem), rest.lower()


def scan(tape: Tape, named: str | None, passed_over: Tally, place: Callable[[str], str]) -> Contents:
    """Sort the members of an archive, and count those that are none of these.

    named: a text that the caller named, by what follows the key. place(name): what a member is called.
    """
    contents = Contents()
    before, run = None, -1
    for member in members(tape):
        if member.fault is not None:
            if member.fault == NO_END:
                passed_over.add(NO_END, place(""))
            else:
                contents.faults.append(member.fault)
            continue
        key, rest = key_of(member.name)
        run += key != before
        before = key
        kind = _take(tape, member, run, rest == named, contents, place)
        if kind is not None:
            passed_over.add(kind, place(member.name))
    return contents


def _take(
    tape: Tape, member: Member, run: int, named: bool, contents: Contents, place: Callable[[str], str]
) -> str | None:
    """Put a member where it belongs; what it is instead where it belongs nowhere."""
    if any(part.startswith(".") or part.lower() in SYSTEM_FILES for part in member.name.split("/")):
        return HIDDEN
    if member.target is not None:
        contents.links.append(member)
        return None
    if member.size < 0:
        return SPECIAL
    base = posixpath.basename(member.name).lower()
    if base in METADATA:
        contents.metadata.append((member.name, _begin(tape, member, MOST_METADATA)))
        return None
    if base.endswith(SIDECARS) or named:
        _take_text(tape, member, run, contents, place)
        return None
    kind, fault = look(base, lambda: _begin(tape, member, SIGNATURE_BYTES))
    if kind != PICTURE:
        return kind
    contents.pictures.append((member._replace(fault=fault), run))
    return None


def _take_text(tape: Tape, member: Member, run: int, contents: Contents, place: Callable[[str], str]) -> None:
    large, rest = member.size > MOST_BYTES, key_of(member.name)[1]
    content = Note(TOO_LARGE, place(member.name)) if large else _begin(tape, member, MOST_BYTES)
    contents.texts_of.setdefault(run, {})[rest] = len(contents.texts)
    contents.texts.append(Text(member.name, rest, content))


def _begin(tape: Tape, member: Member, most: int) -> bytes:
    """The first bytes of a member, none where the archive is damaged: that is said once, at its end."""
    try:
        return tape.read(member.offset, min(member.size, most))
    except DAMAGED:
        return b""

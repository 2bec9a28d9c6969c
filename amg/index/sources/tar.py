"""Pictures in tar archives, as WebDataset and img2dataset write them: streamed, nothing is unpacked."""

from __future__ import annotations

import functools
import itertools
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from amg.index.decode import Picture, UnreadableImage, decode_image
from amg.index.errors import IndexBuildError
from amg.index.notes import Tally
from amg.index.sources.columns import Table
from amg.index.sources.contents import Contents, key_of, scan
from amg.index.sources.listing import BESIDE, DANGLING, KIND_OF, PICTURE, look
from amg.index.sources.metadata import read_metadata
from amg.index.sources.sample import SampleCaptions
from amg.index.sources.source import Decoding, Fields, Found, TrainingImage, identity_of, lost
from amg.index.sources.status import failed
from amg.index.sources.tape import DAMAGED, Tape
from amg.index.text import Caption, plain_name

OUT, CUT = "a link out of its archive", "the archive ends within it"


class Archive(NamedTuple):
    """A tar file under the name it has in the source, and img2dataset's table of its downloads."""

    file: Found
    path: Path
    status: Table | None = None

    def place(self, name: str) -> str:
        """What a member is called, the archive itself for ""."""
        return plain_name(f"{self.file.name}/{name}" if name else self.file.name)


class Held(NamedTuple):
    """A picture in an archive: its name there, where its bytes are, its caption, what is wrong with it."""

    name: str
    offset: int = 0
    size: int = 0
    caption: Caption = Caption()
    fault: str | None = None
    missing: bool = False


class TarSource:
    """Pictures in tar files, archive by archive, in the order they lie in; then, of each archive, what is
    wrong with it and what is known to be missing in it."""

    identity_tells = True
    length: int | None = None

    def __init__(self, archives: list[Archive], extra: list[Found], decoding: Decoding, fields: Fields):
        self.archives, self.decoding, self.fields = archives, decoding, fields
        self.identity = identity_of("tar", [archive.file for archive in archives] + extra)
        self.passed_over = Tally()
        if fields.caption is not None:
            self._check_field(fields.caption)

    def first(self) -> TrainingImage | None:
        return next(self._read(0, Tally()), None)

    def read(self, start: int) -> Iterator[TrainingImage]:
        self.passed_over = Tally()
        return self._read(start, self.passed_over)

    def _read(self, start: int, passed_over: Tally) -> Iterator[TrainingImage]:
        position = 0
        for archive in self.archives:
            tape = Tape(archive.path)
            pictures, _ = open_archive(archive, tape, self.fields, passed_over)
            for at in range(max(start - position, 0), len(pictures)):
                held = pictures[at]
                name = archive.place(held.name)
                load = functools.partial(_decode_member, tape, held, self.decoding)
                yield TrainingImage(position + at, name, name, held.caption, load)
            position += len(pictures)
            tape.close()

    def _check_field(self, named: str) -> None:
        """Refuse a name that no sample of the first archive with pictures has. Raises IndexBuildError."""
        for archive in self.archives:
            tape = Tape(archive.path)
            pictures, seen = open_archive(archive, tape, self.fields, Tally())
            tape.close()
            if all(held.missing or held.fault for held in pictures):
                continue
            if named.lower() not in seen:
                known = ", ".join(sorted(seen)) or "none"
                raise IndexBuildError(
                    f"`captions` names {named!r}, which no sample of {archive.path} has; their texts and "
                    f"fields are: {known}"
                )
            return


def _decode_member(tape: Tape, held: Held, decoding: Decoding) -> Picture:
    if held.fault is not None:
        lost(held.fault, held.missing)
    try:
        content = tape.read(held.offset, held.size)
    except DAMAGED as error:
        raise UnreadableImage(f"{CUT}: {error}") from error
    if len(content) < held.size:
        raise UnreadableImage(CUT)
    return decode_image(content, held.name, decoding.background, decoding.least)


def open_archive(
    archive: Archive, tape: Tape, fields: Fields, passed_over: Tally
) -> tuple[list[Held], set[str]]:
    """The pictures of an archive, and the texts and fields that could be named as their captions."""
    named = None if fields.caption is None else fields.caption.lower().lstrip(".")
    contents = scan(tape, named, passed_over, archive.place)
    table = read_metadata(contents.metadata, archive.file.name, fields)
    captions = SampleCaptions(contents, named, archive.place)
    pictures = [
        Held(
            member.name,
            member.offset,
            member.size,
            table.caption_of(member.name) or captions.caption_of(member.name, run),
            member.fault,
        )
        for member, run in contents.pictures
    ]
    pictures = _told_apart(pictures + _linked(contents, pictures, archive, passed_over))
    for number, text in enumerate(contents.texts):
        passed_over.add(BESIDE if number in captions.used else KIND_OF[".txt"], archive.place(text.name))
    present = {held.name for held in pictures}
    pictures += [Held(name, fault=reason, missing=True) for name, reason in table.missing(present)]
    if archive.status is not None:
        keys = {posixpath.basename(key_of(name)[0]) for name in present}
        pictures += [Held(row.key, fault=row.reason, missing=True) for row in failed(archive.status, keys)]
    pictures += [Held("", fault=fault) for fault in contents.faults]
    return pictures, captions.seen | ({named} if named is not None and contents.metadata else set())


def _linked(contents: Contents, pictures: list[Held], archive: Archive, passed_over: Tally) -> list[Held]:
    """Links to pictures of the archive, as these; other links that are called like pictures, skipped."""
    by_name = {held.name: held for held in pictures}
    targets = {link.name: link.target for link in contents.links}
    found = []
    for link in contents.links:
        end, seen = link.target, {link.name}
        while end in targets and end not in seen:
            seen.add(end)
            end = targets[end]
        held = by_name.get(end or "")
        kind, _ = look(posixpath.basename(link.name).lower(), lambda: b"")
        if held is not None:
            found.append(held._replace(name=link.name))
        elif kind == PICTURE:
            found.append(Held(link.name, fault=DANGLING if end else OUT))
        else:
            passed_over.add(f"{kind}: a link", archive.place(link.name))
    return found


def _told_apart(pictures: list[Held]) -> list[Held]:
    """Members of one name, which an archive may hold, told apart by a number."""
    seen: dict[str, int] = {}
    named = []
    for held in pictures:
        count = seen[held.name] = seen.get(held.name, 0) + 1
        named.append(held if count == 1 else held._replace(name=f"{held.name}#{count}"))
    return named


def expand_braces(pattern: str) -> list[str]:
    """`a/{000..002}.tar` → a/000.tar, a/001.tar, a/002.tar; also {x,y}, and several in one pattern."""
    before, brace, rest = pattern.partition("{")
    inner, closed, after = rest.partition("}")
    if not brace or not closed:
        return [pattern]
    ends = expand_braces(after)
    return [f"{before}{choice}{end}" for choice, end in itertools.product(_choices(inner), ends)]


def _choices(inner: str) -> list[str]:
    first, dots, last = inner.partition("..")
    if dots and first.isdecimal() and last.isdecimal() and int(last) >= int(first):
        return [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return inner.split(",") if "," in inner else [f"{{{inner}}}"]

"""Pictures in tar archives, as WebDataset and img2dataset write them: streamed, nothing is unpacked."""

from __future__ import annotations

import functools
import itertools
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from amg.index.decode import Picture, UnreadableImage, decode_image
from amg.index.errors import IndexBuildError
from amg.index.notes import Note, Tally
from amg.index.sources.columns import Table
from amg.index.sources.listing import (
    BESIDE,
    DANGLING,
    HIDDEN,
    KIND_OF,
    METADATA,
    PICTURE,
    SIDECARS,
    SIGNATURE_BYTES,
    SPECIAL,
    SYSTEM_FILES,
    look,
)
from amg.index.sources.metadata import Metadata, read_metadata
from amg.index.sources.records import caption_in, record_of
from amg.index.sources.source import Decoding, Fields, Found, TrainingImage, identity_of, lost
from amg.index.sources.status import failed
from amg.index.sources.tape import DAMAGED, NO_END, Member, Tape, members
from amg.index.text import MOST_BYTES, TOO_LARGE, Caption, make_caption, plain_name

OUT, CUT = "a link out of its archive", "the archive ends within it"


class Archive(NamedTuple):
    """A tar file under the name it has in the source, and img2dataset's table of its downloads."""

    file: Found
    path: Path
    status: Table | None = None


class Held(NamedTuple):
    """A picture in an archive: its name there, where its bytes are, its caption, what is wrong with it."""

    name: str
    offset: int
    size: int
    caption: Caption = Caption()
    fault: str | None = None
    missing: bool = False


class TarSource:
    """Pictures in tar files, archive by archive, in the order they lie in. Members with the same key (the
    path up to the first dot of the file's name) that follow each other are a sample: its text is the caption
    of all its pictures."""

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
            pictures = _Contents(archive, tape, self.fields, passed_over).pictures()
            for at in range(max(start - position, 0), len(pictures)):
                yield self._image(position + at, archive, tape, pictures[at])
            position += len(pictures)
            tape.close()

    def _image(self, position: int, archive: Archive, tape: Tape, held: Held) -> TrainingImage:
        top = archive.file.name
        name = plain_name(f"{top}/{held.name}" if held.name else top)
        load = functools.partial(_decode_member, tape, held, self.decoding)
        return TrainingImage(position, name, name, held.caption, load)

    def _check_field(self, field: str) -> None:
        """Refuse a name that no sample of the first archive with pictures has. Raises IndexBuildError."""
        for archive in self.archives:
            tape = Tape(archive.path)
            contents = _Contents(archive, tape, self.fields, Tally())
            pictures = contents.pictures()
            tape.close()
            if all(held.missing or held.fault for held in pictures):
                continue
            if field.lower() not in contents.seen_fields:
                known = ", ".join(sorted(contents.seen_fields)) or "none"
                raise IndexBuildError(
                    f"`captions` names {field!r}, which no sample of {archive.path} has; their texts and "
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


class _Contents:
    """What one archive holds, found in one pass over its headers and texts; pictures are not read."""

    def __init__(self, archive: Archive, tape: Tape, fields: Fields, passed_over: Tally):
        self.archive, self.tape, self.fields, self.passed_over = archive, tape, fields, passed_over
        self.seen_fields: set[str] = set()
        self.held: list[Member] = []
        self.texts: list[tuple[str, bytes | Note]] = []
        self.text_of: dict[int, dict[str, int]] = {}  # of each run: texts by what follows the key
        self.text_named: dict[str, int] = {}
        self.run_of: list[int] = []
        self.links: list[Member] = []
        self.metadata: list[tuple[str, bytes]] = []
        self.faults: list[Held] = []
        self.used: set[int] = set()

    def pictures(self) -> list[Held]:
        """The pictures in order, then what is wrong with the archive, then what was never downloaded."""
        self._scan()
        table = read_metadata(self.metadata, self.archive.file.name, self.fields)
        self.seen_fields |= {self._named() or "" for _ in self.metadata}
        pictures = [
            self._held(member, run, table) for member, run in zip(self.held, self.run_of, strict=True)
        ]
        pictures += self._linked(pictures)
        pictures = _told_apart(pictures)
        for number, (name, _) in enumerate(self.texts):
            self.passed_over.add(BESIDE if number in self.used else KIND_OF[".txt"], self._at(name))
        if self.archive.status is not None:
            present = {key_of(held.name)[0].rpartition("/")[2] for held in pictures}
            pictures += [
                Held(row.key, 0, 0, fault=row.reason, missing=True)
                for row in failed(self.archive.status, present)
            ]
        pictures += [
            Held(name, 0, 0, fault=reason, missing=True)
            for name, reason in table.missing({held.name for held in pictures})
        ]
        return pictures + self.faults

    def _at(self, name: str) -> str:
        return plain_name(f"{self.archive.file.name}/{name}")

    def _scan(self) -> None:
        before, run = None, -1
        for member in members(self.tape):
            if member.fault is not None:
                self._broken(member)
                continue
            key, rest = key_of(member.name)
            run += key != before
            before = key
            if _is_hidden(member.name):
                self.passed_over.add(HIDDEN, self._at(member.name))
            elif member.target is not None:
                self.links.append(member)
            elif member.size < 0:
                self.passed_over.add(SPECIAL, self._at(member.name))
            else:
                self._take(member, rest, run)

    def _broken(self, member: Member) -> None:
        if member.fault == NO_END:
            self.passed_over.add(NO_END, self.archive.file.name)
        else:
            self.faults.append(Held("", 0, 0, fault=member.fault))

    def _take(self, member: Member, rest: str, run: int) -> None:
        base = posixpath.basename(member.name).lower()
        if os.path.splitext(base)[1] in SIDECARS or base in METADATA or rest == self._named():
            self._take_text(member, rest, run, base)
            return
        kind, fault = look(base, lambda: self._begin(member))
        if kind == PICTURE:
            self.held.append(member._replace(fault=fault))
            self.run_of.append(run)
        else:
            self.passed_over.add(kind, self._at(member.name))

    def _named(self) -> str | None:
        return None if self.fields.caption is None else self.fields.caption.lower().lstrip(".")

    def _begin(self, member: Member) -> bytes:
        try:
            return self.tape.read(member.offset, min(SIGNATURE_BYTES, member.size))
        except DAMAGED:
            return b""

    def _take_text(self, member: Member, rest: str, run: int, base: str) -> None:
        if base in METADATA:
            self.metadata.append((member.name, self._text(member, 1 << 30)))
            return
        large = member.size > MOST_BYTES
        content = Note(TOO_LARGE, self._at(member.name)) if large else self._text(member, MOST_BYTES)
        number = len(self.texts)
        self.texts.append((member.name, content))
        self.text_of.setdefault(run, {})[rest] = number
        stem, suffix = os.path.splitext(member.name)
        self.text_named.setdefault(stem + suffix.lower(), number)

    def _text(self, member: Member, most: int) -> bytes:
        try:
            return self.tape.read(member.offset, min(member.size, most))
        except DAMAGED:
            return b""

    def _held(self, member: Member, run: int, table: Metadata) -> Held:
        caption = table.caption_of(member.name) or self._caption(member.name, run)
        return Held(member.name, member.offset, member.size, caption or Caption(), member.fault)

    def _caption(self, name: str, run: int) -> Caption | None:
        """Of the picture's own sample, else of a file beside it anywhere in the archive."""
        own = self.text_of.get(run, {})
        stem = key_of(name)[1].rpartition(".")[0]
        order = [self._named()] if self._named() else []
        order += [
            f"{rest}{suffix}".lstrip(".") for suffix in SIDECARS for rest in (key_of(name)[1], stem, "")
        ]
        texts = [own[rest] for rest in order if rest in own]
        outer = [top + suffix for suffix in SIDECARS for top in (name, os.path.splitext(name)[0])]
        texts += [self.text_named[name] for name in outer if name in self.text_named]
        for text in dict.fromkeys(texts):
            caption = self._read_text(*self.texts[text])
            if caption is not None and (caption.text is not None or caption.notes):
                self.used.add(text)
                return caption
        return None

    def _read_text(self, name: str, content: bytes | Note) -> Caption | None:
        """The caption in a text or JSON member, None where it holds none."""
        where = self._at(name)
        rest, field = key_of(name)[1], self.fields.caption
        if isinstance(content, Note):
            return Caption(notes=(content,))
        if rest.endswith("json"):
            caption = self._of_json(content, where)
        else:
            self.seen_fields.add(rest)
            if field is not None and rest != self._named():
                return None
            caption = make_caption(content, where)
        return (
            caption._replace(text=caption.text.strip()) if caption is not None and caption.text else caption
        )

    def _of_json(self, content: bytes, where: str) -> Caption | None:
        record = record_of(content, where)
        if record is None:
            return None
        self.seen_fields |= set(record.values)
        value: Any = caption_in(record, self.fields.caption)
        return None if value is None else make_caption(value, where)

    def _linked(self, pictures: list[Held]) -> list[Held]:
        """Links to pictures of the archive, as these; other links that are called like pictures, skipped."""
        by_name, targets = {held.name: held for held in pictures}, {at.name: at.target for at in self.links}
        found = []
        for link in self.links:
            end, seen = link.target, {link.name}
            while end in targets and end not in seen:
                seen.add(end)
                end = targets[end]
            held = by_name.get(end or "")
            kind, _ = look(posixpath.basename(link.name).lower(), lambda: b"")
            if held is not None:
                found.append(held._replace(name=link.name))
            elif kind == PICTURE:
                found.append(Held(link.name, 0, 0, fault=DANGLING if end else OUT))
            else:
                self.passed_over.add(f"{kind}: a link", self._at(link.name))
        return found


def key_of(name: str) -> tuple[str, str]:
    """WebDataset's key of a member, up to the first dot of the file's name; what follows, in lower case."""
    folder, base = posixpath.split(name)
    stem, _, rest = base.partition(".")
    return posixpath.join(folder, stem), rest.lower()


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part.lower() in SYSTEM_FILES for part in name.split("/"))


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
    return [
        f"{before}{choice}{end}" for choice, end in itertools.product(_choices(inner), expand_braces(after))
    ]


def _choices(inner: str) -> list[str]:
    first, dots, last = inner.partition("..")
    if dots and first.isdecimal() and last.isdecimal() and int(last) >= int(first):
        return [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return inner.split(",") if "," in inner else [f"{{{inner}}}"]

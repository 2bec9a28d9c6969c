"""The captions of pictures in a tar archive: of a picture's sample, or of a file named like it."""

from __future__ import annotations

import os
from collections.abc import Callable

from amg.index.notes import Note
from amg.index.sources.contents import Contents, Text, key_of
from amg.index.sources.listing import SIDECARS
from amg.index.sources.records import caption_in, record_of
from amg.index.text import Caption, make_caption


class SampleCaptions:
    """Finds captions among the texts of an archive. named: which text or field of JSON holds them, None: the
    usual ones. used: numbers of the texts that gave one; seen: what texts and fields there were to name."""

    def __init__(self, contents: Contents, named: str | None, place: Callable[[str], str]):
        self.contents, self.named, self.place = contents, named, place
        self.used: set[int] = set()
        self.seen: set[str] = set()
        self._numbers: dict[str, int] = {}
        for number, text in enumerate(contents.texts):
            stem, suffix = os.path.splitext(text.name)
            self._numbers.setdefault(stem + suffix.lower(), number)

    def caption_of(self, name: str, run: int) -> Caption:
        """The caption of a picture of the run with this number."""
        for number in self._candidates(name, run):
            caption = self._read(self.contents.texts[number])
            if caption.text is not None or caption.notes:
                self.used.add(number)
                return caption
        return Caption()

    def _candidates(self, name: str, run: int) -> list[int]:
        """Texts in the order they are asked: for a.left.jpg of its sample a.left.jpg.txt, a.left.txt, a.txt,
        then .caption and .json alike; then those of its name anywhere in the archive."""
        own, rest = self.contents.texts_of.get(run, {}), key_of(name)[1]
        starts = (rest, rest.rpartition(".")[0], "")
        order = [self.named] if self.named is not None else []
        order += [f"{start}{suffix}".lstrip(".") for suffix in SIDECARS for start in starts]
        outer = [start + suffix for suffix in SIDECARS for start in (name, os.path.splitext(name)[0])]
        found = [own.get(one) for one in order] + [self._numbers.get(one) for one in outer]
        return list(dict.fromkeys(number for number in found if number is not None))

    def _read(self, text: Text) -> Caption:
        if isinstance(text.content, Note):
            return Caption(notes=(text.content,))
        if text.rest.endswith("json"):
            caption = self._of_json(text.content, self.place(text.name))
        else:
            self.seen.add(text.rest)
            if self.named is not None and text.rest != self.named:
                return Caption()
            caption = make_caption(text.content, self.place(text.name))
        return caption._replace(text=None if caption.text is None else caption.text.strip())

    def _of_json(self, content: bytes, where: str) -> Caption:
        record = record_of(content, where)
        if record is None:
            return Caption()
        self.seen |= set(record.values)
        value = caption_in(record, self.named)
        return Caption() if value is None else make_caption(value, where)

"""Hugging Face's image folders: metadata.jsonl, .csv or .parquet says which picture has which caption."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from amg.index.errors import IndexBuildError
from amg.index.sources.records import Record, caption_in, read_records
from amg.index.sources.source import PATH_FIELDS, Fields
from amg.index.text import Caption, make_caption, plain_name


@dataclass(frozen=True)
class Metadata:
    """The caption of each picture that metadata names, by its path, and the file that named it."""

    captions: dict[str, tuple[Caption, str]]

    def caption_of(self, name: str) -> Caption | None:
        """The caption of a picture, None where metadata has none for it."""
        found = self.captions.get(name)
        return found[0] if found is not None and (found[0].text is not None or found[0].notes) else None

    def missing(self, present: set[str]) -> Iterator[tuple[str, str]]:
        """Pictures that are named and not there, with the reason that is given for them."""
        for name, (_, table) in self.captions.items():
            if name not in present:
                yield name, f"named in {table}, not there"


def read_metadata(files: Iterable[tuple[str, bytes]], top: str, fields: Fields) -> Metadata:
    """Metadata out of the contents of its files, each with its path beside the pictures; top: how the place
    they lie in is called in errors."""
    captions: dict[str, tuple[Caption, str]] = {}
    for name, content in files:
        where = f"{top}/{name}" if top else name
        add_records(captions, read_records(content, name, where), name, fields)
    return Metadata(captions)


def add_records(
    captions: dict[str, tuple[Caption, str]], records: Iterable[Record], name: str, fields: Fields
) -> bool:
    """Add what the rows of one metadata file say; whether it is one at all, with paths in it. Raises
    IndexBuildError where it lacks the caption field that was named."""
    folder, base = posixpath.split(name)
    used = False
    for record in records:
        path: Any = record.first(("file_name", "image_file_name", *PATH_FIELDS), str, bytes)
        if path is None:
            continue
        if fields.caption is not None and fields.caption.lower() not in record.values:
            raise IndexBuildError(
                f"`captions` names {fields.caption!r}; {record.where} has {', '.join(record.values)}"
            )
        used = True
        text = plain_name(path).replace("\\", "/")
        place = posixpath.normpath(posixpath.join(folder, text))
        value = caption_in(record, fields.caption)
        captions[place] = (Caption() if value is None else make_caption(value, record.where), base)
    return used

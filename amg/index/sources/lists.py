"""Pictures that a JSONL, JSON, CSV or text file lists by their paths, with captions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from amg.index.errors import IndexBuildError
from amg.index.notes import Tally
from amg.index.sources.listing import DANGLING
from amg.index.sources.records import caption_in, read_records, read_table_records
from amg.index.sources.source import (
    PATH_FIELDS,
    Decoding,
    Fields,
    Found,
    TrainingImage,
    found,
    identity_of,
    loader,
)
from amg.index.text import Caption, make_caption, plain_name

URL, NO_FILE = "a URL, which is not downloaded", "no such file"


class Listed(NamedTuple):
    """A picture on a list: the file, the path it has there, its caption."""

    path: Path
    file: Found
    caption: Caption = Caption()


class ListSource:
    """Pictures by their paths, in the order of the list."""

    identity_tells = True

    def __init__(self, kind: str, listed: Sequence[Listed], decoding: Decoding):
        self.listed, self.decoding = listed, decoding
        self.length: int | None = len(listed)
        self.identity = identity_of(kind, [entry.file for entry in listed])
        self.passed_over = Tally()

    def first(self) -> TrainingImage:
        return self._image(0)

    def read(self, start: int) -> Iterator[TrainingImage]:
        for position in range(start, len(self.listed)):
            yield self._image(position)

    def _image(self, position: int) -> TrainingImage:
        entry = self.listed[position]
        name = plain_name(entry.file.name)
        load = loader(entry.path, entry.file, self.decoding)
        return TrainingImage(position, name, name, entry.caption, load)


def open_files(paths: Sequence[Path], names: Sequence[str], decoding: Decoding) -> ListSource:
    """Picture files given by name."""
    listed = [Listed(path, _look(path, name)) for path, name in zip(paths, names, strict=True)]
    return ListSource("files", listed, decoding)


def open_list(path: Path, decoding: Decoding, fields: Fields) -> ListSource:
    """The pictures that a list names, relative to where it lies. Raises IndexBuildError where it is none."""
    if path.suffix.lower() == ".parquet":
        records = read_table_records(path, path.name)
    else:
        records = read_records(path.read_bytes(), path.name, path.name)
    listed = [_listed(path, record, fields) for record in records]
    if not listed:
        raise IndexBuildError(f"`images` is empty: {path} lists no pictures")
    source = ListSource("list", listed, decoding)
    source.identity += f" {identity_of('in', [found(path, path.name)])}"
    return source


def _listed(path: Path, record: Any, fields: Fields) -> Listed:
    names = PATH_FIELDS if fields.image is None else (fields.image.lower(),)
    given = record.first(names, str, bytes)
    if given is None:
        raise IndexBuildError(
            f"`images`: {record.where} must have the path of a picture under one of {', '.join(names)}; "
            f"it has {', '.join(map(str, record.values))}"
        )
    if fields.caption is not None and fields.caption.lower() not in record.values:
        raise IndexBuildError(
            f"`captions` names {fields.caption!r}; {record.where} has {', '.join(record.values)}"
        )
    name = os.fsdecode(given)
    value = caption_in(record, fields.caption)
    caption = Caption() if value is None else make_caption(value, record.where)
    if name.startswith(("http://", "https://", "s3://", "gs://", "hf://")):
        return Listed(path, Found(name, 0, URL), caption)
    place = path.parent / name.removeprefix("file://")
    if "\\" in name and not os.path.lexists(place):  # a list from Windows
        place = path.parent / name.replace("\\", "/")
    return Listed(place, _look(place, name), caption)


def _look(place: Path, name: str) -> Found:
    try:
        return found(place, name)
    except OSError as error:
        link = isinstance(error, FileNotFoundError) and os.path.islink(place)
        missing = isinstance(error, FileNotFoundError)
        fault = DANGLING if link else NO_FILE if missing else error.strerror or str(error)
        return Found(name, 0, fault)
    except ValueError as error:  # a null byte in the name
        return Found(name, 0, str(error))

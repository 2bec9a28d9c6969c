"""Rows of Parquet or Arrow files with encoded pictures: Hugging Face's, img2dataset's, anybody's."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amg.index.decode import MissingImage, Picture, UnreadableImage, decode_image
from amg.index.errors import IndexBuildError
from amg.index.notes import Tally
from amg.index.sources.columns import (
    Table,
    caption_column,
    image_column,
    image_columns,
    open_table,
    read_group,
    text_columns,
)
from amg.index.sources.source import Decoding, Fields, Found, TrainingImage, identity_of
from amg.index.text import Caption, make_caption, plain_name

OTHER_COLUMNS = "pictures in columns that were not named"
STATUS = "img2dataset"


class TableSource:
    """Rows of Parquet or Arrow files: a struct column {bytes, path} or a binary column."""

    identity_tells = True

    def __init__(self, folder: Path, found: list[Found], decoding: Decoding, fields: Fields):
        self.folder, self.names, self.decoding = folder, found, decoding
        self.tables = [open_table(folder / file.name) for file in found]
        self.columns = [image_column(table, fields.image) for table in self.tables]
        pairs = list(zip(self.tables, self.columns, strict=True))
        self.captions = [caption_column(table, fields.caption, column) for table, column in pairs]
        self.passed_over = Tally()
        for file, (table, column) in zip(found, pairs, strict=True):
            others = [name for name in image_columns(table) if name != column]
            for name in others if table.rows else ():
                self.passed_over.add(OTHER_COLUMNS, f"{plain_name(file.name)}: {name}", table.rows)
        self.length: int | None = sum(table.rows for table in self.tables)
        if self.length == 0:
            listed = ", ".join(str(table.file) for table in self.tables)
            raise IndexBuildError(f"`images` is empty: no rows in {listed}")
        self.identity = identity_of("parquet", found)

    def first(self) -> TrainingImage | None:
        return next(self.read(0), None)

    def read(self, start: int) -> Iterator[TrainingImage]:
        position = 0
        for at, table in enumerate(self.tables):
            row = 0
            for group, size in enumerate(table.groups):
                if position + size > start:
                    columns, skip = self._columns(at), max(start - position, 0)
                    for offset, record in read_group(table, group, columns, skip):
                        yield self._image(position + offset, at, row + offset, record)
                position, row = position + size, row + size

    def _columns(self, at: int) -> list[str]:
        named = [self.columns[at], self.captions[at], "status" if is_status_table(self.tables[at]) else None]
        return list(dict.fromkeys(name for name in named if name is not None))

    def _image(self, position: int, at: int, row: int, record: dict) -> TrainingImage:
        source = f"{plain_name(self.names[at].name)}#{row}"
        cell, field = record[self.columns[at]], self.captions[at]
        content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        name = plain_name(path) if path else source
        caption = Caption()
        if field is not None:
            value = record[field]
            caption = make_caption(str(value) if isinstance(value, int) else value, source)
        if content:
            load = functools.partial(_decode_cell, content, name, self.decoding)
        else:
            load = functools.partial(self._without_bytes, at, path, record.get("status"))
        return TrainingImage(position, name, source, caption, load)

    def _without_bytes(self, at: int, path: Any, status: Any) -> Picture:
        """The picture of a row that has a path alone: a file in the table's own folder, as it may be."""
        if status is not None and plain_name(status) != "success":
            raise MissingImage(f"{STATUS}: {plain_name(status)}")
        if not path:
            raise UnreadableImage("no image bytes in this row")
        top = os.path.realpath(self.tables[at].file.parent)
        file = os.path.realpath(os.path.join(top, os.fsdecode(path)))
        if os.path.commonpath([top, file]) != top or not os.path.isfile(file):
            raise UnreadableImage("no image bytes in this row, and its path is no file in the table's folder")
        return _decode_cell(Path(file).read_bytes(), plain_name(path), self.decoding)


def _decode_cell(content: bytes, name: str, decoding: Decoding) -> Picture:
    return decode_image(content, name, decoding.background, decoding.least)


def is_status_table(table: Table) -> bool:
    """Whether img2dataset wrote it: a row for every download that was tried, and what became of it."""
    return text_columns(table, "key", "status")


def arrow_names(folder: Path) -> set[str] | None:
    """The Arrow files of a dataset that `datasets` saved in a folder, None where it saved none there; what
    else lies there are its caches."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        return {entry["filename"] for entry in state["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None

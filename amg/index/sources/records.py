"""Rows of JSONL, JSON, CSV and Parquet files that speak of pictures elsewhere: a path and a caption each."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from amg.index.errors import IndexBuildError
from amg.index.sources.columns import image_columns, open_table, read_group
from amg.index.sources.source import CAPTION_FIELDS, PATH_FIELDS
from amg.index.text import decode_text

csv.field_size_limit(1 << 24)
LISTS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")


class Record(NamedTuple):
    """A row, by its keys in lower case, and where it stands."""

    values: dict[str, Any]
    where: str

    def first(self, names: tuple[str, ...], *types: type) -> Any:
        """The first of these fields that is of one of these types and not empty, None without."""
        found = (self.values.get(name) for name in names)
        return next((value for value in found if isinstance(value, types) and value), None)


def read_records(content: bytes, name: str, where: str) -> Iterator[Record]:
    """The rows of a file by its suffix, in whatever encoding its bytes tell. Raises IndexBuildError naming
    the line that is not one."""
    suffix = Path(name).suffix.lower()
    text = decode_text(content)[0]
    if suffix in (".csv", ".tsv"):
        return _of_csv(text, _delimiter(text, suffix), where)
    if suffix == ".txt":
        return _of_lines(text, where)
    if suffix == ".json":
        return _of_json(text, where)
    return _of_jsonl(text, where)


def read_table_records(file: Path, where: str) -> Iterator[Record]:
    """The rows of a Parquet file without pictures; text as bytes."""
    table = open_table(file)
    names = [name for name in table.schema.names if name not in image_columns(table)]
    row = 0
    for group, size in enumerate(table.groups):
        for offset, record in read_group(table, group, names, 0):
            yield Record({key.lower(): value for key, value in record.items()}, f"{where}#{row + offset}")
        row += size


def _of_csv(text: str, delimiter: str, where: str) -> Iterator[Record]:
    """With a header, or without one: then the first cell is the path and the second the caption."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    header: list[str] | None = None
    try:
        for cells in rows:
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip().lower() for cell in cells]
                if _is_header(header):
                    continue
                header = ["path", "caption"]
            yield Record(dict(zip(header, cells, strict=False)), f"{where}:{rows.line_num}")
    except csv.Error as error:
        raise IndexBuildError(f"`images`: {where}:{rows.line_num} is not valid CSV ({error})") from error


def _delimiter(text: str, suffix: str) -> str:
    """What the cells are divided by: what the suffix says, unless the first line has a path's column under
    another one alone."""
    first = text.partition("\n")[0].strip().lower()
    usual = "\t" if suffix == ".tsv" else ","
    for delimiter in (usual, ";", "\t", ",", "|"):
        cells = {cell.strip(" \"'\r") for cell in first.split(delimiter)}
        if len(cells) > 1 and cells & {*PATH_FIELDS}:
            return delimiter
    return usual


def _is_header(cells: list[str]) -> bool:
    return "." not in cells[0] and "/" not in cells[0] and "\\" not in cells[0]


def _of_lines(text: str, where: str) -> Iterator[Record]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield Record({"path": line.strip()}, f"{where}:{number}")


def _of_jsonl(text: str, where: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise IndexBuildError(f"`images`: {where}:{number} is not valid JSON ({error})") from error
        yield _record(value, f"{where}:{number}")


def _of_json(text: str, where: str) -> Iterator[Record]:
    """A list of objects, an object {path: caption}, or one as of COCO's captions; else lines."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        yield from _of_jsonl(text, where)
        return
    if isinstance(whole, Mapping):
        whole = _of_object(whole)
    for number, value in enumerate(whole if isinstance(whole, list) else [whole]):
        yield _record(value, f"{where}[{number}]")


def _of_object(whole: Mapping) -> list[Mapping]:
    if any(name in whole for name in PATH_FIELDS) and not isinstance(whole.get("images"), list):
        return [whole]
    images, annotations = whole.get("images"), whole.get("annotations")
    if not isinstance(images, list):
        return [
            {**value, "path": path} if isinstance(value, Mapping) else {"path": path, "caption": value}
            for path, value in whole.items()
        ]
    captions: dict[Any, list[Any]] = {}
    for annotation in annotations if isinstance(annotations, list) else []:
        if isinstance(annotation, Mapping) and isinstance(annotation.get("caption"), str):
            captions.setdefault(annotation.get("image_id"), []).append(annotation["caption"])
    return [
        {**image, "caption": captions.get(image.get("id"))} if isinstance(image, Mapping) else image
        for image in images
    ]


def _record(value: Any, where: str) -> Record:
    if isinstance(value, str):
        return Record({"path": value}, where)
    if not isinstance(value, Mapping):
        raise IndexBuildError(f"`images`: {where} must be an object with a path, got {type(value).__name__}")
    return Record({str(key).lower(): inner for key, inner in value.items()}, where)


def record_of(content: bytes, where: str) -> Record | None:
    """The object in a JSON file beside a picture, None where it holds none."""
    try:
        value = json.loads(decode_text(content)[0])
    except (ValueError, RecursionError):
        return None
    return _record(value, where) if isinstance(value, Mapping) else None


def caption_in(record: Record, field: str | None) -> Any:
    """The caption of a row: of the named field, or of the first of the usual ones that holds text."""
    if field is not None:
        value = record.values.get(field.lower())
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    given = record.first(CAPTION_FIELDS, str, bytes, list)
    texts = given if isinstance(given, list) else [given]
    return given if all(text is None or isinstance(text, (str, bytes)) for text in texts) else None

"""Captions of training images: a list, a dict, JSON, JSONL, a Parquet column, a file beside each image."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amg.index.errors import IndexBuildError
from amg.index.notes import Note
from amg.index.sources.open import root_of
from amg.index.sources.records import Record, caption_in, read_records
from amg.index.sources.source import CAPTION_FIELDS, PATH_FIELDS, ImageSource, TrainingImage
from amg.index.text import NOT_UTF8, Caption, decode_text, encoding_of, make_caption

CAPTION_FILES = (".jsonl", ".json", ".csv", ".tsv")
NAME = "file or id"  # the key of a dict
KEYS = {"file": str, "id": str, "index": int}  # of a JSONL line; the first that fits the images is taken


@dataclass(frozen=True)
class Captions:
    """Captions by position ("index"), id ("id"), path ("file") or either of these two; none: the image's own.

    tables: a table for every key that all captions have, the preferred one first; settle() says which is
    used. folder: what paths may start with, beside their part within the folder of images.
    """

    tables: dict[str, dict[Any, Caption]]
    identity: str
    folder: str | None = None
    key: str | None = None

    def settle(self, source: ImageSource, ids: Sequence[str] | None) -> Captions:
        """These captions by the first key that has the first image: others may be somebody else's numbers."""
        first = source.first() if len(self.tables) > 1 else None
        fitting = list(self.tables)
        if first is not None:
            image_id = ids[0] if ids else first.id
            fitting = [key for key in self.tables if self._find(key, first, image_id)] or fitting
        return dataclasses.replace(self, key=fitting[0] if fitting else None)

    def of(self, image: TrainingImage, image_id: str) -> Caption:
        """The caption of an image. Raises IndexBuildError when a given caption set has none for it."""
        if self.key is None:
            return image.caption
        for key in self.tables:
            found = self._find(key, image, image_id)
            if key == self.key:
                break
            if found is not None:  # a preferred key that missed the first image has this one
                raise IndexBuildError(
                    f"`captions` are keyed by {key!r} for {image.source} and by {self.key!r} for the first "
                    f"image: give every line its {key!r}, or leave that out of all"
                )
        if found is None:
            name = {"index": image.position, "file": image.source}.get(self.key, image_id)
            raise IndexBuildError(
                f"`captions` do not match `images`: none for {self.key} {name!r} "
                f"({len(self.tables[self.key])} captions in all)"
            )
        return found

    def _find(self, key: str, image: TrainingImage, image_id: str) -> Caption | None:
        names: list[Any] = [image.position] if key == "index" else []
        names += [image_id] if key in ("id", NAME) else []
        if key in ("file", NAME):
            names.append(image.source)
            if self.folder is not None:
                names += [f"{top}/{image.source}" for top in (self.folder, os.path.abspath(self.folder))]
        table = self.tables[key]
        found = next((table[name] for name in names if name in table), None)
        if found is not None or key not in ("file", NAME):
            return found
        plain = (self._plain_paths[key].get(os.path.normpath(name)) for name in names)
        return next((table[name] for name in plain if name is not None), None)

    @functools.cached_property
    def _plain_paths(self) -> dict[str, dict[str, str]]:
        """Of each table with paths, its keys by what they are without `.`, `..` and doubled slashes."""
        tables = {key: table for key, table in self.tables.items() if key in ("file", NAME)}
        return {key: {os.path.normpath(name): name for name in table} for key, table in tables.items()}

    def check_total(self, total: int) -> None:
        """As many captions as images. Raises IndexBuildError."""
        if self.key is not None and len(self.tables[self.key]) != total:
            raise IndexBuildError(
                f"`captions` do not match `images`: {len(self.tables[self.key])} captions for {total} images"
            )


def caption_column(images: Any, captions: Any) -> str | None:
    """The column, field or key that `captions` names, None where it is no str, a JSON or JSONL path or
    absent."""
    named = isinstance(captions, str) and not captions.endswith(CAPTION_FILES)
    return captions if named and not Path(captions).is_file() else None


def read_captions(captions: Any, images: Any = None) -> Captions:
    """Captions out of None, a list, a dict, or a JSON or JSONL path, for `images`. Raises IndexBuildError.

    Each caption is what text.make_caption() takes. A dict, or a .json file that holds one, is keyed by path
    or id.
    """
    folder = root_of(images)
    if captions is None:
        return Captions({}, "own")
    if isinstance(captions, (str, os.PathLike)):
        return _read_file(Path(captions), folder)
    if isinstance(captions, Mapping):
        return _from_mapping(captions, "`captions`", folder)
    if not isinstance(captions, Sequence) or isinstance(captions, (bytes, bytearray)):
        raise IndexBuildError(
            "`captions` must be a list of str, a dict of them, a JSON or JSONL path, a Parquet column name "
            f"or None, got {type(captions).__name__}"
        )
    table = {at: make_caption(value, f"`captions`[{at}]") for at, value in enumerate(captions)}
    digest = _digest([caption.text for caption in table.values()])
    return Captions({"index": table}, f"list {digest}", key="index")


def _digest(texts: Any) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _from_mapping(captions: Mapping, where: str, folder: str | None, whole: bool = True) -> Captions:
    table: dict[Any, Caption] = {}
    for name, value in captions.items():
        if not isinstance(name, (str, os.PathLike)):
            raise IndexBuildError(f"{where} must have file paths or ids as keys, got {name!r}")
        name = os.fspath(name)
        table[name] = _check_bytes(make_caption(value, f"{where}[{name!r}]"), f"{where}[{name!r}]", whole)
    if not table:
        raise IndexBuildError(f"{where} is empty")
    digest = _digest(sorted((name, caption.text) for name, caption in table.items()))
    return Captions({NAME: table}, f"dict {digest}", folder, NAME)


def _check_bytes(caption: Caption, where: str, whole: bool) -> Caption:
    """The caption, noted where its file was not wholly UTF-8 and it holds what stands for bad bytes."""
    if whole or caption.text is None or "\ufffd" not in caption.text:
        return caption
    return caption._replace(notes=(Note(NOT_UTF8, where), *caption.notes))


def _read_file(path: Path, folder: str | None) -> Captions:
    if not path.is_file():
        raise IndexBuildError(f"`captions` is a path that does not exist: {path}")
    if path.suffix.lower() == ".json":
        text, whole = decode_text(path.read_bytes())
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            record = None  # lines, perhaps
        if isinstance(record, dict) and "caption" not in record:
            return _from_mapping(record, f"`captions`: {path}", folder, whole)
    if path.suffix.lower() in (".csv", ".tsv"):
        return _read_cells(path, folder)
    return _read_lines(path, folder)


def _read_cells(path: Path, folder: str | None) -> Captions:
    """Captions out of a CSV or TSV file with a column of paths or ids."""
    content = path.read_bytes()
    _, whole = decode_text(content)
    table: dict[str, Any] = {}
    for record in _rows(content, path):
        name = record.first((*PATH_FIELDS, "id"), str)
        if name is None or not any(key in record.values for key in CAPTION_FIELDS):
            raise IndexBuildError(
                f"`captions`: {record.where} must have a path or id and a caption, its columns are "
                f"{', '.join(record.values)}"
            )
        if name in table:
            raise IndexBuildError(f"`captions`: {record.where} repeats {name!r}")
        table[name] = caption_in(record, None)
    return _from_mapping(table, f"`captions`: {path}", folder, whole)


def _rows(content: bytes, path: Path) -> Iterator[Record]:
    try:
        yield from read_records(content, path.name, str(path))
    except IndexBuildError as error:
        raise IndexBuildError(str(error).replace("`images`", "`captions`", 1)) from error


def _read_lines(path: Path, folder: str | None) -> Captions:
    """Lines {"file" | "id" | "index": …, "caption": …}; of several keys those count that all lines have."""
    tables: dict[str, dict[Any, Caption]] | None = None
    digest, fault = hashlib.sha256(), ""
    for number, line, whole in _lines(path):
        digest.update(line.encode())
        where = f"{path}:{number}"
        names, caption = _parse_line(line, where)
        caption = _check_bytes(caption, f"{path}:{number}", whole)
        if tables is None:
            tables = {key: {} for key in names}
        for key in list(tables):
            if key not in names:
                fault = f"is keyed by {next(iter(names))!r}, earlier lines by {key!r}"
                del tables[key]
            elif names[key] in tables[key]:
                fault = f"repeats {key} {names[key]!r}"
                del tables[key]
            else:
                tables[key][names[key]] = caption
        if not tables:
            raise IndexBuildError(f"`captions`: {where} {fault}")
    if not tables:
        raise IndexBuildError(f"`captions`: {path} is empty")
    return Captions(tables, f"jsonl {digest.hexdigest()}", folder, next(iter(tables)))


def _lines(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Lines that are not blank, by number; False where bytes that mean nothing may have been replaced."""
    with open(path, "rb") as file:
        encoding = encoding_of(file.read(1 << 12))
    with open(path, encoding=encoding, errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix("\ufeff") if number == 1 else line
            if line.strip():
                yield number, line, "\ufffd" not in line


def _parse_line(line: str, where: str) -> tuple[dict[str, Any], Caption]:
    """The keys a line has, preferred ones first, and its caption."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise IndexBuildError(f"`captions`: {where} is not valid JSON ({error})") from error
    keys = [key for key in KEYS if isinstance(record, dict) and key in record]
    if not keys or "caption" not in record:
        raise IndexBuildError(f'`captions`: {where} must be {{"file" | "id" | "index": …, "caption": …}}')
    names = {
        key: record[key]
        for key in keys
        if isinstance(record[key], KEYS[key]) and not isinstance(record[key], bool)
    }
    if not names:
        raise IndexBuildError(
            f"`captions`: {where} has a key of the wrong type: {line.strip()[:80]} "
            "(file and id are strings, index is a number)"
        )
    try:
        return names, make_caption(record["caption"], where)
    except IndexBuildError as error:
        raise IndexBuildError(f"`captions`: {error}") from error

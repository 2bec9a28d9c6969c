"""Training images from wherever they lie, one at a time and in a fixed order."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from amg.index.columns import check_caption_column, image_column, open_table, read_group
from amg.index.decode import (
    RASTER_FORMATS,
    Picture,
    UnreadableImage,
    decode_image,
    import_pil,
    to_picture,
)
from amg.index.errors import IndexBuildError
from amg.index.listing import Found, Listing, list_folder
from amg.index.notes import Tally
from amg.index.text import Caption, make_caption, plain_name, read_sidecar

ACCEPTED = (
    "a folder of images, a Parquet file or a folder of them, an iterable of PIL images, "
    "a uint8 tensor [N, 3, H, W] or a float tensor [N, 3, H, W] in [0, 1]"
)


@dataclass(frozen=True)
class TrainingImage:
    """One image of the training set. load() gives its Picture or raises UnreadableImage."""

    position: int
    id: str
    source: str
    caption: Caption
    load: Callable[[], Picture]


class ImageSource(Protocol):
    """Images in a fixed order; length: None when only reading tells; identity: compared on resume.

    identity_tells: whether any change shows in it; else a resumed build compares every
    image it has seen. passed_over: what lies among the images and is none, by reason. first(): the first
    image, not loaded, to see what it is called; unlike read() it draws nothing from an iterator.
    """

    length: int | None
    identity: str
    identity_tells: bool
    passed_over: Tally

    def first(self) -> TrainingImage | None: ...

    def read(self, start: int) -> Iterator[TrainingImage]: ...


def open_source(
    images: Any, caption_column: str | None = None, background: str | None = "white"
) -> ImageSource:
    """The source for whatever `images` is. Raises IndexBuildError when it is nothing we read.

    background: what transparent pictures are composited over (decode.check_background), None: alpha is
    dropped, as in an index whose manifest names none.
    """
    if isinstance(images, (str, os.PathLike)):
        if not isinstance(os.fspath(images), str) or not os.fspath(images):
            raise IndexBuildError(f"`images` must be {ACCEPTED}, got the path {images!r}")
        return _open_path(Path(images), caption_column, background)
    if caption_column is not None:
        raise IndexBuildError(
            f"`captions` names a Parquet column ({caption_column!r}) but `images` is no Parquet"
        )
    if isinstance(images, torch.Tensor):
        return TensorSource(images)
    if isinstance(images, (bytes, dict)) or not isinstance(images, Iterable) or hasattr(images, "__array__"):
        raise IndexBuildError(f"`images` must be {ACCEPTED}, got {type(images).__name__}")
    return IterableSource(images, background)


def _open_path(path: Path, caption_column: str | None, background: str | None) -> ImageSource:
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise IndexBuildError(f"`images` must be {ACCEPTED}, got the file {path}")
        info = path.stat()
        alone = [Found(path.name, info.st_size, None, info.st_mtime_ns)]
        return ParquetSource(path.parent, alone, caption_column, background)
    if not path.is_dir():
        raise IndexBuildError(f"`images` is a path that does not exist: {path}")
    listing = list_folder(path)
    pictures, tables, passed_over, _ = listing
    if pictures and tables:
        raise IndexBuildError(
            f"`images` is ambiguous: {path} holds {len(pictures)} image files and {len(tables)} Parquet files"
        )
    if tables:
        return ParquetSource(path, tables, caption_column, background, passed_over)
    if caption_column is not None:
        raise IndexBuildError(
            f"`captions` names a Parquet column ({caption_column!r}) but {path} holds no Parquet"
        )
    if not pictures:
        rest = "; ".join(f"{what}: {count}" for what, count in passed_over.counts.items()) or "nothing"
        raise IndexBuildError(
            f"`images` is a folder without images: {path} (formats read: {' '.join(RASTER_FORMATS)}; "
            f"it holds {rest})"
        )
    return FolderSource(path, listing, background)


class FolderSource:
    """Pictures under a folder, in path order; `name.png.txt` or `name.txt` is the caption of `name.png`."""

    identity_tells = True

    def __init__(self, folder: Path, listing: Listing, background: str | None):
        self.folder, self.files, self.background = folder, listing.pictures, background
        self.length: int | None = len(self.files)
        self.passed_over = listing.passed_over
        self.captions = listing.captions
        texts = (self.captions.get(file.name) for file in self.files)
        self.identity = _identity("folder", self.files + [text for text in texts if text is not None])

    def first(self) -> TrainingImage:
        return self._image(0)

    def read(self, start: int) -> Iterator[TrainingImage]:
        for position in range(start, len(self.files)):
            yield self._image(position)

    def _image(self, position: int) -> TrainingImage:
        file = self.files[position]
        name = plain_name(file.name)
        load = functools.partial(_decode_file, self.folder / file.name, file.fault, self.background)
        return TrainingImage(position, name, name, self._caption(file.name), load)

    def _caption(self, name: str) -> Caption:
        text = self.captions.get(name)
        if text is None:
            return Caption()
        return read_sidecar(self.folder / text.name, self.folder, plain_name(text.name))


def _identity(kind: str, files: list[Found]) -> str:
    listing = "\n".join(f"{file.name}\0{file.size} {file.written}" for file in files)
    return f"{kind} {hashlib.sha256(os.fsencode(listing)).hexdigest()}"


def _decode_file(file: Path, fault: str | None, background: str | None) -> Picture:
    if fault is not None:
        raise UnreadableImage(fault)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from error
    return decode_image(content, file.name, background)


class TensorSource:
    """A uint8 or float tensor [N, 3, H, W]."""

    identity_tells = False

    def __init__(self, images: torch.Tensor):
        if images.layout != torch.strided or images.is_meta:
            kind = "the meta device" if images.is_meta else images.layout
            raise IndexBuildError(f"`images` must be a dense tensor with values, got one of {kind}")
        if (
            images.ndim != 4
            or images.shape[1] != 3
            or not (images.dtype == torch.uint8 or images.is_floating_point())
        ):
            raise IndexBuildError(
                "`images` must be uint8 [N, 3, H, W] or float [N, 3, H, W] in [0, 1], "
                f"got {list(images.shape)} {images.dtype}"
            )
        if 0 in images.shape:
            raise IndexBuildError(f"`images` is empty: {list(images.shape)}")
        self.images = images.detach()
        self.length: int | None = len(images)
        self.identity = f"tensor {list(images.shape)} {images.dtype}, every image compared"
        self.passed_over = Tally()

    def first(self) -> TrainingImage:
        return self._image(0)

    def read(self, start: int) -> Iterator[TrainingImage]:
        for position in range(start, len(self.images)):
            yield self._image(position)

    def _image(self, position: int) -> TrainingImage:
        load = functools.partial(self._load, position)
        return TrainingImage(position, str(position), f"tensor#{position}", Caption(), load)

    def _load(self, position: int) -> Picture:
        image = self.images[position].cpu()
        if image.dtype == torch.uint8:
            return Picture(image)
        image = image.float()
        low, high = image.aminmax()
        if not (low >= 0 and high <= 1):  # also refuses NaN
            raise IndexBuildError(
                f"`images` must be in [0, 1], image {position} has {low.item():g} to {high.item():g}"
            )
        return Picture(image)


class IterableSource:
    """An iterable of PIL images; a resumed build draws and compares and drops those it has already seen."""

    identity_tells = False

    def __init__(self, images: Iterable[Any], background: str | None):
        self.images, self.background = images, background
        self.length: int | None = len(images) if isinstance(images, Sized) else None
        if self.length == 0:
            raise IndexBuildError("`images` is empty")
        self.identity = f"iterable {self.length}, every image compared"
        self.passed_over = Tally()

    def first(self) -> TrainingImage:
        return self._image(0, None)

    def read(self, start: int) -> Iterator[TrainingImage]:
        image_class = import_pil().Image
        for position, picture in enumerate(self.images):
            if not isinstance(picture, image_class):
                raise IndexBuildError(
                    f"`images` must be {ACCEPTED}; item {position} is a {type(picture).__name__}"
                )
            if position >= start:
                yield self._image(position, picture)

    def _image(self, position: int, picture: Any) -> TrainingImage:
        load = functools.partial(to_picture, picture, self.background)
        return TrainingImage(position, str(position), f"iterable#{position}", Caption(), load)


class ParquetSource:
    """Rows of Parquet files with encoded images: a struct column {bytes, path} or a binary column."""

    identity_tells = True

    def __init__(
        self,
        folder: Path,
        found: list[Found],
        caption_column: str | None,
        background: str | None,
        passed_over: Tally | None = None,
    ):
        files = [folder / file.name for file in found]
        self.names, self.caption_column, self.background = found, caption_column, background
        self.passed_over = passed_over or Tally()
        self.tables = [open_table(file) for file in files]
        self.columns = [image_column(table, file) for table, file in zip(self.tables, files, strict=True)]
        for table, file, column in zip(self.tables, files, self.columns, strict=True):
            if caption_column is not None:
                check_caption_column(table, file, caption_column, column)
        self.length: int | None = sum(table.metadata.num_rows for table in self.tables)
        if self.length == 0:
            raise IndexBuildError(f"`images` is empty: no rows in {', '.join(map(str, files))}")
        self.identity = _identity("parquet", found)

    def first(self) -> TrainingImage | None:
        return next(self.read(0), None)

    def read(self, start: int) -> Iterator[TrainingImage]:
        position = 0
        for file, table, column in zip(self.names, self.tables, self.columns, strict=True):
            name, row = plain_name(file.name), 0
            for group in range(table.num_row_groups):
                size = table.metadata.row_group(group).num_rows
                if position + size > start:
                    skip = max(start - position, 0)
                    for offset, record in read_group(table, group, column, self.caption_column, skip):
                        where = f"{name}#{row + offset}"
                        yield self._image(position + offset, where, record[column], record)
                position, row = position + size, row + size

    def _image(self, position: int, source: str, cell: Any, record: dict) -> TrainingImage:
        content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        name = plain_name(path) if path else source
        caption = Caption()
        if self.caption_column is not None:
            value = record[self.caption_column]
            caption = make_caption(str(value) if isinstance(value, int) else value, source)
        load = functools.partial(_decode_cell, content, name, self.background)
        return TrainingImage(position, name, source, caption, load)


def _decode_cell(content: bytes | None, name: str, background: str | None) -> Picture:
    if not content:
        raise UnreadableImage("no image bytes in this row")
    return decode_image(content, name, background)

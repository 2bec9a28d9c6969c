"""Training images from wherever they lie, one at a time and in a fixed order."""

from __future__ import annotations

import functools
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from amg.index.errors import IndexBuildError
from amg.index.store import import_parquet

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
ACCEPTED = (
    "a folder of images, a Parquet file or a folder of them, an iterable of PIL images, "
    "a uint8 tensor [N, 3, H, W] or a float tensor [N, 3, H, W] in [0, 1]"
)


class UnreadableImage(ValueError):
    """One image cannot be decoded; the build skips it or stops, as its `on_error` says."""


@dataclass(frozen=True)
class TrainingImage:
    """One image of the training set. load() gives [3, H, W], uint8 or float32 in [0, 1]."""

    position: int
    id: str
    source: str
    caption: str | None
    load: Callable[[], torch.Tensor]


class ImageSource(Protocol):
    """Images in a fixed order; length: None when only reading tells; identity: compared on resume."""

    length: int | None
    identity: str

    def read(self, start: int) -> Iterator[TrainingImage]: ...


def open_source(images: Any, caption_column: str | None = None) -> ImageSource:
    """The source for whatever `images` is. Raises IndexBuildError when it is nothing we read."""
    if isinstance(images, (str, os.PathLike)):
        return _open_path(Path(images), caption_column)
    if caption_column is not None:
        raise IndexBuildError(
            f"`captions` names a Parquet column ({caption_column!r}) but `images` is no Parquet"
        )
    if isinstance(images, torch.Tensor):
        return TensorSource(images)
    if isinstance(images, (bytes, dict)) or not isinstance(images, Iterable) or hasattr(images, "__array__"):
        raise IndexBuildError(f"`images` must be {ACCEPTED}, got {type(images).__name__}")
    return IterableSource(images)


def _open_path(path: Path, caption_column: str | None) -> ImageSource:
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise IndexBuildError(f"`images` must be {ACCEPTED}, got the file {path}")
        return ParquetSource(path.parent, [path], caption_column)
    if not path.is_dir():
        raise IndexBuildError(f"`images` is a path that does not exist: {path}")
    pictures, tables = _list_files(path)
    if pictures and tables:
        raise IndexBuildError(
            f"`images` is ambiguous: {path} holds {len(pictures)} image files and {len(tables)} Parquet files"
        )
    if tables:
        return ParquetSource(path, tables, caption_column)
    if caption_column is not None:
        raise IndexBuildError(
            f"`captions` names a Parquet column ({caption_column!r}) but {path} holds no Parquet"
        )
    if not pictures:
        raise IndexBuildError(
            f"`images` is a folder without images: {path} (looked for {' '.join(IMAGE_SUFFIXES)})"
        )
    return FolderSource(path, pictures)


def _list_files(folder: Path) -> tuple[list[Path], list[Path]]:
    pictures, tables = [], []
    for directory, children, names in os.walk(folder):
        children[:] = sorted(name for name in children if not name.startswith("."))
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if suffix in IMAGE_SUFFIXES:
                pictures.append(Path(directory, name))
            elif suffix == ".parquet":
                tables.append(Path(directory, name))
    return sorted(pictures), sorted(tables)


def decode_image(content: bytes) -> torch.Tensor:
    """Encoded image bytes → uint8 [3, H, W]. Raises UnreadableImage."""
    image_module = import_pil()
    try:
        with image_module.open(io.BytesIO(content)) as picture:
            return pil_to_tensor(picture)
    except UnreadableImage:
        raise
    except image_module.UnidentifiedImageError as error:
        raise UnreadableImage("not an image that Pillow can identify") from error
    except Exception as error:  # PIL and its codecs raise many types on damaged files
        raise UnreadableImage(str(error) or type(error).__name__) from error


def pil_to_tensor(picture: Any) -> torch.Tensor:
    """A PIL image of any mode → uint8 RGB [3, H, W]: turned as its EXIF says, alpha dropped, 16 bits to 8."""
    import numpy as np

    picture = upright(picture)
    if picture.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        depth = np.asarray(picture).astype(np.int64)
        if depth.min() < 0 or depth.max() > 65535:
            raise UnreadableImage(f"mode {picture.mode} with values outside 16 bits")
        grey = torch.from_numpy((depth >> 8).astype(np.uint8))
        return grey.expand(3, *grey.shape).contiguous()
    if picture.mode == "F":
        raise UnreadableImage("mode F (float pixels) has no known range")
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def upright(picture: Any) -> Any:
    """The picture as viewers show it: turned by its EXIF orientation, if it has a legible one."""
    import PIL.ExifTags
    import PIL.ImageOps

    try:
        orientation = picture.getexif().get(PIL.ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF, of which PIL raises many types; damaged pixels show when they are read
        return picture
    return picture if orientation == 1 else PIL.ImageOps.exif_transpose(picture)


def import_pil() -> Any:
    """PIL.Image, or an error that names the extra to install."""
    try:
        import PIL.Image
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install 'amg[index]'") from error
    return PIL.Image


class FolderSource:
    """Image files under a folder, in path order; `name.txt` beside `name.png` is its caption."""

    def __init__(self, folder: Path, files: list[Path]):
        self.folder, self.files = folder, files
        self.length: int | None = len(files)
        listing = "\n".join(f"{file.relative_to(folder).as_posix()} {file.stat().st_size}" for file in files)
        self.identity = "folder " + hashlib.sha256(listing.encode()).hexdigest()

    def read(self, start: int) -> Iterator[TrainingImage]:
        for position in range(start, len(self.files)):
            file = self.files[position]
            name = file.relative_to(self.folder).as_posix()
            yield TrainingImage(position, name, name, _sidecar(file), functools.partial(_decode_file, file))


def _decode_file(file: Path) -> torch.Tensor:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UnreadableImage(str(error)) from error
    return decode_image(content)


def _sidecar(file: Path) -> str | None:
    text = file.with_suffix(".txt")
    if not text.is_file():
        return None
    try:
        return text.read_text(encoding="utf-8").strip() or None
    except UnicodeDecodeError as error:
        raise IndexBuildError(f"caption file {text} is not UTF-8 ({error})") from error


class TensorSource:
    """A uint8 or float tensor [N, 3, H, W]."""

    def __init__(self, images: torch.Tensor):
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
        self.identity = f"tensor {list(images.shape)} {images.dtype}"

    def read(self, start: int) -> Iterator[TrainingImage]:
        for position in range(start, len(self.images)):
            yield TrainingImage(
                position, str(position), f"tensor#{position}", None, functools.partial(self._load, position)
            )

    def _load(self, position: int) -> torch.Tensor:
        image = self.images[position].cpu()
        if image.dtype == torch.uint8:
            return image
        image = image.float()
        low, high = image.aminmax()
        if not (low >= 0 and high <= 1):  # also refuses NaN
            raise IndexBuildError(
                f"`images` must be in [0, 1], image {position} has {low.item():g} to {high.item():g}"
            )
        return image


class IterableSource:
    """An iterable of PIL images; a resumed build draws and drops those it has already seen."""

    def __init__(self, images: Iterable[Any]):
        self.images = images
        self.length: int | None = len(images) if isinstance(images, Sized) else None
        if self.length == 0:
            raise IndexBuildError("`images` is empty")
        self.identity = f"iterable {self.length}"

    def read(self, start: int) -> Iterator[TrainingImage]:
        image_class = import_pil().Image
        for position, picture in enumerate(self.images):
            if not isinstance(picture, image_class):
                raise IndexBuildError(
                    f"`images` must be {ACCEPTED}; item {position} is a {type(picture).__name__}"
                )
            if position >= start:
                yield TrainingImage(
                    position,
                    str(position),
                    f"iterable#{position}",
                    None,
                    functools.partial(_load_pil, picture),
                )


def _load_pil(picture: Any) -> torch.Tensor:
    try:
        return pil_to_tensor(picture)
    except OSError as error:  # PIL decodes lazily: a truncated file shows here
        raise UnreadableImage(str(error)) from error


class ParquetSource:
    """Rows of Parquet files with encoded images: a struct column {bytes, path} or a binary column."""

    def __init__(self, folder: Path, files: list[Path], caption_column: str | None):
        self.folder, self.files, self.caption_column = folder, files, caption_column
        self.tables = [_open_table(file) for file in files]
        self.columns = [_image_column(table, file) for table, file in zip(self.tables, files, strict=True)]
        for table, file in zip(self.tables, files, strict=True):
            if caption_column is not None and caption_column not in table.schema_arrow.names:
                raise IndexBuildError(
                    f"`captions` names column {caption_column!r}; {file} has {table.schema_arrow.names}"
                )
        self.length: int | None = sum(table.metadata.num_rows for table in self.tables)
        if self.length == 0:
            raise IndexBuildError(f"`images` is empty: no rows in {', '.join(map(str, files))}")
        listing = "\n".join(f"{file.relative_to(folder).as_posix()} {file.stat().st_size}" for file in files)
        self.identity = "parquet " + hashlib.sha256(listing.encode()).hexdigest()

    def read(self, start: int) -> Iterator[TrainingImage]:
        position = 0
        for file, table, column in zip(self.files, self.tables, self.columns, strict=True):
            name, row = file.relative_to(self.folder).as_posix(), 0
            for group in range(table.num_row_groups):
                size = table.metadata.row_group(group).num_rows
                if position + size > start:
                    skip = max(start - position, 0)
                    for offset, record in _read_group(table, group, column, self.caption_column, skip):
                        yield _parquet_image(
                            position + offset, f"{name}#{row + offset}", record, column, self.caption_column
                        )
                position, row = position + size, row + size


def _open_table(file: Path) -> Any:
    parquet = import_parquet()
    try:
        return parquet.ParquetFile(file)
    except Exception as error:  # pyarrow raises many types on damaged files
        raise IndexBuildError(f"`images`: {file} cannot be read as Parquet ({error})") from error


def _image_column(table: Any, file: Path) -> str:
    import pyarrow

    def holds_bytes(kind: Any) -> bool:
        if pyarrow.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)

    found = [field.name for field in table.schema_arrow if holds_bytes(field.type)]
    named = [
        name for name in found if name.lower() in ("image", "img", "images", "png", "jpg", "jpeg", "webp")
    ]
    choice = named if len(named) == 1 else found
    if len(choice) != 1:
        fault = "several image columns" if found else "no image column"
        raise IndexBuildError(
            f"`images`: {file} has {fault} among {table.schema_arrow.names}; "
            "one struct {bytes, path} or binary column is expected"
        )
    return choice[0]


def _read_group(
    table: Any, group: int, column: str, caption_column: str | None, skip: int
) -> Iterator[tuple[int, dict]]:
    columns = [column] if caption_column is None else [column, caption_column]
    offset = 0
    for batch in table.iter_batches(batch_size=64, row_groups=[group], columns=columns):
        first = min(max(skip - offset, 0), batch.num_rows)
        yield from enumerate(batch.slice(first).to_pylist(), start=offset + first)
        offset += batch.num_rows


def _parquet_image(
    position: int, source: str, record: dict, column: str, caption_column: str | None
) -> TrainingImage:
    cell = record[column]
    content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    caption = None if caption_column is None else record[caption_column]

    def load() -> torch.Tensor:
        if not content:
            raise UnreadableImage("no image bytes in this row")
        return decode_image(content)

    return TrainingImage(position, path or source, source, None if caption is None else str(caption), load)

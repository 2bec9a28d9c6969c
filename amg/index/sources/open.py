"""Which kind of source something is."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import Any

import torch

from amg.index.errors import IndexBuildError
from amg.index.sources.columns import Table, image_columns, open_table, text_columns
from amg.index.sources.directory import open_folder
from amg.index.sources.items import ItemSource
from amg.index.sources.listing import PICTURE, SIGNATURE_BYTES, TABLES, look
from amg.index.sources.lists import open_files, open_list
from amg.index.sources.records import LISTS
from amg.index.sources.several import Joined
from amg.index.sources.source import PATH_FIELDS, Decoding, Fields, ImageSource, found
from amg.index.sources.table import TableSource, is_status_table
from amg.index.sources.tape import is_tar
from amg.index.sources.tar import Archive, TarSource, expand_braces
from amg.index.sources.tensor import ArraySource, TensorSource, open_array
from amg.index.text import plain_name

ACCEPTED = (
    "a folder of images, tar or Parquet files, a tar (also `{000..009}.tar`), Parquet, Arrow or .npy file, a "
    "JSONL or CSV list of paths, a list of these, a dataset or an iterable of images, a uint8 tensor "
    "[N, 3, H, W] or a float tensor [N, 3, H, W] in [0, 1], or a uint8 array [N, H, W, 3]"
)


def open_source(
    images: Any,
    caption_column: str | None = None,
    background: str | None = "white",
    *,
    image_column: str | None = None,
    least: int | None = None,
) -> ImageSource:
    """The source for whatever `images` is. Raises IndexBuildError when it is nothing we read.

    caption_column, image_column: which columns, keys or fields hold them, where the usual names do not tell.
    background: what transparent pictures are composited over (decode.check_background), None: alpha is
    dropped, as in an index whose manifest names none. least: pixels a side that are enough, see
    decode.decode_image.
    """
    decoding, fields = Decoding(background, least), Fields(caption_column, image_column)
    if is_path(images):
        return _open_path(_checked(images), decoding, fields)
    if isinstance(images, (list, tuple)) and images and all(map(is_path, images)):
        return _open_several([_checked(path) for path in images], decoding, fields)
    if hasattr(images, "iloc") and hasattr(images, "to_dict"):  # a DataFrame, of which only its names iterate
        images = images.to_dict("records")
    splits = _splits(images)
    if splits is not None:
        parts = [ItemSource(split, decoding, fields) for split in splits.values()]
        return Joined(parts, [str(name) for name in splits])
    if isinstance(images, torch.Tensor) or _is_array(images):
        if caption_column is not None:
            raise IndexBuildError(
                f"`captions` names a Parquet column ({caption_column!r}) but `images` is no Parquet"
            )
        return TensorSource(images) if isinstance(images, torch.Tensor) else ArraySource(images)
    numbered = hasattr(images, "__getitem__") and isinstance(images, Sized)
    if isinstance(images, (bytes, Mapping)) or not (isinstance(images, Iterable) or numbered):
        raise IndexBuildError(f"`images` must be {ACCEPTED}, got {type(images).__name__}")
    return ItemSource(images, decoding, fields)


def is_path(images: Any) -> bool:
    return isinstance(images, (str, os.PathLike))


def root_of(images: Any) -> str | None:
    """The folder that the names of images start below, None for what is no path."""
    paths = list(images) if isinstance(images, (list, tuple)) else [images]
    if not paths or not all(map(is_path, paths)):
        return None
    roots = [_root(os.fspath(path)) for path in paths]
    if len({os.path.isabs(root) for root in roots}) > 1:
        roots = [os.path.abspath(root) for root in roots]
    return roots[0] if len(roots) == 1 else os.path.commonpath(roots)


def _root(path: str) -> str:
    """A folder itself, a file's folder."""
    return path.rstrip("/") or "/" if os.path.isdir(path) else os.path.dirname(path) or "."


def _is_array(images: Any) -> bool:
    return hasattr(images, "__array__") and hasattr(images, "shape") and hasattr(images, "dtype")


def _splits(images: Any) -> dict | None:
    """The datasets of a `datasets.DatasetDict`, or of a dict of torch Datasets."""
    if not isinstance(images, dict) or not images:
        return None
    datasets = all(hasattr(part, "column_names") or _is_dataset(part) for part in images.values())
    return images if datasets else None


def _is_dataset(part: Any) -> bool:
    return isinstance(part, torch.utils.data.Dataset)


def _checked(path: Any) -> Path:
    if not isinstance(os.fspath(path), str) or not os.fspath(path):
        raise IndexBuildError(f"`images` must be {ACCEPTED}, got the path {path!r}")
    return Path(path)


def _open_several(paths: list[Path], decoding: Decoding, fields: Fields) -> ImageSource:
    """The sources of several paths, each with the way to it from their common folder before its names."""
    top = root_of(paths) or ""
    seen: set[str] = set()
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            raise IndexBuildError(f"`images` names {path} twice")
        seen.add(real)
    parts: list[ImageSource] = []
    labels: list[str] = []
    for alone, group in itertools.groupby(paths, lambda path: path.is_file() and _is_picture(path)):
        if alone:
            files = list(group)
            parts.append(open_files(files, [_way(os.fspath(file), top) for file in files], decoding))
            labels.append("")
            continue
        for path in group:
            parts.append(_open_path(path, decoding, fields))
            labels.append(plain_name(_way(_root(os.fspath(path)), top)))
    return parts[0] if len(parts) == 1 and not labels[0] else Joined(parts, labels)


def _way(path: str, top: str) -> str:
    way = os.path.relpath(os.path.abspath(path), os.path.abspath(top))
    return "" if way == "." else way


def _is_picture(path: Path) -> bool:
    def read() -> bytes:
        with open(path, "rb") as file:
            return file.read(SIGNATURE_BYTES)

    return look(path.name.lower(), read)[0] == PICTURE


def _open_path(path: Path, decoding: Decoding, fields: Fields) -> ImageSource:
    if path.is_dir():
        return open_folder(path, decoding, fields)
    if path.is_file():
        return _open_file(path, decoding, fields)
    expanded = expand_braces(os.fspath(path))
    if glob.has_magic(os.fspath(path)) and (matching := sorted(glob.glob(os.fspath(path), recursive=True))):
        return _open_several([Path(name) for name in matching], decoding, fields)
    if expanded == [os.fspath(path)]:
        raise IndexBuildError(f"`images` is a path that does not exist: {path}")
    lost = [name for name in expanded if not os.path.exists(name)]
    if lost:
        raise IndexBuildError(
            f"`images` is a path that does not exist: {lost[0]} (and {len(lost) - 1} more of the "
            f"{len(expanded)} of {path})"
        )
    return _open_several([Path(name) for name in expanded], decoding, fields)


def _open_file(path: Path, decoding: Decoding, fields: Fields) -> ImageSource:
    suffix = path.suffix.lower()
    alone = [found(path, path.name)]
    if suffix == ".parquet" and _is_list(open_table(path), fields):
        return open_list(path, decoding, fields)
    if suffix in TABLES:
        return TableSource(path.parent, alone, decoding, fields)
    if _is_picture(path):
        return open_files([path], [path.name], decoding)
    if suffix == ".npy":
        return open_array(path)
    if is_tar(path) or suffix == ".tar":
        status = _status_beside(path)
        extra = [found(status.file, status.file.name)] if status is not None else []
        return TarSource([Archive(alone[0], path, status)], extra, decoding, fields)
    if suffix in LISTS:
        return open_list(path, decoding, fields)
    raise IndexBuildError(f"`images` must be {ACCEPTED}, got the file {path}")


def _is_list(table: Table, fields: Fields) -> bool:
    """Whether a table has paths of pictures and no pictures."""
    names = PATH_FIELDS if fields.image is None else (fields.image,)
    return not image_columns(table) and any(text_columns(table, name) for name in names)


def _status_beside(tar: Path) -> Table | None:
    """img2dataset's table of the downloads in an archive, where it lies beside it."""
    file = tar.with_name(tar.name.split(".")[0] + ".parquet")
    if not file.is_file():
        return None
    table = open_table(file)
    return table if is_status_table(table) and not image_columns(table) else None

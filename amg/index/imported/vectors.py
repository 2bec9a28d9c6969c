"""Vectors that somebody else embedded: arrays, .npy files with metadata, columns of Parquet and Arrow."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from amg.index.errors import IndexBuildError
from amg.index.imported.names import Named, named_rows
from amg.index.sources.columns import Table, caption_column, is_list, open_table, readable
from amg.index.sources.open import is_path, root_of
from amg.index.store import import_parquet
from amg.index.text import plain_name

BLOCK = 8192  # vectors that are read and folded at once
VECTOR_COLUMNS = ("embedding", "embeddings", "vector", "vectors", "features", "image_embedding", "emb")
ID_COLUMNS = ("id", "key", "image_path", "file_name", "path", "url", "hash")
TABLES = (".parquet", ".arrow", ".feather")


class Columns(NamedTuple):
    """Names of columns, None for the usual ones: VECTOR_COLUMNS, ID_COLUMNS, CAPTION_FIELDS."""

    vector: str | None = None
    id: str | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Block:
    """Vectors [n, D] fp32, from a position on, what they are called; NaN where there is none, with the reason
    by number."""

    position: int
    vectors: np.ndarray
    named: Named
    reasons: dict[int, str]


class VectorSource(Protocol):
    """`read` gives all of it in blocks of at most BLOCK, the same at every reading. asked_for: the column of
    ids that was named, which have to be distinct."""

    length: int
    dimension: int
    asked_for: str | None

    def read(self) -> Iterator[Block]: ...


class ArraySource:
    """An array or tensor [N, D], with ids and captions as long as it, or none."""

    asked_for: str | None = None

    def __init__(self, vectors: Any, ids: Sequence[str] | None, captions: Sequence[Any] | None):
        self.vectors = vectors.detach().cpu() if isinstance(vectors, torch.Tensor) else vectors
        kind = self.vectors.dtype
        floating = kind.is_floating_point if isinstance(kind, torch.dtype) else kind.kind == "f"
        if self.vectors.ndim != 2 or 0 in self.vectors.shape or not floating:
            got = f"{list(self.vectors.shape)} {kind}"
            raise IndexBuildError(f"`vectors` must be floating [N >= 1, D >= 1], got {got}")
        self.length, self.dimension = int(self.vectors.shape[0]), int(self.vectors.shape[1])
        self.ids, self.captions = ids, captions
        for name, given in (("ids", ids), ("captions", captions)):
            if given is not None and len(given) != self.length:
                raise IndexBuildError(
                    f"`{name}` must be as many as `vectors`, {self.length}, got {len(given)}"
                )

    def read(self) -> Iterator[Block]:
        for start in range(0, self.length, BLOCK):
            some = slice(start, min(start + BLOCK, self.length))
            numbers = [str(number) for number in range(some.start, some.stop)]
            ids = numbers if self.ids is None else [str(one) for one in self.ids[some]]
            captions = None if self.captions is None else self.captions[some]
            yield Block(start, fp32(self.vectors[some]), named_rows(ids, captions, numbers), {})


def fp32(vectors: Any) -> np.ndarray:
    """A block of an array or tensor of any floating type."""
    if isinstance(vectors, torch.Tensor):
        return vectors.float().numpy()
    return np.asarray(vectors, dtype=np.float32)


class FileSource:
    """Files one after the other: .npy arrays, each with a table of ids and captions or none, and tables."""

    def __init__(self, parts: Sequence[NpyPart | TablePart], asked_for: str | None):
        self.parts, self.asked_for = parts, asked_for
        self.length = sum(part.length for part in parts)
        holding = [part for part in parts if part.dimension]
        if not holding:
            raise IndexBuildError(
                f"`vectors`: no vector in {parts[0].file}{' and others' * (len(parts) > 1)}"
            )
        self.dimension = holding[0].dimension
        for part in holding:
            if part.dimension != self.dimension:
                raise IndexBuildError(
                    f"`vectors` must be of one length, {self.dimension} in {holding[0].file}, "
                    f"{part.dimension} in {part.file}"
                )

    def read(self) -> Iterator[Block]:
        position = 0
        for part in self.parts:
            for start in range(0, part.length, BLOCK):
                some = slice(start, min(start + BLOCK, part.length))
                yield part.block(position + start, some, self.dimension)
            position += part.length


class NpyPart:
    """A .npy file [N, D], memory-mapped, and the table beside it; N may be 0, as in the last of many."""

    def __init__(self, file: Path, name: str, metadata: Path | None, columns: Columns):
        self.file, self.name = file, name
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # NumPy raises many types on damaged files
            raise IndexBuildError(f"`vectors`: {file} cannot be read as .npy ({error})") from error
        self.texts = None if metadata is None else _Texts(metadata, columns)
        self.array, empty = array, array.ndim == 2 and len(array) == 0
        self.length, self.dimension = 0, 0
        if not empty:
            source = ArraySource(array, None, None)
            self.length, self.dimension = source.length, source.dimension
        if metadata is None and (columns.id or columns.caption):
            named = "id_column" if columns.id else "captions"
            raise IndexBuildError(
                f"`{named}` names column {columns.id or columns.caption!r}, and {file} has no table of its "
                "rows beside it"
            )
        if self.texts is not None and self.texts.rows != self.length:
            raise IndexBuildError(
                f"`vectors`: {metadata} must have a row for each of {self.length} vectors of {file}, "
                f"got {self.texts.rows}"
            )

    def block(self, position: int, some: slice, _: int) -> Block:
        ids, captions = (None, None) if self.texts is None else self.texts.of(some)
        named = named_rows(ids, captions, _places(self.name, some))
        return Block(position, fp32(self.array[some]), named, {})


class _Texts:
    """Ids and captions of a table, held while its part is read."""

    def __init__(self, file: Path, columns: Columns):
        self.table = open_table(file, "vectors")
        self.rows, self.names = self.table.rows, _text_names(self.table, columns, None)
        self.columns: dict[str, Any] | None = None

    def of(self, some: slice) -> list[Any]:
        if self.columns is None:
            wanted = [name for name in self.names if name is not None]
            whole = list(batches(self.table, wanted))
            self.columns = {
                name: [value for batch in whole for value in batch.column(name).to_pylist()]
                for name in wanted
            }
        if some.stop == self.rows:
            columns, self.columns = self.columns, None
        else:
            columns = self.columns
        return [None if name is None else columns[name][some] for name in self.names]


class TablePart:
    """A Parquet or Arrow file with a column of lists of numbers; read in order, once from its beginning."""

    def __init__(self, file: Path, name: str, columns: Columns):
        self.file, self.name, self.table = file, name, open_table(file, "vectors")
        self.vector = _vector_column(self.table, columns.vector)
        self.names = _text_names(self.table, columns, self.vector)
        self.length = self.table.rows
        wanted = dict.fromkeys(name for name in (self.vector, *self.names) if name is not None)
        self.wanted = [*wanted]
        self.dimension = self._dimension()
        self.rest: Iterator[Any] | None = None

    def _dimension(self) -> int:
        """That of the first vector, 0 where there is none."""
        for batch in batches(self.table, [self.vector]):
            lengths = _lengths(batch.column(self.vector))
            if (lengths > 0).any():
                return int(lengths[lengths > 0][0])
        return 0

    def block(self, position: int, some: slice, dimension: int) -> Block:
        import pyarrow

        if some.start == 0 or self.rest is None:
            self.rest = _rows(batches(self.table, self.wanted))
        taken = pyarrow.Table.from_batches([next(self.rest) for _ in range(some.start, some.stop, BLOCK)])
        ids, captions = (None if name is None else taken[name].to_pylist() for name in self.names)
        vectors, reasons = _vectors(taken[self.vector].combine_chunks(), dimension)
        return Block(position, vectors, named_rows(ids, captions, _places(self.name, some)), reasons)


def _places(name: str, some: slice) -> list[str]:
    return [f"{name}#{row}" for row in range(some.start, some.stop)]


def _vectors(column: Any, dimension: int) -> tuple[np.ndarray, dict[int, str]]:
    """A column of lists as [n, dimension], and why a row of it is NaN."""
    import pyarrow

    lengths = _lengths(column)
    whole = lengths == dimension
    vectors = np.full((len(lengths), dimension), np.nan, dtype=np.float32)
    values = column.filter(pyarrow.array(whole)).flatten().to_numpy(zero_copy_only=False)
    vectors[whole] = values.astype(np.float32).reshape(-1, dimension)
    wrong = np.flatnonzero(~whole).tolist()
    return vectors, {row: _why(int(lengths[row]), dimension) for row in wrong}


def _why(length: int, dimension: int) -> str:
    return "no vector" if length <= 0 else f"a vector of another length than {dimension}"


def batches(table: Table, columns: list[str]) -> Iterator[Any]:
    """Record batches of a table; of Parquet BLOCK rows each. Raises IndexBuildError."""
    return readable(table.file, _batches(table, columns))


def _batches(table: Table, columns: list[str]) -> Iterator[Any]:
    if table.file.suffix.lower() == ".parquet":
        with import_parquet().ParquetFile(table.file) as opened:
            yield from opened.iter_batches(batch_size=BLOCK, columns=columns)
        return
    for group in range(len(table.groups)):
        yield from table.batches(group, columns)


def _rows(parts: Iterator[Any]) -> Iterator[Any]:
    """The same rows in batches of BLOCK, the last one shorter."""
    import pyarrow

    held: list[Any] = []
    count = 0
    for batch in parts:
        held.append(batch)
        count += batch.num_rows
        while count >= BLOCK:
            joined = pyarrow.Table.from_batches(held).combine_chunks()
            yield joined.slice(0, BLOCK).combine_chunks().to_batches()[0]
            rest = joined.slice(BLOCK)
            held, count = rest.to_batches(), rest.num_rows
    if count:
        yield pyarrow.Table.from_batches(held).combine_chunks().to_batches()[0]


def _lengths(column: Any) -> np.ndarray:
    import pyarrow.compute as compute

    return compute.fill_null(compute.list_value_length(column), -1).to_numpy(zero_copy_only=False)


def _vector_column(table: Table, named: str | None) -> str:
    """The column named, or the only one with lists of floats, or the first of these with a usual name."""
    import pyarrow.types as types

    holding = [
        field.name
        for field in table.schema
        if is_list(field.type) and types.is_floating(field.type.value_type)
    ]
    if named is not None:
        if named not in holding:
            raise IndexBuildError(
                f"`vector_column` must name a column with lists of floats, {table.file} has "
                f"{holding or 'none'}, got {named!r}"
            )
        return named
    usual = [name for name in VECTOR_COLUMNS if name in holding]
    if len(holding) == 1 or usual:
        return usual[0] if usual else holding[0]
    raise IndexBuildError(
        f"`vector_column` must say which column of {table.file} holds the vectors: "
        f"{', '.join(holding) or 'none holds lists of floats'}"
    )


def _text_names(table: Table, columns: Columns, vector: str | None) -> tuple[str | None, str | None]:
    """The columns of ids and captions, None where there is none."""
    names = table.schema.names
    if columns.id is not None and columns.id not in names:
        raise IndexBuildError(f"`id_column` must be a column of {table.file}, {names}, got {columns.id!r}")
    ids = columns.id or next((name for name in ID_COLUMNS if name in names), None)
    return ids, caption_column(table, columns.caption, vector)


def open_vectors(vectors: Any, ids: Any, captions: Any, columns: Columns) -> VectorSource:
    """What `Index.from_embeddings` was given as a source. Raises IndexBuildError."""
    if hasattr(vectors, "ndim") and hasattr(vectors, "dtype"):
        if isinstance(captions, str):
            raise IndexBuildError(f"`captions` must be a list for an array of vectors, got {captions!r}")
        return ArraySource(vectors, ids, captions)
    named = captions if isinstance(captions, str) else None
    if ids is not None or (captions is not None and named is None):
        raise IndexBuildError(
            "`ids` and `captions` are lists for an array alone; for files name their columns: "
            "`id_column`, and `captions` as a name"
        )
    listed = [vectors] if is_path(vectors) else vectors
    if not isinstance(listed, Sequence) or not listed or not all(map(is_path, listed)):
        raise IndexBuildError(f"`vectors` must be an array, a tensor, or paths, got {vectors!r:.100}")
    columns = columns._replace(caption=named or columns.caption)
    return FileSource(_parts([Path(path) for path in listed], columns), columns.id)


def _parts(paths: list[Path], columns: Columns) -> list[NpyPart | TablePart]:
    """The files of all paths, called by their way from the folder that these have in common."""
    files, top = [file for path in paths for file in _files(path)], root_of(paths) or "."
    seen: set[str] = set()
    for file in files:
        real = os.path.realpath(file)
        if real in seen:
            raise IndexBuildError(f"`vectors` names {file} twice")
        seen.add(real)
    if columns.vector is not None and all(file.suffix == ".npy" for file in files):
        raise IndexBuildError(f"`vector_column` names column {columns.vector!r}, and {files[0]} has none")
    parts: list[NpyPart | TablePart] = []
    for file in files:
        name = plain_name(os.path.relpath(os.path.abspath(file), os.path.abspath(top)))
        array = file.suffix == ".npy"
        parts.append(
            NpyPart(file, name, _metadata_of(file), columns) if array else TablePart(file, name, columns)
        )
    return parts


def _files(path: Path) -> list[Path]:
    """Those of a path: itself, or of a folder its .npy files, or its tables where it has none."""
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted((file for file in path.rglob("*") if file.is_file()), key=_natural)
        arrays = [file for file in files if file.suffix == ".npy"]
        images = [file for file in arrays if file.name.startswith("img_emb")]  # text_emb lies beside it
        files = images or arrays or [file for file in files if file.suffix in TABLES]
    else:
        raise IndexBuildError(f"`vectors` must be there, got {path}")
    if strange := [file for file in files if file.suffix not in (".npy", *TABLES)]:
        raise IndexBuildError(f"`vectors` must be .npy, Parquet or Arrow files, got {strange[0]}")
    if not files:
        raise IndexBuildError(f"`vectors`: {path} holds no .npy, Parquet or Arrow file")
    return files


def _natural(file: Path) -> tuple[Any, ...]:
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(file)))


def _metadata_of(file: Path) -> Path | None:
    """The table of an array: clip-retrieval's `metadata_N.parquet`, or one of the same name."""
    number = re.search(r"(\d+)$", file.stem)
    names = [f"metadata_{number[1]}.parquet"] if number else []
    for name in (*names, f"{file.stem}.parquet"):
        for folder in (file.parent, file.parent.parent / "metadata"):
            if (folder / name).is_file():
                return folder / name
    return None

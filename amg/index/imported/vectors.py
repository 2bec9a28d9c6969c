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
from amg.index.sources.columns import Table, caption_column, is_list, open_table, readable
from amg.index.store import import_parquet
from amg.index.text import make_caption, plain_name

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
    """Vectors [n, D] fp32, from a position on; NaN where there is none, with the reason by number."""

    position: int
    vectors: np.ndarray
    ids: list[str]
    sources: list[str]
    captions: list[str | None]
    reasons: dict[int, str]


class VectorSource(Protocol):
    """`read` gives all of it in blocks of at most BLOCK, the same at every reading."""

    length: int
    dimension: int

    def read(self) -> Iterator[Block]: ...


class ArraySource:
    """An array or tensor [N, D], with ids and captions as long as it, or none."""

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
            yield Block(
                start, fp32(self.vectors[some]), ids, numbers, _captions(self.captions, some, numbers), {}
            )


def fp32(vectors: Any) -> np.ndarray:
    """A block of an array or tensor of any floating type."""
    if isinstance(vectors, torch.Tensor):
        return vectors.float().numpy()
    return np.asarray(vectors, dtype=np.float32)


def _captions(given: Sequence[Any] | None, some: slice, sources: list[str]) -> list[str | None]:
    if given is None:
        return [None] * (some.stop - some.start)
    return [make_caption(value, where).text for value, where in zip(given[some], sources, strict=True)]


class FileSource:
    """Files one after the other: .npy arrays, each with a table of ids and captions or none, and tables."""

    def __init__(self, parts: Sequence[NpyPart | TablePart]):
        self.parts = parts
        self.length, self.dimension = sum(part.length for part in parts), parts[0].dimension
        for part in parts:
            if part.dimension != self.dimension:
                raise IndexBuildError(
                    f"`vectors` must be of one length, {self.dimension} in {parts[0].file}, "
                    f"{part.dimension} in {part.file}"
                )
        if self.length == 0:
            raise IndexBuildError(f"`vectors` is empty: no rows in {', '.join(str(p.file) for p in parts)}")

    def read(self) -> Iterator[Block]:
        position = 0
        for part in self.parts:
            for start in range(0, part.length, BLOCK):
                some = slice(start, min(start + BLOCK, part.length))
                yield part.block(position + start, some)
            position += part.length


class NpyPart:
    """A .npy file [N, D], memory-mapped, and the table beside it."""

    def __init__(self, file: Path, metadata: Path | None, columns: Columns):
        self.file = file
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # NumPy raises many types on damaged files
            raise IndexBuildError(f"`vectors`: {file} cannot be read as .npy ({error})") from error
        self.texts = None if metadata is None else _Texts(metadata, columns)
        self.source = ArraySource(array, None, None)
        self.length, self.dimension = self.source.length, self.source.dimension
        if self.texts is not None and self.texts.rows != self.length:
            raise IndexBuildError(
                f"`vectors`: {metadata} must have a row for each of {self.length} vectors of {file}, "
                f"got {self.texts.rows}"
            )

    def block(self, position: int, some: slice) -> Block:
        sources = [f"{plain_name(self.file.name)}#{row}" for row in range(some.start, some.stop)]
        ids, captions = _texts([None, None], sources) if self.texts is None else self.texts.of(some, sources)
        return Block(position, fp32(self.source.vectors[some]), ids, sources, captions, {})


class _Texts:
    """Ids and captions of a table, held while its part is read."""

    def __init__(self, file: Path, columns: Columns):
        self.table = open_table(file)
        self.rows, self.names = self.table.rows, _text_names(self.table, columns, None)
        self.columns: dict[str, Any] | None = None

    def of(self, some: slice, sources: list[str]) -> tuple[list[str], list[str | None]]:
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
        return _texts([None if name is None else columns[name][some] for name in self.names], sources)


class TablePart:
    """A Parquet or Arrow file with a column of lists of numbers; read in order, once from its beginning."""

    def __init__(self, file: Path, columns: Columns):
        self.file, self.table = file, open_table(file)
        self.vector = _vector_column(self.table, columns.vector)
        self.names = _text_names(self.table, columns, self.vector)
        self.length = self.table.rows
        wanted = dict.fromkeys(name for name in (self.vector, *self.names) if name is not None)
        self.wanted = [*wanted]
        self.dimension = self._dimension()
        self.rest: Iterator[Any] | None = None

    def _dimension(self) -> int:
        for batch in batches(self.table, [self.vector]):
            lengths = _lengths(batch.column(self.vector))
            if (lengths > 0).any():
                return int(lengths[lengths > 0][0])
        raise IndexBuildError(f"`vectors`: column {self.vector!r} of {self.file} holds no vector")

    def block(self, position: int, some: slice) -> Block:
        import pyarrow

        if some.start == 0 or self.rest is None:
            self.rest = _rows(batches(self.table, self.wanted))
        taken = pyarrow.Table.from_batches([next(self.rest) for _ in range(some.start, some.stop, BLOCK)])
        sources = [f"{plain_name(self.file.name)}#{row}" for row in range(some.start, some.stop)]
        texts = [None if name is None else taken[name].to_pylist() for name in self.names]
        ids, captions = _texts(texts, sources)
        vectors, reasons = self._vectors(taken[self.vector].combine_chunks())
        return Block(position, vectors, ids, sources, captions, reasons)

    def _vectors(self, column: Any) -> tuple[np.ndarray, dict[int, str]]:
        import pyarrow

        lengths = _lengths(column)
        whole = lengths == self.dimension
        vectors = np.full((len(lengths), self.dimension), np.nan, dtype=np.float32)
        values = column.filter(pyarrow.array(whole)).flatten().to_numpy(zero_copy_only=False)
        vectors[whole] = values.astype(np.float32).reshape(-1, self.dimension)
        wrong = np.flatnonzero(~whole).tolist()
        return vectors, {row: _why(int(lengths[row]), self.dimension) for row in wrong}


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


def _texts(columns: list[Any], sources: list[str]) -> tuple[list[str], list[str | None]]:
    ids, captions = columns
    named = sources if ids is None else [plain_name(str(one)) for one in ids]
    return named, _captions(captions, slice(0, len(sources)), sources)


def open_vectors(vectors: Any, ids: Any, captions: Any, columns: Columns) -> VectorSource:
    """What `Index.from_embeddings` was given as a source. Raises IndexBuildError."""
    if hasattr(vectors, "ndim") and hasattr(vectors, "dtype"):
        if isinstance(captions, str):
            raise IndexBuildError(f"`captions` must be a list for an array of vectors, got {captions!r}")
        return ArraySource(vectors, ids, captions)
    named = captions if isinstance(captions, str) else None
    if ids is not None or (captions is not None and named is None):
        raise IndexBuildError("`ids` and `captions` must be names of columns for files, got lists")
    listed = [vectors] if isinstance(vectors, (str, os.PathLike)) else vectors
    if not isinstance(listed, Sequence) or not listed:
        raise IndexBuildError(f"`vectors` must be an array, a tensor, or paths, got {vectors!r:.100}")
    columns = columns._replace(caption=named or columns.caption)
    return FileSource([part for path in listed for part in _parts(Path(path), columns)])


def _parts(path: Path, columns: Columns) -> list[NpyPart | TablePart]:
    """The files of a path: itself, or of a folder its .npy files, or its tables where it has none."""
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
    return [
        NpyPart(file, _metadata_of(file), columns) if file.suffix == ".npy" else TablePart(file, columns)
        for file in files
    ]


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

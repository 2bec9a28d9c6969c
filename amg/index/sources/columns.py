"""Tables of Parquet and Arrow files: which column holds the images and which the captions, cells as bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amg.extras import needed
from amg.index.errors import IndexBuildError
from amg.index.sources.source import CAPTION_FIELDS, IMAGE_FIELDS
from amg.index.store import import_parquet

BUFFER_BYTES, BATCH_ROWS = 1 << 20, 4  # a row group may hold gigabytes of pictures


@dataclass(frozen=True)
class Table:
    """An open file: its columns, the rows in each group, and batches(group, columns): what a group holds."""

    file: Path
    schema: Any
    groups: tuple[int, ...]
    batches: Callable[[int, list[str]], Iterator[Any]]

    @property
    def rows(self) -> int:
        return sum(self.groups)


def open_table(file: Path, argument: str = "images") -> Table:
    """What a Parquet or Arrow file holds; it is opened again to be read, as there may be thousands of them.
    argument: which one gave the file, for the error. Raises IndexBuildError."""
    if file.suffix.lower() in (".arrow", ".feather"):
        return _open_arrow(file, argument)
    try:
        with _parquet(file) as opened:
            sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
            schema = opened.schema_arrow
    except Exception as error:  # pyarrow raises many types on damaged files
        raise IndexBuildError(f"`{argument}`: {file} cannot be read as Parquet ({error})") from error

    def batches(group: int, columns: list[str]) -> Iterator[Any]:
        with _parquet(file) as opened:
            yield from opened.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=columns)

    return Table(file, schema, tuple(sizes), batches)


def _parquet(file: Path) -> Any:
    return import_parquet().ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)


def _open_arrow(file: Path, argument: str) -> Table:
    """An Arrow file, of either kind, mapped; one group. `datasets` writes the kind without an index."""
    try:
        held = _arrow(file)
    except Exception as error:  # pyarrow raises many types on damaged files
        raise IndexBuildError(f"`{argument}`: {file} cannot be read as Arrow ({error})") from error

    def batches(_: int, columns: list[str]) -> Iterator[Any]:
        for batch in _arrow(file).select(columns).to_batches():
            batch.validate(full=True)  # offsets of a damaged one lead anywhere in memory
            yield batch

    return Table(file, held.schema, (held.num_rows,), batches)


def _arrow(file: Path) -> Any:
    pyarrow = needed("pyarrow", "an Arrow file")
    mapped = pyarrow.memory_map(str(file))
    start = mapped.read(6)
    mapped.seek(0)
    opened = pyarrow.ipc.open_file(mapped) if start == b"ARROW1" else pyarrow.ipc.open_stream(mapped)
    return opened.read_all()


def image_column(table: Table, named: str | None = None) -> str:
    """The column that holds the images: `named`, or the one that can. Raises IndexBuildError where that is
    not plain, or where it has another type than a binary one, or a struct of a binary `bytes` and a text
    `path`."""
    choice = [named] if named is not None and named in image_columns(table) else []
    if named is None:
        choice = image_columns(table)
        usual = [name for name in choice if name.lower() in IMAGE_FIELDS]
        choice = usual if len(usual) == 1 else choice
    if len(choice) != 1:
        fault = "several image columns" if choice else "no image column"
        fault = fault if named is None else f"no image column {named!r}"
        listed = ", ".join(f"{field.name}: {field.type}" for field in table.schema)
        hint = ", or `image_column` to say which" if len(choice) > 1 else ""
        raise IndexBuildError(
            f"`images`: {table.file} has {fault} among {listed}; "
            f"one struct {{bytes, path}} or binary column is expected{hint}"
        )
    _check_struct(choice[0], _fields_of(table.schema.field(choice[0]).type), table.file)
    return choice[0]


def image_columns(table: Table) -> list[str]:
    """The columns that may hold images. Those of a fixed length are hashes, most often: only where there is
    no other, or one has a name that says so."""
    import pyarrow

    structs = [field.name for field in table.schema if _fields_of(field.type).keys() & {"bytes"}]
    found = structs + [field.name for field in table.schema if _is_bytes(field.type)]
    fixed = [field.name for field in table.schema if pyarrow.types.is_fixed_size_binary(field.type)]
    if any(name.lower() in IMAGE_FIELDS for name in fixed):
        return [*found, *(name for name in fixed if name.lower() in IMAGE_FIELDS)]
    return found or fixed


def caption_column(table: Table, named: str | None, image: str | None) -> str | None:
    """The column that holds the captions: `named`, or the first of the usual names that holds text; None:
    there is none. Raises IndexBuildError for a named one that is not there or of another type."""
    if named is not None:
        check_caption_column(table, named, image)
        return named
    by_name = {name.lower(): name for name in reversed(table.schema.names)}
    for usual in CAPTION_FIELDS:
        name = by_name.get(usual)
        if name is not None and name != image and _holds_text(table.schema.field(name).type):
            return name
    return None


def text_columns(table: Table, *names: str) -> bool:
    """Whether all of these columns are there and hold text."""
    schema = table.schema
    return all(name in schema.names and _is_text(_plain(schema.field(name).type)) for name in names)


def _plain(kind: Any) -> Any:
    import pyarrow.types as types

    return kind.value_type if types.is_dictionary(kind) else kind


def _holds_text(kind: Any) -> bool:
    inner = kind.value_type if is_list(kind) else _plain(kind)
    return _is_text(inner)


def _fields_of(kind: Any) -> dict[str, Any]:
    """Names and types of a struct's fields, none for another type."""
    import pyarrow

    return {field.name: field.type for field in kind} if pyarrow.types.is_struct(kind) else {}


def _check_struct(column: str, fields: dict[str, Any], file: Path) -> None:
    import pyarrow.types as types

    for name, wanted in (("bytes", "binary"), ("path", "text")):
        kind = fields.get(name)
        inner = kind.value_type if kind is not None and types.is_dictionary(kind) else kind
        if inner is None or types.is_null(inner) or _is_text(inner) or _is_bytes(inner):
            continue
        if not (name == "bytes" and types.is_fixed_size_binary(inner)):
            raise IndexBuildError(
                f"`images`: column {column!r} of {file} must hold {wanted} in its field {name!r}, got {kind}"
            )


def _is_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def readable(file: Path, parts: Iterator[Any]) -> Iterator[Any]:
    """Parts of a file as they are read. Raises IndexBuildError naming it where they cannot be."""
    try:
        yield from parts
    except IndexBuildError:
        raise
    except Exception as error:  # pyarrow raises many types on damaged files
        raise IndexBuildError(f"`images`: {file} is damaged and cannot be read on ({error})") from error


def read_group(table: Table, group: int, columns: list[str], skip: int) -> Iterator[tuple[int, dict]]:
    """Rows of a row group from the `skip`-th on, with their number in it; text comes as bytes."""
    return readable(table.file, _read_group(table, group, columns, skip))


def _read_group(table: Table, group: int, columns: list[str], skip: int) -> Iterator[tuple[int, dict]]:
    import pyarrow

    offset = 0
    for batch in table.batches(group, columns):
        fields = pyarrow.schema([(field.name, _without_text(field.type)) for field in batch.schema])
        for at in range(min(max(skip - offset, 0), batch.num_rows), batch.num_rows):
            (record,) = batch.slice(at, 1).cast(fields).to_pylist()
            yield offset + at, record
        offset += batch.num_rows


def check_caption_column(table: Table, column: str, image_column: str | None) -> None:
    """Text, integers, or lists of text. Raises IndexBuildError naming the column's type."""
    import pyarrow

    schema, types, file = table.schema, pyarrow.types, table.file
    if column not in schema.names:
        raise IndexBuildError(f"`captions` names column {column!r}; {file} has {schema.names}")
    kind = schema.field(column).type
    inner = kind.value_type if types.is_dictionary(kind) or is_list(kind) else kind
    if column == image_column:
        raise IndexBuildError(f"`captions` names column {column!r}, which holds the images of {file}")
    if not (_is_text(inner) or types.is_null(inner) or (inner == kind and types.is_integer(kind))):
        raise IndexBuildError(
            f"`captions` names column {column!r}, which must hold text, integers or lists of text; "
            f"in {file} it holds {kind}"
        )


def is_list(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return text or types.is_binary(kind) or types.is_large_binary(kind)


def _without_text(kind: Any) -> Any:
    """A column type with bytes for text: pyarrow stops at a whole batch for one string that is not UTF-8."""
    import pyarrow

    types = pyarrow.types
    if types.is_dictionary(kind):
        return _without_text(kind.value_type)
    if is_list(kind):
        return pyarrow.large_list(_without_text(kind.value_type))
    if types.is_struct(kind):
        return pyarrow.struct([(field.name, _without_text(field.type)) for field in kind])
    return pyarrow.large_binary() if _is_text(kind) else kind

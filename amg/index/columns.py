"""Columns of Parquet files: which holds the images, whether its type can, and its cells as bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amg.index.errors import IndexBuildError
from amg.index.store import import_parquet

IMAGE_COLUMNS = ("image", "img", "images", "png", "jpg", "jpeg", "webp")


def open_table(file: Path) -> Any:
    """A Parquet file, its rows not read. Raises IndexBuildError."""
    parquet = import_parquet()
    try:
        return parquet.ParquetFile(file)
    except Exception as error:  # pyarrow raises many types on damaged files
        raise IndexBuildError(f"`images`: {file} cannot be read as Parquet ({error})") from error


def image_column(table: Any, file: Path) -> str:
    """The column that holds the images. Raises IndexBuildError where that is not plain, or where it has
    another type than a binary one, or a struct of a binary `bytes` and a text `path`."""
    import pyarrow

    types, schema = pyarrow.types, table.schema_arrow
    structs = [field.name for field in schema if _fields_of(field.type).keys() & {"bytes"}]
    found = structs + [field.name for field in schema if _is_bytes(field.type)]
    fixed = [field.name for field in schema if types.is_fixed_size_binary(field.type)]  # hashes, most often
    named = [name for name in found + fixed if name.lower() in IMAGE_COLUMNS]
    choice = named if len(named) == 1 else found or fixed
    if len(choice) != 1:
        fault = "several image columns" if choice else "no image column"
        listed = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise IndexBuildError(
            f"`images`: {file} has {fault} among {listed}; "
            "one struct {bytes, path} or binary column is expected"
        )
    _check_struct(choice[0], _fields_of(schema.field(choice[0]).type), file)
    return choice[0]


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


def read_group(
    table: Any, group: int, column: str, caption_column: str | None, skip: int
) -> Iterator[tuple[int, dict]]:
    """Rows of a row group from the `skip`-th on, with their number in it; text comes as bytes."""
    import pyarrow

    columns = [column] if caption_column is None else [column, caption_column]
    offset = 0
    for batch in table.iter_batches(batch_size=64, row_groups=[group], columns=columns):
        first = min(max(skip - offset, 0), batch.num_rows)
        fields = [(field.name, _without_text(field.type)) for field in batch.schema]
        rest = batch.slice(first).cast(pyarrow.schema(fields))
        yield from enumerate(rest.to_pylist(), start=offset + first)
        offset += batch.num_rows


def check_caption_column(table: Any, file: Path, column: str, image_column: str) -> None:
    """Text, integers, or lists of text. Raises IndexBuildError naming the column's type."""
    import pyarrow

    schema, types = table.schema_arrow, pyarrow.types
    if column not in schema.names:
        raise IndexBuildError(f"`captions` names column {column!r}; {file} has {schema.names}")
    kind = schema.field(column).type
    inner = kind.value_type if types.is_dictionary(kind) or _is_list(kind) else kind
    if column == image_column:
        raise IndexBuildError(f"`captions` names column {column!r}, which holds the images of {file}")
    if not (_is_text(inner) or types.is_null(inner) or (inner == kind and types.is_integer(kind))):
        raise IndexBuildError(
            f"`captions` names column {column!r}, which must hold text, integers or lists of text; "
            f"in {file} it holds {kind}"
        )


def _is_list(kind: Any) -> bool:
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
    if _is_list(kind):
        return pyarrow.large_list(_without_text(kind.value_type))
    if types.is_struct(kind):
        return pyarrow.struct([(field.name, _without_text(field.type)) for field in kind])
    return pyarrow.large_binary() if _is_text(kind) else kind

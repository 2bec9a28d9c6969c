"""JSON records of ours, read back: each field is there, of its type, and nothing else is."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any


def read_fields(kind: type, record: Any, name: str = "") -> Any:
    """A dataclass out of a JSON object. Raises ValueError that names the field, its type and the value.

    Integers are 0 or more and numbers finite, as all of ours are. name: of the field that holds the object.
    """
    where = f"{name}." if name else ""
    if not isinstance(record, dict):
        raise _unlike(name or kind.__name__, "an object", record)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if strange := sorted(record.keys() - fields.keys()):
        raise ValueError(f"`{where}{strange[0]}` is no field of it")
    values = {}
    for key, field in fields.items():
        if key in record:
            values[key] = _read(hints[key], record[key], where + key)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"`{where}{key}` is missing")
    return kind(**values)


def _read(hint: Any, value: Any, name: str) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # X | None
        return None if value is None else _read(inner[0], value, name)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return read_fields(hint, value, name)
    if origin is dict and isinstance(value, dict):
        return {key: _read(inner[1], item, f"{name}.{key}") for key, item in value.items()}
    if origin in (list, tuple) and isinstance(value, list):
        return _read_list(origin, inner, value, name)
    if hint is not Any and not _fits(hint, value):
        raise _unlike(name, _NAMES[origin or hint], value)
    return value


def _read_list(origin: Any, inner: tuple, value: list, name: str) -> Any:
    several = origin is list or inner[-1] is Ellipsis
    if not several and len(value) != len(inner):
        raise _unlike(name, f"{len(inner)} values", value)
    kinds = [inner[0]] * len(value) if several else inner
    return origin(
        _read(kind, item, f"{name}[{at}]") for at, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


_NAMES = {
    int: "an integer of 0 or more",
    float: "a finite number",
    str: "text",
    dict: "an object",
    list: "a list",
    tuple: "a list",
}


def _fits(hint: Any, value: Any) -> bool:
    if isinstance(value, bool):
        return False
    if hint is int:
        return isinstance(value, int) and value >= 0
    if hint is float:
        return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return hint is str and isinstance(value, str)


def _unlike(name: str, wanted: str, value: Any) -> ValueError:
    shown = repr(value)
    return ValueError(f"`{name}` must be {wanted}, got {shown if len(shown) < 80 else shown[:77] + '...'}")

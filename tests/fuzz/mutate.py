"""Files that are a little wrong: bytes changed, cut, doubled, and JSON with other values."""

from __future__ import annotations

import json
import random
from typing import Any

ODD = [
    None,
    True,
    -1,
    0,
    2**63,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x" * 300,
    "\ud800",
    [],
    {},
    [[]],
]
INTEGERS = [0, 1, 127, 128, 255]


def mutated(content: bytes, dice: random.Random) -> bytes:
    """Another content, never the same one."""
    while (found := _mutated(content, dice)) == content:
        pass
    return found


def _mutated(content: bytes, dice: random.Random) -> bytes:
    if dice.random() < 0.5 and (record := _json(content)) is not None:
        return _as_json(_changed(record, dice))
    ways = (_flipped, _cut, _without, _doubled, _inserted, _replaced)
    found = content
    for _ in range(dice.choice((1, 1, 1, 3))):
        found = dice.choice(ways)(found, dice)
    return found


def _json(content: bytes) -> Any:
    """A record, or one of several lines of records."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        pass
    try:
        return [json.loads(line) for line in content.splitlines()] or None
    except (ValueError, RecursionError):
        return None


def _as_json(record: Any) -> bytes:
    return json.dumps(record).encode("utf-8", "surrogatepass")


def _changed(record: Any, dice: random.Random) -> Any:
    """One place of a record holds something else, is gone, or lies very deep."""
    if isinstance(record, dict) and record and dice.random() < 0.9:
        key = dice.choice([*record])
        way = dice.random()
        if way < 0.2:
            return {name: value for name, value in record.items() if name != key}
        if way < 0.3:
            return {**record, dice.choice(("more", "", "__class__")): record[key]}
        return {**record, key: _changed(record[key], dice)}
    if isinstance(record, list) and record and dice.random() < 0.8:
        at = dice.randrange(len(record))
        if dice.random() < 0.3:
            return record[:at] + record[at + 1 :]
        return [*record[:at], _changed(record[at], dice), *record[at + 1 :]]
    if dice.random() < 0.05:
        return _deep(900)
    return dice.choice(ODD)


def _deep(levels: int) -> Any:
    found: Any = []
    for _ in range(levels):
        found = [found]
    return found


def _flipped(content: bytes, dice: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 8))):
        if found:
            found[dice.randrange(len(found))] ^= 1 << dice.randrange(8)
    return bytes(found)


def _cut(content: bytes, dice: random.Random) -> bytes:
    return content[: dice.randrange(len(content) + 1)]


def _span(content: bytes, dice: random.Random) -> tuple[int, int]:
    start = dice.randrange(len(content) + 1)
    return start, min(len(content), start + dice.choice((1, 4, 64, 4096)))


def _without(content: bytes, dice: random.Random) -> bytes:
    start, end = _span(content, dice)
    return content[:start] + content[end:]


def _doubled(content: bytes, dice: random.Random) -> bytes:
    start, end = _span(content, dice)
    return content[:end] + content[start:]


def _inserted(content: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(content) + 1)
    return content[:at] + dice.randbytes(dice.choice((1, 4, 100))) + content[at:]


def _replaced(content: bytes, dice: random.Random) -> bytes:
    """Some bytes are an integer's edge, as a length or an offset would be."""
    start, end = _span(content, dice)
    return content[:start] + bytes([dice.choice(INTEGERS)]) * (end - start) + content[end:]

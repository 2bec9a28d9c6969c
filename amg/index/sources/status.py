"""img2dataset's tables of what it tried to download: which pictures failed, which should be there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from amg.index.sources.columns import Table, read_group
from amg.index.text import plain_name

FAILED, GONE = "img2dataset", "img2dataset: downloaded, but the picture is not there"


class Failed(NamedTuple):
    """A picture that is not there: its key and why."""

    key: str
    reason: str


def failed(table: Table, present: set[str]) -> Iterator[Failed]:
    """The rows of a status table whose keys are not among those of the pictures at hand."""
    for group in range(len(table.groups)):
        for _, record in read_group(table, group, ["key", "status"], 0):
            key, status = (plain_name(record[name] or b"") for name in ("key", "status"))
            if key not in present:
                yield Failed(key, GONE if status == "success" else f"{FAILED}: {status}")

"""What a build left out or changed, in words and numbers: it goes into the manifest and is printed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

NAMED = 3


class Note(NamedTuple):
    """Something done to an image or its caption. where: what is named for it, "" for the image itself."""

    what: str
    where: str = ""
    amount: int = 1


@dataclass
class Tally:
    """How often each thing happened, and the first few it happened to."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, what: str, where: str, amount: int = 1) -> None:
        """Count it, and name it if it is among the first."""
        self.counts[what] = self.counts.get(what, 0) + amount
        named = self.examples.setdefault(what, [])
        if len(named) < NAMED:
            named.append(where)

    def join(self, other: Tally, label: str) -> None:
        """Add what another counted, its names with a label and a slash before them where there is one."""
        for what, count in other.counts.items():
            self.counts[what] = self.counts.get(what, 0) + count
            named = self.examples.setdefault(what, [])
            names = [f"{label}/{name}" if label else name for name in other.examples[what]]
            named += names[: NAMED - len(named)]


def pack_notes(notes: Iterable[Note]) -> str | None:
    """Notes as one string for a build's log, None for none."""
    return json.dumps(list(notes)) if notes else None


def unpack_notes(packed: str) -> list[Note]:
    """The notes that pack_notes() packed."""
    return [Note(*note) for note in json.loads(packed)]

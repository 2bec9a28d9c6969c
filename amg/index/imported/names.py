"""What vectors are called: distinct ids, places, captions, and what was done to these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np

from amg.index.errors import IndexBuildError
from amg.index.fold import HashTable
from amg.index.notes import Note
from amg.index.text import make_caption, plain_name

NO_ID = "rows without an id, called by file and row"
AGAIN = "rows with the id of an earlier one, called by file and row"


@dataclass(frozen=True)
class Named:
    """Of n vectors: ids, where they lie, captions; notes: what was done to these, by number."""

    ids: list[str]
    sources: list[str]
    captions: list[str | None]
    notes: dict[int, tuple[Note, ...]]


def named_rows(ids: Sequence[Any] | None, captions: Sequence[Any] | None, sources: list[str]) -> Named:
    """Ids and captions of columns or lists, None for none; a row without an id is called by its place."""
    notes: dict[int, tuple[Note, ...]] = {}
    names = sources
    texts: list[str | None] = [None] * len(sources)
    if ids is not None:
        names = [_name(one) or source for one, source in zip(ids, sources, strict=True)]
        notes = {at: (Note(NO_ID),) for at, one in enumerate(ids) if not _name(one)}
    if captions is not None:
        made = [make_caption(value, where) for value, where in zip(captions, sources, strict=True)]
        texts = [caption.text for caption in made]
        for at, caption in enumerate(made):
            if caption.notes:
                notes[at] = (*notes.get(at, ()), *caption.notes)
    return Named(names, sources, texts, notes)


def _name(value: Any) -> str:
    return "" if value is None else plain_name(value if isinstance(value, bytes) else str(value))


class Distinct:
    """Keeps ids apart over a whole set: 16 bytes an id."""

    def __init__(self, asked_for: str | None):
        self.known, self.count, self.asked_for = HashTable(), 0, asked_for

    def __call__(self, named: Named) -> Named:
        """The same, where an id was there before called by its place. Raises IndexBuildError where the
        column of ids was asked for."""
        hashes = _hashes(named.ids)
        first = np.zeros(len(hashes), dtype=bool)
        first[np.unique(hashes, return_index=True)[1]] = True
        again = np.flatnonzero((self.known.find(hashes) >= 0) | ~first).tolist()
        if again:
            named, hashes = self._renamed(named, hashes, again)
        self.known.add(hashes, self.count)
        self.count += len(hashes)
        return named

    def _renamed(self, named: Named, hashes: np.ndarray, again: list[int]) -> tuple[Named, np.ndarray]:
        if self.asked_for is not None:
            raise IndexBuildError(
                f"`id_column` must hold distinct ids, {self.asked_for!r} has {named.ids[again[0]]!r} once "
                f"more at {named.sources[again[0]]}"
            )
        ids, notes = [*named.ids], dict(named.notes)
        for at in again:
            ids[at], notes[at] = named.sources[at], (*notes.get(at, ()), Note(AGAIN))
        hashes = _hashes(ids)
        if (self.known.find(hashes) >= 0).any() or len(np.unique(hashes)) < len(hashes):
            raise IndexBuildError(
                f"`vectors`: some ids are {named.sources[again[0]]!r} and the like: `id_column` must say "
                "which column holds distinct ones"
            )
        return replace(named, ids=ids, notes=notes), hashes


def _hashes(ids: list[str]) -> np.ndarray:
    digests = b"".join(blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, dtype="<u8")

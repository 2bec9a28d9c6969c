"""What a search of an index found."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import torch

from amg.index.guard import Alike

if TYPE_CHECKING:
    from amg.index.index import Index


@dataclasses.dataclass(frozen=True)
class Hits:
    """What a search found: similarity and row, [B] for k = 1, else [B, k], best first."""

    similarity: torch.Tensor
    row: torch.Tensor
    index: Index = dataclasses.field(repr=False)

    @property
    def captions(self) -> list:
        """Caption of each row found, None where it has none; lists in a list for k > 1."""
        return _pick(self.index.captions, self.row.tolist())

    @property
    def ids(self) -> list:
        """Id of each row found; lists in a list for k > 1."""
        return _pick(self.index.ids, self.row.tolist())


def _pick(values: list, rows: list) -> list:
    return [_pick(values, row) if isinstance(row, list) else values[row] for row in rows]


class Closest(NamedTuple):
    """Of each picture: similarity [B] to the closest training image and its row [B], over every picture
    indexed; and the guard's answer, None where the index has none."""

    similarity: torch.Tensor
    row: torch.Tensor
    guard: Alike | None

"""What is remembered of a step that looked at a sample, until its trace is written."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(eq=False)
class Note:
    """`similarity` and `row` as measured, None where they were not; `terms` that fired. `acted`: the
    dissimilarity term fired if this value, still on the device, is not 0. `estimated`: by the student."""

    similarity: float | None = None
    row: int | None = None
    terms: list[str] = field(default_factory=list)
    acted: Tensor | None = None
    estimated: bool = False

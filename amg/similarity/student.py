"""Cheap measuring: similarity on the student's small picture, and which samples the teacher must look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amg.embed.precision import embedded, full_precision
from amg.embed.student import Origin, Student
from amg.guidance.terms import require_finite
from amg.similarity import Measured


class Screened(NamedTuple):
    """`near` [B] bool, samples that may lie above the limit; what the student measured, of its own
    pictures."""

    near: Tensor
    measured: Measured


@dataclass(frozen=True)
class Screen:
    """A student over the index its teacher made."""

    student: Student
    index: Any

    def require(self, origin: Origin) -> None:
        """ValueError naming what differs, unless the student was distilled from `origin`."""
        mine = self.student.origin
        for name, asked in vars(origin).items():
            if getattr(mine, name) != asked:
                raise ValueError(
                    f"`student` must be distilled for this run's {name}={asked!r}, "
                    f"got one for {getattr(mine, name)!r}"
                )

    @torch.no_grad()
    def __call__(self, x0_hat: Tensor, alpha_bar: float, limit: float) -> Screened:
        """Screen x0_hat [B, C, h, w] of a step for similarities above `limit`; FloatingPointError on NaN."""
        require_finite("x0_hat", x0_hat)
        with full_precision():
            picture = self.student(x0_hat.float()).clamp(0, 1)
        embedding = torch.nn.functional.normalize(embedded(self.index.embedder, picture).float())
        similarity, row, _ = self.index.nearest(embedding)
        measured = Measured(similarity, row, {}, picture)
        return Screened(similarity >= self.student.cut(alpha_bar, limit), measured)

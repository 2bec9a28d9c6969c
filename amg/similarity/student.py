"""Cheap measuring: similarity on the student's small picture, and which samples the teacher must look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amg.embed.precision import embedded, full_precision
from amg.embed.student import Origin, Student
from amg.similarity import Measured, pictures


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
    def __call__(self, x0_hat: Tensor, alpha_bar: Sequence[float], limit: Sequence[float]) -> Screened:
        """Screen x0_hat [B, C, h, w] for similarities above `limit`, each sample at its noise level.

        Looks at no value: of a sample that is not finite the similarity is NaN, and the teacher must look.
        ValueError unless there are B of each.
        """
        cuts = [self.student.cut(*at) for at in zip(alpha_bar, limit, strict=True)]
        if len(cuts) != len(x0_hat):
            raise ValueError(
                f"`alpha_bar` and `limit` must have {len(x0_hat)} values, one a sample, got {len(cuts)}"
            )
        with full_precision():
            picture = pictures(self.student, x0_hat).clamp(0, 1)
        similarity, row, _ = self.index.nearest(embedded(self.index.embedder, picture))
        cut = torch.tensor(cuts, dtype=similarity.dtype, device=similarity.device)
        return Screened(~(similarity < cut), Measured(similarity, row, {}, picture))

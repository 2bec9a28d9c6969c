"""A stretch of a training set, indexed by itself: what one worker does of a build. Knows nothing of Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from amg.index.build import opened, read_all, write_whole
from amg.index.captions import Captions
from amg.index.journal import State
from amg.index.notes import Tally
from amg.index.plan import BuildPlan
from amg.index.sources import ImageSource, TrainingImage
from amg.index.text import Caption


class Stretch:
    """Images [start, stop) of a source, called what they are called there; positions from 0. passed_over: of
    these, as the build of all is to count it."""

    def __init__(self, source: ImageSource, start: int, stop: int, passed_over: Tally):
        self.source, self.start, self.stop, self.passed_over = source, start, stop, passed_over
        self.length: int | None = stop - start
        self.identity, self.identity_tells = f"{start} to {stop} of {source.identity}", source.identity_tells

    def first(self) -> TrainingImage | None:
        return next(self.read(0), None)

    def read(self, start: int) -> Iterator[TrainingImage]:
        stream = self.source.read(self.start + start)
        for image in islice(stream, max(self.stop - self.start - start, 0)):
            yield dataclasses.replace(image, position=image.position - self.start)


@dataclasses.dataclass(frozen=True)
class Offset(Captions):
    """Captions of a source, by what its images are called there: the first of a stretch is number `start`."""

    start: int = 0

    def of(self, image: TrainingImage, image_id: str) -> Caption:
        return super().of(dataclasses.replace(image, position=image.position + self.start), image_id)

    def check_total(self, total: int) -> None:
        """Of all images that is known before the stretches are cut."""


def build_stretch(
    images: Any, captions: Any, plan: BuildPlan, cut: tuple[int, int], passed_over: Tally, path: Path
) -> None:
    """An index of images [start, stop) at `path`, unless there is one; goes on where a killed worker
    stopped."""
    if path.exists():
        return
    source, table = opened(images, captions, plan)
    stretch = Stretch(source, *cut, passed_over)
    named = {field.name: getattr(table, field.name) for field in dataclasses.fields(table)}
    offset = Offset(**named, start=cut[0])

    def fill(state: State, partial: Path) -> None:
        read_all(stretch, offset, plan, state, partial, False)

    write_whole(path, plan.identity(stretch, table), True, fill)

"""Several sources one after the other, as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from amg.index.notes import Tally
from amg.index.sources.source import ImageSource, TrainingImage


class Joined:
    """The images of several sources in order; labels: what goes before the ids and places of each, "" for
    nothing. passed_over: what is counted beside what the parts count themselves."""

    def __init__(
        self,
        parts: Sequence[ImageSource],
        labels: Sequence[str] | None = None,
        passed_over: Tally | None = None,
    ):
        self.parts, self.labels = list(parts), list(labels) if labels is not None else [""] * len(parts)
        self.own = passed_over or Tally()
        lengths = [part.length for part in self.parts]
        self.length = None if None in lengths else sum(length or 0 for length in lengths)
        self.identity_tells = all(part.identity_tells for part in self.parts)
        named = zip(self.labels, self.parts, strict=True)
        self.identity = "; ".join(f"{label} {part.identity}".strip() for label, part in named)

    @property
    def passed_over(self) -> Tally:
        total = Tally()
        total.join(self.own, "")
        for label, part in zip(self.labels, self.parts, strict=True):
            total.join(part.passed_over, label)
        return total

    def first(self) -> TrainingImage | None:
        for label, part in zip(self.labels, self.parts, strict=True):
            image = part.first()
            if image is not None:
                return _labelled(image, label, 0)
        return None

    def read(self, start: int) -> Iterator[TrainingImage]:
        position = 0
        for label, part in zip(self.labels, self.parts, strict=True):
            if part.length is not None and position + part.length <= start:
                position += part.length
                continue
            known = part.length is not None
            skip = start - position if known and start > position else 0
            count = skip
            for image in part.read(skip):
                count += 1
                if position + image.position >= start:
                    yield _labelled(image, label, position)
            position += count


def _labelled(image: TrainingImage, label: str, before: int) -> TrainingImage:
    prefix = f"{label}/" if label else ""
    return dataclasses.replace(
        image,
        position=before + image.position,
        id=prefix + image.id,
        source=prefix + image.source,
    )

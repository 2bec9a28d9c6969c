"""A call among those that draw a picture, and one that was given up before its pictures were finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from amg.config import AMGConfig
from amg.guidance.flight import Flight
from amg.verdict import Neighbour, Verdict


class Stopped(Exception):
    """Every sample of a call is to be drawn again: it is not finished."""

    def __init__(self, flights: Sequence[Flight], plain: int):
        super().__init__("no sample of this call is wanted any more")
        self.flights, self.plain = flights, plain

    def verdicts(self, index: Any, config: AMGConfig) -> list[Verdict]:
        """What is known of pictures that were never finished: what the last look found."""
        assert config.threshold is not None
        found = []
        for flight in self.flights:
            look = next(step for step in reversed(flight.trace) if step.neighbour is not None)
            assert look.similarity is not None and look.neighbour is not None
            near = Neighbour(look.neighbour, index.ids[look.neighbour], index.captions[look.neighbour])
            verdict = Verdict(
                index.metric,
                look.similarity,
                config.threshold,
                near,
                memorized=True,
                rewinds=flight.total_rewinds,
                evaluations=flight.evaluations,
                trace=tuple(flight.trace),
                exhausted=True,
                caption=flight.caption,
            )
            found.append(verdict)
        return found


@dataclass(frozen=True)
class Try:
    """One call among those that draw a picture: its `arguments` by name, the texts of its prompts by the
    pictures' places, how many tries went before, the ordinary captions that took prompts' places, and the
    evaluations that each sample has cost. may_stop: it may end before its pictures are finished, of which it
    gives `count`; may_leave: samples may be left to another call."""

    arguments: Mapping[str, Any]
    texts: Mapping[int, str] = field(default_factory=dict)
    attempt: int = 0
    captions: Mapping[int, str] = field(default_factory=dict)
    spent: Mapping[int, int] = field(default_factory=dict)
    may_stop: bool = False
    may_leave: bool = False
    count: int | None = None

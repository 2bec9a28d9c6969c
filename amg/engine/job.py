"""A request that was found to be in order: what its samples start from, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.embed.precision import Modes
from amg.engine.look import Tools
from amg.engine.memory import PromptMemory
from amg.engine.plan import Course
from amg.guidance.flight import Flight
from amg.guidance.predict import Conditions
from amg.pipelines.given import Begun, Kept
from amg.pipelines.safety import SafetyCheck, Watermark
from amg.verdict import Verdict


@dataclass(eq=False)
class Job:
    """sample [n, ...]: what its images start from, as the scheduler keeps it; kept: of a picture that is
    painted into; begin: (place, generator) -> what a later try of one starts from, None: noise alone. own:
    rows of the index that the user put in. course: how it is run.
    generator: the caller's, one or a list of n, or None. key: of the slot set it joins. owner: what it was
    prepared from; requests of different owners never run at the same time. late_at: time.monotonic() after
    which nobody wants it. bar: shows progress, or None. memory: of prompts, or None. dtype: of the network's
    input. called: by the sampler's own call.

    images, samples, verdicts: of those that are finished, by their place.
    """

    course: Course
    config: AMGConfig
    tools: Tools
    also: tuple[Any, ...]
    conditions: Conditions
    sample: Tensor
    flights: list[Flight]
    generator: Any
    rescale: float
    output_type: str
    safety: SafetyCheck | Watermark | None
    dtype: torch.dtype
    key: Hashable
    owner: Hashable
    modes: Modes
    late_at: float
    kept: Kept | None = None
    begin: Callable[[int, torch.Generator], Begun] | None = None
    own: frozenset[int] = frozenset()
    bar: Any = None
    memory: PromptMemory | None = None
    future: Future = field(default_factory=Future)
    images: dict[int, Tensor] = field(default_factory=dict)
    samples: dict[int, Tensor] = field(default_factory=dict)
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    began: float = 0.0
    called: bool = False
    claimed: bool = False

    @property
    def steps(self) -> int:
        """Of a whole run."""
        return len(self.course.plan(self.config).steps)

    @property
    def scale(self) -> float | None:
        """The guidance scale, where there is something to guide by."""
        return self.course.scale if self.conditions.cond else None

    def __len__(self) -> int:
        return len(self.flights)

    @property
    def complete(self) -> bool:
        """Whether all its images are finished."""
        return len(self.verdicts) == len(self)

    def conditions_of(self, place: int) -> Conditions:
        """The conditions of one image, tensors of one row."""
        return self.conditions.part(slice(place, place + 1))

    def again(self, place: int, size: float, like: Tensor) -> Begun:
        """What a later try of an image starts from, like `like` [1, ...]: noise of its own, `size` large, on
        the picture that was put in, if one was."""
        flight = self.flights[place]
        if self.begin is None:
            return Begun(flight.noise(like) * size)
        begun = self.begin(place, flight.generator)
        return begun._replace(sample=begun.sample.to(like))

    def claim(self) -> bool:
        """Whether the future is still to be answered, by whoever asks first."""
        first, self.claimed = not self.claimed, True
        return first and self.future.set_running_or_notify_cancel()

    def fail(self, error: BaseException) -> None:
        """End it with an error, unless it is over."""
        if self.claim():
            self.future.set_exception(error)

"""One sample in flight: what has happened to it so far."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from amg.guidance.read import read_bytes
from amg.verdict import TraceStep


@dataclass(frozen=True, eq=False)
class Lowered:
    """A prompt with a lower magnitude m, after `tries` later tries (`amg.guidance.lower`): `whole` is the
    prompt's own m; `texts`: what is left of it with more and more words left out, each with its m; or its
    `embedding` [1, L, D], optimised."""

    whole: float
    tries: int = 1
    texts: tuple[tuple[str, float], ...] = ()
    embedding: Tensor | None = None

    def again(self) -> Lowered:
        """The same for a further try."""
        return replace(self, tries=self.tries + 1)


@dataclass(eq=False)
class Flight:
    """The mutable record of one sample, kept through rewinds and re-runs.

    `initial` is its first noise, of which alone its own source of fresh noise is made, so what happens to a
    sample never depends on its batch-mates. `rewinds` counts returns in the current run, `total_rewinds` in
    all.
    """

    initial: Tensor
    seed: int | None = None  # of `initial`, once it was needed
    rewinds: int = 0
    total_rewinds: int = 0
    retries: int = 0
    evaluations: int = 0
    despecified_until: int = 0
    deduplicated_until: int = 0
    suspected: bool = False  # its gate was open when it was last measured
    exhausted: bool = False  # a checkpoint wanted it back, and `max_evaluations` did not allow it
    remembered: bool = False  # began as a later try, because its prompt's samples went back before
    pending: bool = False  # marked at a checkpoint, sent back by the scheduler step that follows
    prompt: str | None = None  # what was asked for, where it is text and known
    caption: str | None = None  # what later tries are conditioned on instead of the prompt
    to_lower: str | None = None  # how the prompt of its next try is to be lowered, where no caption is known
    lowered: Lowered | None = None  # the prompt as it was lowered
    trace: list[TraceStep] = field(default_factory=list)

    @staticmethod
    def from_noise(initial: Tensor, prompt: str | None = None) -> Flight:
        """A flight for one sample's initial noise [C, H, W]; equal noise gives an equal flight."""
        return Flight(initial, prompt=prompt)

    @functools.cached_property
    def generator(self) -> torch.Generator:
        """The sample's own source of noise."""
        seeded([self])
        assert self.seed is not None
        return torch.Generator().manual_seed(self.seed)

    @functools.cached_property
    def _chooser(self) -> random.Random:
        seeded([self])
        return random.Random(self.seed)

    def choose(self, count: int) -> int:
        """One of 0..count-1, by the sample's own chance."""
        return self._chooser.randrange(count)

    def noise(self, like: Tensor) -> Tensor:
        """Fresh standard normal noise shaped like `like`, from this sample's own generator."""
        drawn = torch.randn(like.shape, generator=self.generator, dtype=torch.float32)
        return drawn.to(like.device, like.dtype)


def seeded(flights: Sequence[Flight]) -> None:
    """Make the seeds of those that have none yet, of their first noise, in one read of it: equal noise gives
    equal seeds."""
    new = [flight for flight in flights if flight.seed is None]
    if not new:
        return
    initial = read_bytes(torch.stack([flight.initial.detach() for flight in new]))
    for flight, noise in zip(new, initial, strict=True):
        flight.seed = int.from_bytes(hashlib.sha256(noise).digest()[:7], "little")


def texts_of(prompt: str | Sequence[str] | None, repeats: int, batch: int) -> list[str | None]:
    """The prompt of each of `batch` images, in diffusers' order; None where there is no text."""
    if prompt is None:
        return [None] * batch
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    return [text for text in texts for _ in range(repeats)]

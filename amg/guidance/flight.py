"""One sample in flight: what has happened to it so far."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from amg.verdict import TraceStep


@dataclass
class Flight:
    """The mutable record of one sample, kept through rewinds and re-runs.

    `generator` is the sample's own source of fresh noise, seeded by its initial noise alone, so what happens
    to a sample never depends on its batch-mates. `rewinds` counts returns in the current run, `total_rewinds`
    in all.
    """

    generator: torch.Generator
    rewinds: int = 0
    total_rewinds: int = 0
    retries: int = 0
    evaluations: int = 0
    despecified_until: int = 0
    deduplicated_until: int = 0
    suspected: bool = False  # its gate was open when it was last measured
    exhausted: bool = False  # a checkpoint wanted it back, and `max_evaluations` did not allow it
    pending: bool = False  # marked at a checkpoint, sent back by the scheduler step that follows
    previous: Tensor | None = None  # its denoiser input at the last step, where free signals are kept
    prompt: str | None = None  # what was asked for, where it is text and known
    caption: str | None = None  # what later tries are conditioned on instead of the prompt
    trace: list[TraceStep] = field(default_factory=list)

    @staticmethod
    def from_noise(initial: Tensor, prompt: str | None = None) -> Flight:
        """A flight for one sample's initial noise [C, H, W]; equal noise gives an equal flight."""
        digest = hashlib.sha256(initial.detach().float().cpu().contiguous().numpy().tobytes()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return Flight(generator, prompt=prompt)

    def noise(self, like: Tensor) -> Tensor:
        """Fresh standard normal noise shaped like `like`, from this sample's own generator."""
        return torch.randn(like.shape, generator=self.generator, dtype=torch.float32).to(
            like.device, like.dtype
        )


def texts_of(prompt: str | Sequence[str] | None, repeats: int, batch: int) -> list[str | None]:
    """The prompt of each of `batch` images, in diffusers' order; None where there is no text."""
    if prompt is None:
        return [None] * batch
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    return [text for text in texts for _ in range(repeats)]

"""One step of a batch, between the network and the scheduler: what measuring and guiding look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import amg.kernels as kernels
from amg.config import AMGConfig
from amg.guidance.flight import Flight
from amg.guidance.schedule import Step
from amg.kernels import STEP_COEFFICIENTS

COLUMN = {name: at for at, name in enumerate(STEP_COEFFICIENTS)}
OPEN, CLOSED = 1.0, -1.0  # similarities beside a threshold of 0: the host has decided which gates are open


class Seat(NamedTuple):
    """What the host knows of one sample at this step.

    `scale`: the request's guidance scale s0; `low`: a later try that starts with a lower one is in that part;
    `guided`: the network was read for an unconditional half, too; `plain`, `rest`: network evaluations of a
    whole run of plain sampling, and of this sample's steps that follow.
    """

    flight: Flight
    config: AMGConfig
    step: Step
    scale: float
    low: bool
    guided: bool
    plain: int
    rest: int

    @property
    def cost(self) -> int:
        """Network evaluations of this step."""
        return 2 if self.guided else 1


@dataclass(frozen=True, eq=False)
class Frame:
    """sample [B, ...] as the scheduler keeps it; output [N, ...], the network's raw one, in which `rows`
    int32 [4, B] says where each sample's unconditional (-1: none) and conditional half are; coefficients
    [B, 42] of `amg.kernels.guided_step`, gates closed; output_scale [B] or None: of the classifier-free
    guided output (Lin et al. 2023).

    history [B, T, 4] or None: free signals of each sample's first steps, up to the last one.
    ask_neighbours: (rows, captions) -> raw outputs [R, ...] of these rows conditioned on other captions.
    ask_gradient: (rows, d sigma / d x0_hat) -> d sigma / d x_t through the network, x_t as the network sees
    it; None where there is no network to ask.
    """

    seats: Sequence[Seat]
    sample: Tensor
    output: Tensor
    rows: Tensor
    coefficients: Tensor
    output_scale: Tensor | None
    history: Callable[[Sequence[int], int], Tensor]
    ask_neighbours: Callable[[Sequence[int], Sequence[str]], Tensor]
    ask_gradient: Callable[[Sequence[int], Tensor], Tensor]


class Terms(NamedTuple):
    """What opens gates in `amg.kernels.guided_step` at this step: similarity [B], None where all are closed,
    coefficients [B, 42], rows int32 [4, B], and the tensors its last two lines point into, None where no
    sample has one."""

    similarity: Tensor | None
    coefficients: Tensor
    rows: Tensor
    eps_neighbour: Tensor | None = None
    gradient: Tensor | None = None


class Predicted(NamedTuple):
    """x0_hat [B, ...] and the free signals [B, 3]."""

    x0_hat: Tensor
    signals: Tensor


def predict(frame: Frame, terms: Terms | None = None) -> Predicted:
    """x0_hat of classifier-free guidance, with `terms` of the corrected one, and the free signals."""
    sample = frame.sample
    x0_hat, signals = torch.empty_like(sample), sample.new_empty(len(sample), 3)
    apply(frame, terms, x0_hat=x0_hat, signals=signals)
    return Predicted(x0_hat, signals)


def apply(frame: Frame, terms: Terms | None, **buffers: Tensor | None) -> None:
    """`amg.kernels.guided_step_into` of a frame and the terms that act in it."""
    if terms is None:
        terms = Terms(None, frame.coefficients, frame.rows)
    kernels.guided_step_into(
        frame.sample,
        frame.output,
        frame.output,
        terms.eps_neighbour,
        terms.gradient,
        similarity=terms.similarity,
        coefficients=terms.coefficients,
        rows=terms.rows,
        output_scale=frame.output_scale,
        **buffers,
    )

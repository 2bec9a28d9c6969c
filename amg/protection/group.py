"""The samples of a batch that are at the same step; several groups at different steps share their network
calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amg.guidance.flight import Flight
from amg.guidance.predict import Conditions, Denoiser, predict


class Predicted(NamedTuple):
    """Of a group's own R rows: the denoiser's input and its raw outputs, [R, C, H, W] each, `uncond` None
    without classifier-free guidance."""

    model_input: Tensor
    uncond: Tensor | None
    cond: Tensor


@dataclass(eq=False)
class Group:
    """Samples `rows` of a batch of B, which are at step `position`.

    `sample` [B, C, H, W] and the history of `scheduler`, the group's own, hold all rows of the batch, so that
    samples may leave at any step: those of other rows are stepped along and mean nothing. `generator` is the
    caller's (one, or a list of B), None: the noise is each sample's own.
    """

    scheduler: Any
    sample: Tensor
    rows: list[int]
    position: int = 0
    generator: Any = None

    def of_rows(self, conditions: Conditions) -> Conditions:
        """The conditions of the group's own rows."""
        if len(self.rows) == len(self.sample):
            return conditions
        return conditions.take(torch.tensor(self.rows, device=self.sample.device))

    def everywhere(self, output: Tensor) -> Tensor:
        """[R, C, H, W] of the group's own rows -> [B, C, H, W], zeros elsewhere."""
        if len(self.rows) == len(self.sample):
            return output
        everywhere = output.new_zeros(len(self.sample), *output.shape[1:])
        everywhere[self.rows] = output
        return everywhere

    def noise(self, flights: Sequence[Flight]) -> Any:
        """What the scheduler draws its noise from: no sample's own generator serves another group."""
        if self.generator is not None:
            return self.generator
        own, idle = {*self.rows}, torch.Generator()
        return [flight.generator if row in own else idle for row, flight in enumerate(flights)]


def predict_together(denoiser: Denoiser, groups: Sequence[Group], conditions: Conditions) -> list[Predicted]:
    """The denoiser's outputs for the rows of all `groups`, from one call of it.

    The rows are in the batch's order, and as many as before a group split: what the call does with a row
    does not change when another one is sent back. `conditions` are the whole batch's.
    """
    times = [group.scheduler.timesteps[group.position] for group in groups]
    inputs = [seen(group.scheduler, group.sample, t) for group, t in zip(groups, times, strict=True)]
    if len(groups) == 1 and len(groups[0].rows) == len(inputs[0]):
        return [Predicted(inputs[0], *predict(denoiser, inputs[0], times[0], conditions))]
    rows = sorted(row for group in groups for row in group.rows)
    place = {row: at for at, row in enumerate(rows)}
    mine = [[place[row] for row in group.rows] for group in groups]
    together, t = inputs[0][rows], times[0].repeat(len(rows))
    for group, at, own, time in zip(groups, mine, inputs, times, strict=True):
        together[at], t[at] = own[group.rows], time
    chosen = conditions.take(torch.tensor(rows, device=together.device))
    uncond, cond = predict(denoiser, together, t, chosen)
    return [Predicted(together[at], None if uncond is None else uncond[at], cond[at]) for at in mine]


def seen(scheduler: Any, sample: Tensor, t: Any) -> Tensor:
    """x_t as the denoiser is given it; schedulers of flow matching do not scale it."""
    if not hasattr(scheduler, "scale_model_input"):
        return sample
    scaled: Tensor = scheduler.scale_model_input(sample, t)
    return scaled

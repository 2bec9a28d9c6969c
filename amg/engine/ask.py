"""What a step that looks may still ask: the neighbours' captions, a gradient through the network, signals."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amg.embed.precision import carried_back, recorded
from amg.engine.frame import COLUMN, Frame
from amg.engine.slots import Slots
from amg.guidance.predict import Conditions, joined, predict_guided, predict_neighbours


def frame_of(slots: Slots, output: Tensor, coefficients: Tensor, output_scale: Tensor | None) -> Frame:
    """This step, for those who look at it."""

    def history(rows: Sequence[int], count: int) -> Tensor:
        return slots.trace[torch.tensor(rows, device=slots.device), :count]

    def ask_neighbours(rows: Sequence[int], captions: Sequence[str]) -> Tensor:
        sample, t, conditions = _asked(slots, rows, coefficients)
        return predict_neighbours(slots.denoiser, sample.to(slots.dtype), t, conditions, captions)

    def ask_gradient(rows: Sequence[int], x0_grad: Tensor) -> Tensor:
        return _slope(slots, rows, coefficients, x0_grad)

    seats = [slot.seat(slots.row_of(slot)) for slot in slots.slots]
    return Frame(
        *(seats, slots.sample, output, slots.rows, coefficients, output_scale),
        *(history, ask_neighbours, ask_gradient),
    )


def _asked(slots: Slots, rows: Sequence[int], coefficients: Tensor) -> tuple[Tensor, Tensor, Conditions]:
    """The network's input, float32, timesteps and conditions of some samples."""
    at = torch.tensor(rows, dtype=torch.int64, device=slots.device)
    sample = slots.sample.index_select(0, at)
    scale = coefficients[at, COLUMN["scale"]].view(-1, *[1] * (sample.ndim - 1))
    t = slots.bank_t.index_select(0, slots.place.index_select(0, at))
    conditions = [slots.slots[row].conditions for row in rows]
    cond = {name: joined([one.cond[name] for one in conditions]) for name in conditions[0].cond}
    uncond = None
    if all(slots.slots[row].guided for row in rows):
        halves = [one.uncond or {} for one in conditions]
        uncond = {name: joined([half[name] for half in halves]) for name in halves[0]}
    return sample * scale, t, Conditions(cond, uncond, conditions[0].shared)


def _slope(slots: Slots, rows: Sequence[int], coefficients: Tensor, x0_grad: Tensor) -> Tensor:
    """d sigma / d x_t through the network, x_t as the network sees it: x0_hat = a·x + b·output."""
    sample, t, conditions = _asked(slots, rows, coefficients)
    at = torch.tensor(rows, dtype=torch.int64, device=slots.device)
    shape = (-1, *[1] * (sample.ndim - 1))
    a, b, scale = (coefficients[at, COLUMN[name]].view(shape) for name in ("a", "b", "scale"))
    s0 = coefficients[at, COLUMN["s0"]].view(shape)

    def x0_hat_of(leaf: Tensor) -> Tensor:
        output = predict_guided(slots.denoiser, leaf.to(slots.dtype), t, conditions, s0)
        return a / scale * leaf + b * output.float()

    leaf, x0_hat = recorded(x0_hat_of, sample)
    return carried_back(x0_hat, leaf, x0_grad).float()

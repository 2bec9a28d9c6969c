"""READ FIRST: one step of all samples in flight.

network -> (look, where something is due) -> guidance and the scheduler's update, one kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

import amg.kernels as kernels
from amg.engine.ask import frame_of
from amg.engine.frame import COLUMN, Terms
from amg.engine.measure import looks, measure
from amg.engine.noise import draw
from amg.engine.slots import Slots

S0, SCALE = COLUMN["s0"], COLUMN["scale"]


def step(slots: Slots) -> list[int]:
    """Make one step of every sample; the rows that turned out not to be finite. Between events the host reads
    nothing and decides nothing."""
    terms, broken = None, list[int]()
    eventful = slots.tick >= slots.event
    if eventful:
        slots.prepare()
    coefficients = coefficients_of(slots)
    output = predict(slots, coefficients)
    scale = rescaled(slots, output, coefficients)
    if eventful:
        terms, broken = attend(slots, output, coefficients, scale)
    update(slots, output, coefficients, scale, terms)
    slots.tick += 1
    return broken


def coefficients_of(slots: Slots) -> Tensor:
    """Each sample's row of its plan, float32 [B, 42]."""
    coefficients = slots.bank.index_select(0, slots.place)
    if slots.lowered:
        coefficients[:, S0] = slots.s0
    return coefficients


def predict(slots: Slots, coefficients: Tensor) -> Tensor:
    """The network's raw output [N, ...]: the unconditional halves of the samples that have one, then the
    conditional ones of all, in one call."""
    sample = slots.sample
    if slots.scaled:
        sample = sample * coefficients[:, SCALE].view(-1, *[1] * (sample.ndim - 1))
    if slots.alike:
        first = slots.slots[0]
        t = first.plan.t[slots.row_of(first)]
    else:
        t = slots.bank_t.index_select(0, slots.place).index_select(0, slots.gather)
    model_input = sample.index_select(0, slots.gather)
    if model_input.dtype != slots.dtype:
        model_input = model_input.to(slots.dtype)
    return slots.denoiser.network(model_input, t, **slots.conditions).contiguous()


def rescaled(slots: Slots, output: Tensor, coefficients: Tensor) -> Tensor | None:
    """What classifier-free guidance's output is multiplied by, [B], where somebody asked for it: Lin et al.
    2023 (arXiv 2305.08891), section 3.4; None where nobody did."""
    if slots.rescale is None:
        return None
    uncond, cond = slots.rows[:2].long()
    eps_cond = output.index_select(0, cond).float()
    eps_uncond = output.index_select(0, torch.where(uncond < 0, cond, uncond)).float()
    s0 = coefficients[:, S0].view(-1, *[1] * (output.ndim - 1))
    guided = eps_uncond + s0 * (eps_cond - eps_uncond)
    ratio = eps_cond.flatten(1).std(1) / guided.flatten(1).std(1)
    return torch.where(slots.rescale > 0, slots.rescale * ratio + (1 - slots.rescale), 1.0)


def attend(
    slots: Slots, output: Tensor, coefficients: Tensor, scale: Tensor | None
) -> tuple[Terms | None, list[int]]:
    """Look at the samples that are due: what acts in this step, and the rows that are not finite."""
    for slot in slots.slots:
        slot.count(slots.row_of(slot) + 1)
    tools = slots.slots[0].job.tools
    frame = frame_of(slots, output, coefficients, scale)
    if not any(looks(seat, tools.gate) for seat in frame.seats):
        return None, []
    found = measure(frame, tools)
    slots.note(found.notes)
    return found.terms, found.broken


def update(
    slots: Slots, output: Tensor, coefficients: Tensor, scale: Tensor | None, terms: Terms | None
) -> None:
    """Guide and make each scheduler's step, in one pass; keep the free signals."""
    if terms is None:
        terms = Terms(None, coefficients, slots.rows)
    kernels.guided_step_into(
        slots.sample,
        output,
        output,
        terms.eps_neighbour,
        terms.gradient,
        similarity=terms.similarity,
        noise=draw(slots, output.dtype) if slots.drawing else None,
        coefficients=terms.coefficients,
        rows=terms.rows,
        state=slots.state,
        output_scale=scale,
        prev_sample=slots.spare,
        signals=slots.signals,
        flags=slots.flags,
    )
    slots.sample, slots.spare = slots.spare, slots.sample
    if slots.kept is not None:
        keep(slots)
    slots.trace.view(-1, 4).index_copy_(0, slots.traced, slots.signals)
    slots.cursor.add_(1)


def keep(slots: Slots) -> None:
    """Put what is not painted of the pictures that were put in back around the mask, as noisy as the samples
    are now."""
    assert slots.kept is not None and slots.bank_after is not None
    mask, picture, noise = slots.kept
    alpha, sigma = slots.bank_after.index_select(0, slots.place).view(-1, 2, 1, 1, 1).unbind(1)
    slots.sample.mul_(mask).add_((1 - mask) * (alpha * picture + sigma * noise))

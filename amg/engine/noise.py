"""The noise of a step, from the caller's generators in the order and dtype that the pipeline would use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amg.engine.job import Job
from amg.engine.slots import Slots


def draw(slots: Slots, output_dtype: torch.dtype) -> Tensor:
    """Noise [B, ...] of a step, 0 where none is drawn.

    On its first run a request draws as its pipeline does: for all its images at once, whether or not some are
    gone. A sample that was sent back draws from its own generator.
    """
    noise = torch.zeros_like(slots.sample)
    drawn: dict[Job, Tensor] = {}
    for at, slot in enumerate(slots.slots):
        table, row = slot.plan.table, slots.row_of(slot)
        if not table.draws[row]:
            continue
        dtype = table.noise_dtype or output_dtype
        if not slot.first:
            shape = (1, *slots.sample.shape[1:])
            noise[at] = standard_normal(shape, slot.flight.generator, slots.device, dtype)[0]
            continue
        if slot.job not in drawn:
            shape = (len(slot.job), *slots.sample.shape[1:])
            drawn[slot.job] = standard_normal(shape, slot.job.generator, slots.device, dtype)
        noise[at] = drawn[slot.job][slot.place]
    return noise


def standard_normal(
    shape: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """As diffusers draws it: where the generator is, one row at a time from a list of them."""
    if isinstance(generator, Sequence):
        rows = [standard_normal((1, *shape[1:]), one, device, dtype) for one in generator]
        return torch.cat(rows)
    place = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=place, dtype=dtype).to(device)

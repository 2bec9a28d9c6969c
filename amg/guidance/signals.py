"""Free signals: what plain classifier-free guidance already knows of a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from amg.guidance.flight import Flight
from amg.verdict import TraceStep

SIGNALS = ("gap", "mean_gap", "cosine", "move", "region")


def free_signals(raw: Tensor, mean: Tensor, deviation: Tensor) -> dict[str, Tensor]:
    """Every free signal as it is known at each step before the scheduler steps, float64 [N, T] each.

    raw: [N, T, 4] in the order of `amg.kernels.guided_step`: ‖ε_c − ε_u‖², ⟨ε_u, ε_c − ε_u⟩, ‖ε_u‖²,
    ‖x_{t−1} − x_t‖²; the last of step T − 1 is not read. mean, deviation: μ_t, τ_t of ‖x_{t−1} − x_t‖, at
    least [T − 1].
    "gap" m_t = ‖ε_c − ε_u‖, "mean_gap" its running mean, "cosine" cos(ε_u, ε_c − ε_u) over the whole sample
    (0 where either is 0), "move" ‖x_{t−1} − x_t‖ of the step before, "region" the running maximum of
    |move − μ_t| / τ_t; the last two are 0 at the first step.
    """
    raw = raw.double()
    gap, none = raw[..., 0].sqrt(), raw.new_zeros(len(raw), 1)
    steps = torch.arange(1, raw.shape[1] + 1, dtype=torch.float64)
    norms = gap * raw[..., 2].sqrt()
    moves = raw[:, :-1, 3].sqrt()
    outside = (moves - mean[: moves.shape[1]]).abs() / deviation[: moves.shape[1]]
    return {
        "gap": gap,
        "mean_gap": gap.cumsum(1) / steps,
        "cosine": torch.where(norms > 0, raw[..., 1] / norms, 0.0),
        "move": torch.cat([none, moves], 1),
        "region": torch.cat([none, outside.cummax(1).values if moves.shape[1] else outside], 1),
    }


def raw_signals(traces: Sequence[Sequence[TraceStep]], now: Sequence[Sequence[float]] = ()) -> Tensor:
    """The `raw` of `free_signals` out of traces, float64 [N, T, 4]; `now`: those of a step not yet traced."""
    rows = [[list(step.signals or ()) for step in trace] for trace in traces]
    for row, current in zip(rows, now, strict=bool(now)):
        row.append(list(current))
    padded = [[(*signals, 0.0)[:4] for signals in row] for row in rows]
    return torch.tensor(padded, dtype=torch.float64)


def note_moves(flights: Sequence[Flight], sample: Tensor, position: int) -> None:
    """At step `position`, before the denoiser's output is guided: tell the step before how far it moved.

    sample: the denoiser's (variance preserving) input [B, C, H, W]. The trace's last step gains its fourth
    signal, ‖x_{t−1} − x_t‖²; a sample that has just gone back keeps three there.
    """
    rows = [row for row, flight in enumerate(flights) if flight.trace and flight.previous is not None]
    rows = [row for row in rows if flights[row].trace[-1].step == position - 1]
    if rows:
        before = torch.stack([flights[row].previous for row in rows])  # type: ignore[misc]
        moved = (sample[rows].float() - before.float()).flatten(1).square().sum(1).tolist()
        for row, distance in zip(rows, moved, strict=True):
            last = flights[row].trace[-1]
            assert last.signals is not None
            flights[row].trace[-1] = replace(last, signals=(*last.signals[:3], distance))
    for flight, row in zip(flights, sample, strict=True):
        flight.previous = row

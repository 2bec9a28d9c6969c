"""Free signals: what plain classifier-free guidance already knows of a sample."""

from __future__ import annotations

import torch
from torch import Tensor

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
    steps = torch.arange(1, raw.shape[1] + 1, dtype=torch.float64, device=raw.device)
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

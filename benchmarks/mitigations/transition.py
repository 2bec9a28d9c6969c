"""Guidance that starts late: Jain et al., CVPR 2025 (arXiv 2411.16738)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mitigations.interface import Drawn
from mitigations.loop import Step, decode, denoise, start


@dataclass(frozen=True)
class StaticTransition:
    """STP: guidance `before` while t > `transition`, s0 from then on. Opposite guidance (OG) is the same with
    a negative `before` (-2 until 650 in the paper)."""

    transition: float = 500.0
    before: float = 0.0

    def draw(
        self,
        pipe: Any,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        steps: int,
        guidance_scale: float,
    ) -> Drawn:
        def scale(step: Step) -> Tensor:
            chosen = self.before if step.t > self.transition else guidance_scale
            return torch.full((len(step.sample),), chosen, dtype=step.sample.dtype, device=step.sample.device)

        begin = start(pipe, prompts, generators, steps, guidance_scale)
        return Drawn(decode(pipe, denoise(begin, scale)), 2.0 * steps)


@dataclass(frozen=True)
class DynamicTransition:
    """DTP: guidance `before` up to the first local minimum of m_t = ||eps_cond - eps_uncond||_2, then s0;
    image by image. At most until t <= `latest`."""

    before: float = 0.0
    latest: float = 0.0

    def draw(
        self,
        pipe: Any,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        steps: int,
        guidance_scale: float,
    ) -> Drawn:
        begin = start(pipe, prompts, generators, steps, guidance_scale)
        history: list[Tensor] = []

        def scale(step: Step) -> Tensor:
            history.append((step.eps_cond - step.eps_uncond).flatten(1).norm(dim=1))
            late = past_minimum(history) | (step.t <= self.latest)
            before = torch.full_like(history[-1], self.before)
            return torch.where(late, guidance_scale, before)

        return Drawn(decode(pipe, denoise(begin, scale)), 2.0 * steps)


def past_minimum(history: Sequence[Tensor]) -> Tensor:
    """Whether each image has passed a local minimum: some i with m[i-2] > m[i-1] < m[i]; m [B] per step."""
    passed = torch.zeros_like(history[0], dtype=torch.bool)
    for i in range(2, len(history)):
        passed |= (history[i - 2] > history[i - 1]) & (history[i - 1] < history[i])
    return passed

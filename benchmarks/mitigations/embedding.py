"""Prompt-embedding optimisation: Wen et al., ICLR 2024 (arXiv 2407.21720), section 5.1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mitigations.interface import Drawn
from mitigations.loop import Start, decode, denoise, model_input, predict, start


@dataclass(frozen=True)
class PromptOptimisation:
    """At the first step, minimise m = ||eps_cond - eps_uncond||_2 over the prompt's embedding, all tokens but
    the first, with AdamW; an image stops once its m <= target, after `iterations` at the latest."""

    target: float | None = None
    """m is in the units of the model's latents: 3 for Stable Diffusion 1.4 in the authors' code. None: never
    reached."""
    iterations: int = 10
    learning_rate: float = 0.05

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
        cond, extra = optimised(begin, self.target, self.iterations, self.learning_rate)
        images = decode(pipe, denoise(replace(begin, cond=cond)))
        return Drawn(images, 2.0 * steps + extra.mean().item())


def magnitude(begin: Start, sample: Tensor, cond: Tensor) -> Tensor:
    """m [B] = ||eps_cond - eps_uncond||_2 of the first step."""
    eps_uncond, eps_cond = predict(begin, 0, sample, cond)
    return (eps_cond - eps_uncond).flatten(1).norm(dim=1)


def optimised(
    begin: Start, target: float | None, iterations: int, learning_rate: float
) -> tuple[Tensor, Tensor]:
    """(embeddings [B, L, D], evaluations [B] spent): AdamW on the sum over images, so rows do not mix."""
    sample = model_input(begin, 0, begin.sample)
    first = begin.cond[:, :1].detach()
    rest = begin.cond[:, 1:].detach().clone().requires_grad_()
    optimiser = torch.optim.AdamW([rest], lr=learning_rate)
    active = torch.ones(len(rest), dtype=torch.bool, device=rest.device)
    spent = torch.zeros(len(rest), device=rest.device)
    for _ in range(iterations):
        with torch.enable_grad():
            m = magnitude(begin, sample, torch.cat([first, rest], 1))
            (gradient,) = torch.autograd.grad(m.sum(), rest)
        spent += 2.0 * active
        if target is not None:
            active &= m.detach() > target
        if not active.any():
            break
        before, rest.grad = rest.detach().clone(), gradient
        optimiser.step()
        with torch.no_grad():
            rest.copy_(torch.where(active[:, None, None], rest, before))
    return torch.cat([first, rest.detach()], 1), spent

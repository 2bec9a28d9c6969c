"""Initial-noise optimisation: SAIL, Jeon et al., ICML 2025 (arXiv 2412.04140), algorithm 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mitigations.interface import Drawn
from mitigations.loop import Start, decode, denoise, model_input, predict, start

FORMS = ("paper", "released")


@dataclass(frozen=True)
class SharpnessAwareNoise:
    """Minimise the sharpness of the guidance at x_T over x_T itself, with Adam.

    s = -(eps_cond - eps_uncond) / sqrt(1 - alpha_bar), taken at x_T and at x_T + delta·s. `form="paper"`:
    ||s(x_T + delta·s(x_T)) - s(x_T)||² + alpha·||x_T||². `form="released"`, what the authors' code computes:
    with d = eps_cond - eps_uncond, ||d(x_T + delta·d/||d||)|| + alpha·||x_T||, delta = 1, alpha = 0.05.
    An image stops once its loss <= target (8.2 for Stable Diffusion 1.4 there), after `iterations` at the
    latest; the authors' code draws other noise then, here the last x_T is taken.
    """

    delta: float = 1.0
    alpha: float = 0.05
    target: float | None = None
    iterations: int = 10
    learning_rate: float = 0.05
    form: str = "released"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"`form` must be one of {FORMS}, got {self.form!r}")

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
        sample, extra = optimised(begin, self)
        return Drawn(decode(pipe, denoise(replace(begin, sample=sample))), 2.0 * steps + extra.mean().item())


def loss(begin: Start, sample: Tensor, options: SharpnessAwareNoise) -> Tensor:
    """The loss [B] at the denoiser's first input `sample` [B, C, h, w]; see the class."""

    def difference(at: Tensor) -> Tensor:
        eps_uncond, eps_cond = predict(begin, 0, at)
        return eps_cond - eps_uncond

    def norm(x: Tensor) -> Tensor:
        return x.flatten(1).norm(dim=1)

    here = difference(sample)
    if options.form == "released":
        there = difference(sample + options.delta * here / norm(here)[:, None, None, None])
        return norm(there) + options.alpha * norm(sample)
    deviation = (1 - begin.prediction(0).alpha_bar) ** 0.5
    score = -here / deviation
    moved = -difference(sample + options.delta * score) / deviation
    return norm(moved - score) ** 2 + options.alpha * norm(sample) ** 2


def optimised(begin: Start, options: SharpnessAwareNoise) -> tuple[Tensor, Tensor]:
    """(x_T [B, C, h, w] in the scheduler's scale, evaluations [B] spent); Adam on the sum over images."""
    seen = model_input(begin, 0, begin.sample)
    scale = begin.sample.norm() / seen.norm()  # 1, or more for schedulers that work in sigmas
    sample = seen.detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([sample], lr=options.learning_rate)
    active = torch.ones(len(sample), dtype=torch.bool, device=sample.device)
    spent = torch.zeros(len(sample), device=sample.device)
    for _ in range(options.iterations):
        with torch.enable_grad():
            values = loss(begin, sample, options)
            (gradient,) = torch.autograd.grad(values.sum(), sample)
        spent += 4.0 * active
        if options.target is not None:
            active &= values.detach() > options.target
        if not active.any():
            break
        before, sample.grad = sample.detach().clone(), gradient
        optimiser.step()
        with torch.no_grad():
            sample.copy_(torch.where(active[:, None, None, None], sample, before))
    return (begin.sample if not options.iterations else sample.detach() * scale), spent

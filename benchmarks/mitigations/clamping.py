"""Latent-update clamping: "Broken Memories", Huang et al., KDD 2026 (arXiv 2605.22050)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mitigations.interface import Drawn
from mitigations.loop import Step, decode, denoise, start


class Region(NamedTuple):
    """Mean and deviation over ordinary generations, float [steps] each, of ||x_{t-1} - x_t||, ||x_{t-1}|| and
    ||x0_hat||; they hold for one model, scheduler, guidance scale and number of steps."""

    update: Tensor
    update_spread: Tensor
    sample: Tensor
    sample_spread: Tensor
    x0: Tensor
    x0_spread: Tensor


@dataclass(frozen=True)
class UpdateClamping:
    """Step by step and image by image, with delta_t = x_{t-1} - x_t of the step about to be taken and
    s_t = | ||delta_t|| - mu_t | / tau_t.

    s_t > `leave`: ||x0_hat|| is rescaled to its calibrated mean and the step is taken from there. s_t >
    `strong`: then ||delta_t|| and ||x_{t-1}|| too are clamped into mean ± `leave`·deviation.
    """

    region: Region
    leave: float = 3.0
    strong: float = 6.0

    def draw(
        self,
        pipe: Any,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        steps: int,
        guidance_scale: float,
    ) -> Drawn:
        if len(self.region.update) != steps:
            raise ValueError(f"`region` must be calibrated for {steps} steps, got {len(self.region.update)}")
        begin = start(pipe, prompts, generators, steps, guidance_scale)
        scores: list[Tensor] = []

        def correct(step: Step, eps: Tensor, peek: Callable[[Tensor], Tensor]) -> Tensor:
            scores.append(score(peek(eps) - step.sample, self.region, step.number))
            rescaled = eps_of_norm(eps, step, self.region.x0[step.number].item())
            return torch.where(_wide(scores[-1] > self.leave), rescaled, eps)

        def clamp(step: Step, previous: Tensor) -> Tensor:
            held = clamped(step.sample, previous, self.region, step.number, self.leave)
            return torch.where(_wide(scores[-1] > self.strong), held, previous)

        return Drawn(decode(pipe, denoise(begin, None, correct, clamp)), 2.0 * steps)


def score(update: Tensor, region: Region, step: int) -> Tensor:
    """s_t [B] of the updates delta_t [B, C, h, w] at `step`."""
    return (norms(update) - region.update[step]).abs() / region.update_spread[step]


def eps_of_norm(eps: Tensor, step: Step, norm: float) -> Tensor:
    """The noise prediction whose x0_hat points the same way and has this norm."""
    noise, signal = math.sqrt(1 - step.alpha_bar), math.sqrt(step.alpha_bar)
    x0_hat = (step.model_input - noise * eps) / signal
    return (step.model_input - signal * x0_hat * (norm / _wide(norms(x0_hat)))) / noise


def clamped(sample: Tensor, previous: Tensor, region: Region, step: int, width: float) -> Tensor:
    """x_{t-1} with ||x_{t-1} - x_t||, then ||x_{t-1}||, clamped into mean ± width·deviation."""
    update = previous - sample
    held = sample + _within(update, region.update[step], region.update_spread[step], width)
    return _within(held, region.sample[step], region.sample_spread[step], width)


def _within(x: Tensor, mean: Tensor, spread: Tensor, width: float) -> Tensor:
    size = norms(x)
    return x * _wide(size.clamp((mean - width * spread).item(), (mean + width * spread).item()) / size)


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    *,
    steps: int,
    guidance_scale: float,
    batch: int = 16,
) -> Region:
    """The region of ordinary generations: plain guidance on `prompts`, one image each, at least two."""
    if len(prompts) < 2:
        raise ValueError(f"`prompts` must be at least two, got {len(prompts)}")
    sizes = []
    for first in range(0, len(prompts), batch):
        rows = slice(first, first + batch)
        begin = start(pipe, prompts[rows], generators[rows], steps, guidance_scale)
        kept: list[Tensor] = []

        def keep(step: Step, previous: Tensor, kept: list[Tensor] = kept) -> Tensor:
            difference = step.eps_cond - step.eps_uncond
            eps = step.eps_uncond + guidance_scale * difference
            x0_hat = (step.model_input - math.sqrt(1 - step.alpha_bar) * eps) / math.sqrt(step.alpha_bar)
            kept.append(torch.stack([norms(previous - step.sample), norms(previous), norms(x0_hat)]))
            return previous

        denoise(begin, clamp=keep)
        sizes.append(torch.stack(kept))  # [steps, 3, B]
    whole = torch.cat(sizes, -1)
    mean, spread = whole.mean(-1).unbind(1), whole.std(-1).unbind(1)
    return Region(mean[0], spread[0], mean[1], spread[1], mean[2], spread[2])


def norms(x: Tensor) -> Tensor:
    """||x||_2 of each image, [B]."""
    return x.flatten(1).norm(dim=1)


def _wide(x: Tensor) -> Tensor:
    return x[:, None, None, None]

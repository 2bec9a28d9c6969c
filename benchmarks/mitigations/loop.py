"""READ FIRST: the one denoising loop that the rival mitigations share, prompt -> x_T -> eps -> step -> image.

Without a rule it draws what `StableDiffusionPipeline` draws, bit for bit where the scheduler is
deterministic.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from amg.engine.level import Level, levels
from amg.guidance.schedule import LEAST_ALPHA_BAR, Prediction


@dataclass(frozen=True)
class Start:
    """What the loop starts from: x_T [B, C, h, w], the embeddings `cond`, `uncond` [B, L, D], and a scheduler
    of its own with its timesteps set."""

    pipe: Any
    scheduler: Any
    sample: Tensor
    cond: Tensor
    uncond: Tensor
    generators: Sequence[torch.Generator]
    guidance_scale: float

    def prediction(self, step: int) -> Prediction:
        """Conversions between the network's output and the noise prediction at `step`."""
        kind = getattr(self.scheduler.config, "prediction_type", "epsilon")
        return Prediction(kind, max(self._levels[step].alpha_bar, LEAST_ALPHA_BAR))

    @functools.cached_property
    def _levels(self) -> tuple[Level, ...]:
        return levels(self.scheduler)


class Step(NamedTuple):
    """One step as a rule sees it: its number, t on the 0-1000 scale, alpha_bar, the scheduler's x_t, what the
    denoiser sees of it and the two noise predictions, [B, C, h, w] each."""

    number: int
    t: float
    alpha_bar: float
    sample: Tensor
    model_input: Tensor
    eps_uncond: Tensor
    eps_cond: Tensor


Scale = Callable[[Step], Tensor]  # the guidance scale [B] of each image at this step
Correct = Callable[[Step, Tensor, Callable[[Tensor], Tensor]], Tensor]
Clamp = Callable[[Step, Tensor], Tensor]


def start(
    pipe: Any,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    steps: int,
    guidance_scale: float,
) -> Start:
    """Encode the prompts and draw x_T, one generator per image. ValueError naming what does not fit."""
    if len(prompts) != len(generators) or not prompts:
        raise ValueError(
            f"`generators` must be one per prompt, got {len(generators)} for {len(prompts)} prompts"
        )
    if steps < 1:
        raise ValueError(f"`steps` must be >= 1, got {steps}")
    device, unet = pipe._execution_device, pipe.unet
    cond, uncond = pipe.encode_prompt(list(prompts), device, 1, True)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps, device=device)
    size = unet.config.sample_size
    shape = (len(prompts), unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
    noise = randn_tensor(shape, generator=list(generators), device=device, dtype=cond.dtype)
    return Start(
        pipe, scheduler, noise * scheduler.init_noise_sigma, cond, uncond, list(generators), guidance_scale
    )


def predict(begin: Start, step: int, sample: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(eps_uncond, eps_cond) at the denoiser's input `sample`, in one call of 2B rows; differentiable."""
    embeddings = torch.cat([begin.uncond, begin.cond if cond is None else cond])
    t = begin.scheduler.timesteps[step]
    output = begin.pipe.unet(
        torch.cat([sample, sample]), t, encoder_hidden_states=embeddings, return_dict=False
    )[0]
    convert = begin.prediction(step)
    output_uncond, output_cond = output.chunk(2)
    return convert.to_eps(output_uncond, sample), convert.to_eps(output_cond, sample)


def model_input(begin: Start, step: int, sample: Tensor) -> Tensor:
    """What the denoiser sees of the scheduler's own x_t; leaves the scheduler where it was."""
    scaled: Tensor = copy.deepcopy(begin.scheduler).scale_model_input(sample, begin.scheduler.timesteps[step])
    return scaled


@torch.no_grad()
def denoise(
    begin: Start, scale: Scale | None = None, correct: Correct | None = None, clamp: Clamp | None = None
) -> Tensor:
    """Run all steps and return x_0, [B, C, h, w].

    scale(step): the guidance scale of each image, s0 without it. correct(step, eps_guided, peek): another
    eps_guided; `peek` maps a noise prediction to the x_{t-1} it would give. clamp(step, x_{t-1}): another
    x_{t-1}.
    """
    scheduler, sample = begin.scheduler, begin.sample
    arguments = _arguments(scheduler, begin.generators)
    for index, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(sample, t)
        convert = begin.prediction(index)
        step = Step(index, float(t), convert.alpha_bar, sample, seen, *predict(begin, index, seen))
        chosen = begin.guidance_scale if scale is None else scale(step)[:, None, None, None]
        eps_guided = step.eps_uncond + chosen * (step.eps_cond - step.eps_uncond)
        if correct is not None:
            eps_guided = correct(step, eps_guided, _peek(scheduler, convert, step, arguments))
        output = convert.from_eps(eps_guided, seen)
        previous = scheduler.step(output, t, sample, **arguments)[0]
        sample = previous if clamp is None else clamp(step, previous)
    return sample


def _peek(
    scheduler: Any, convert: Prediction, step: Step, arguments: dict[str, Any]
) -> Callable[[Tensor], Tensor]:
    """The step as a function of the noise prediction, taken on a copy of the scheduler."""

    def taken(eps: Tensor) -> Tensor:
        output, t = convert.from_eps(eps, step.model_input), scheduler.timesteps[step.number]
        previous: Tensor = copy.deepcopy(scheduler).step(output, t, step.sample, **arguments)[0]
        return previous

    return taken


@torch.no_grad()
def decode(pipe: Any, sample: Tensor) -> Tensor:
    """x_0 -> images float32 [B, 3, H, W] in [0, 1], as the pipeline does it."""
    image = pipe.vae.decode(sample / pipe.vae.config.scaling_factor, return_dict=False)[0]
    return pipe.image_processor.postprocess(image, output_type="pt").float()


def _arguments(scheduler: Any, generators: Sequence[torch.Generator]) -> dict[str, Any]:
    known = inspect.signature(scheduler.step).parameters
    return {"return_dict": False, **({"generator": list(generators)} if "generator" in known else {})}

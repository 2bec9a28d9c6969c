"""Step coefficients out of a diffusers scheduler, the parameterisations, and the schedules of lambda_t.

Schedulers are read through their public attributes only (`alphas_cumprod`, `sigmas`, `timesteps`, `config`),
so this module does not import diffusers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

import amg.kernels as kernels
from amg.engine.drive import Refused
from amg.engine.level import Level, levels

# With a zero terminal signal-to-noise ratio alpha_bar is 0 and x0_hat a quotient of zeros; at this floor it
# is right to three digits in float32.
LEAST_ALPHA_BAR = 1e-6
KINDS = ("epsilon", "v_prediction", "sample")


class Step(NamedTuple):
    """Where in the trajectory a batch is: step `position` of `total`, the scheduler's `t`, alpha_bar and
    lambda_t."""

    position: int
    total: int
    t: Any
    alpha_bar: float
    threshold: float


def levels_of(scheduler: Any) -> tuple[Level, ...]:
    """The level of every step of a scheduler whose timesteps are set. Errors: `Refused`, a ValueError, where
    it tells none, and for flow matching, whose output is none of `KINDS`."""
    found = levels(scheduler)
    if found and found[0].kind == "flow":
        raise Refused(scheduler, f"it is of flow matching, and an output must be one of {KINDS}")
    return found


def threshold_at(
    schedule: str, lambda_min: float, lambda_max: float, alpha_bar: float, t: float, decay: float = 0.005
) -> float:
    """lambda_t. `t` is on the 0-1000 scale; see `AMGConfig.threshold_schedule` for the three formulas."""
    if schedule == "constant":
        return lambda_max
    if schedule == "parabolic":
        return lambda_min + (lambda_max - lambda_min) * alpha_bar**2
    if schedule == "exponential":
        return lambda_min + (lambda_max - lambda_min) * math.exp(-decay * t)
    raise ValueError(f'`schedule` must be "parabolic", "constant" or "exponential", got {schedule!r}')


class Prediction(NamedTuple):
    """Conversions between a denoiser's output and the noise prediction at one step, affine.

    epsilon: eps = m. v_prediction: eps = sqrt(alpha_bar)·v + sqrt(1 - alpha_bar)·x_t.
    sample: eps = (x_t - sqrt(alpha_bar)·x0) / sqrt(1 - alpha_bar).
    Computed in float32 or wider, whatever the denoiser's dtype is, and so returned by `to_eps`.
    """

    kind: str
    alpha_bar: float

    def to_eps(self, output: Tensor, sample: Tensor) -> Tensor:
        """Noise prediction from the denoiser's `output` at `sample`, both [B, C, H, W]."""
        signal, noise = math.sqrt(self.alpha_bar), math.sqrt(1 - self.alpha_bar)
        output, sample = _wide(output), _wide(sample)
        if self.kind == "epsilon":
            return output
        if self.kind == "v_prediction":
            return signal * output + noise * sample
        if self.kind == "sample":
            return (sample - signal * output) / noise
        raise self._unknown()

    def from_eps(self, eps: Tensor, sample: Tensor) -> Tensor:
        """The denoiser output that stands for the noise prediction `eps`, in its dtype: the inverse of
        `to_eps`."""
        signal, noise = math.sqrt(self.alpha_bar), math.sqrt(1 - self.alpha_bar)
        if self.kind == "v_prediction":
            return ((_wide(eps) - noise * _wide(sample)) / signal).to(eps.dtype)
        if self.kind == "sample":
            return ((_wide(sample) - noise * _wide(eps)) / signal).to(eps.dtype)
        if self.kind != "epsilon":
            raise self._unknown()
        return eps

    def _unknown(self) -> ValueError:
        return ValueError(f"`prediction_type` must be one of {KINDS}, got {self.kind!r}")

    def x0_hat(self, eps: Tensor, sample: Tensor) -> Tensor:
        """x0_hat = (x_t - sqrt(1 - alpha_bar)·eps) / sqrt(alpha_bar)."""
        return (_wide(sample) - math.sqrt(1 - self.alpha_bar) * _wide(eps)) / math.sqrt(self.alpha_bar)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class StepCoefficients(NamedTuple):
    """prev_sample = k_sample·sample + k_eps·eps + k_noise·noise."""

    k_sample: float
    k_eps: float
    k_noise: float


def step_coefficients(scheduler: Any, step: int, eta: float = 0.0) -> StepCoefficients:
    """The closed form of one DDPM, DDIM (any eta) or Euler step without clipping; raises for other
    schedulers.

    `sample` is the scheduler's own x_t (for Euler the unscaled one). Source: Ho et al. 2020, eq. 6-7
    (variance "fixed_small"); Song et al. 2021, eq. 12; Karras et al. 2022, algorithm 2 without churn.
    """
    kind = type(scheduler).__name__
    if kind == "EulerDiscreteScheduler":
        return StepCoefficients(1.0, float(scheduler.sigmas[step + 1] - scheduler.sigmas[step]), 0.0)
    if kind not in ("DDIMScheduler", "DDPMScheduler"):
        raise ValueError(
            f"`scheduler` must be a DDPM, DDIM or Euler scheduler for a closed-form step, got {kind}"
        )
    variance_type = getattr(scheduler.config, "variance_type", "fixed_small")
    if variance_type not in ("fixed_small", "fixed_small_log"):
        raise ValueError(f'`scheduler` must have variance_type "fixed_small", got {variance_type!r}')
    t = int(scheduler.timesteps[step])
    previous = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    if kind == "DDPMScheduler":
        previous = int(scheduler.previous_timestep(t))
    alpha_bar = float(scheduler.alphas_cumprod[t])
    last = 1.0 if kind == "DDPMScheduler" else float(scheduler.final_alpha_cumprod)
    alpha_bar_previous = float(scheduler.alphas_cumprod[previous]) if previous >= 0 else last
    variance = (1 - alpha_bar_previous) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_previous)
    spread = math.sqrt(max(variance, 0.0)) * (1.0 if kind == "DDPMScheduler" else eta)
    if kind == "DDPMScheduler" and t == 0:
        spread = 0.0
    deviation = math.sqrt(max(1 - alpha_bar_previous - spread**2, 0.0))
    k_sample = math.sqrt(alpha_bar_previous / alpha_bar)
    if kind == "DDPMScheduler":
        # the posterior mean equals DDIM with eta = 1
        deviation = math.sqrt(max(1 - alpha_bar_previous - variance, 0.0))
    return StepCoefficients(k_sample, deviation - k_sample * math.sqrt(1 - alpha_bar), spread)


def eps_coefficients(
    alpha_bar: float, s0: Tensor, s1: Tensor | None = None, s2: Tensor | None = None
) -> Tensor:
    """Coefficients float32 [R, 10] for `amg.kernels.guided_step` whose "prev_sample" is eps_guided: k_eps = 1
    and nothing else of x_t; every gate open, and with a similarity of 1 the scales are s1 and s2."""
    fixed = (0.0, 1.0, 0.0, (1 - alpha_bar) ** 0.5, alpha_bar**-0.5, 0.0, 0.0, 0.0, 0.0, 0.0)
    table = torch.tensor(fixed, dtype=torch.float32, device=s0.device).repeat(len(s0), 1)
    for name, scale in (("s0", s0), ("c1", s1), ("c2", s2)):
        if scale is not None:
            table[:, kernels.COEFFICIENTS.index(name)] = scale
    return table

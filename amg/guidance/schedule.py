"""Step coefficients out of a diffusers scheduler, the parameterisations, and the schedules of lambda_t.

Schedulers are read through their public attributes only (`alphas_cumprod`, `sigmas`, `timesteps`, `config`),
so this module does not import diffusers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amg.engine.drive import Refused
from amg.engine.level import Level, levels

# With a zero terminal signal-to-noise ratio alpha_bar is 0 and x0_hat a quotient of zeros; at this floor it
# is right to three digits in float32.
LEAST_ALPHA_BAR = 1e-6
KINDS = ("epsilon", "v_prediction", "sample")


class Step(NamedTuple):
    """Where in the trajectory a batch is: step `position` of `total`, the scheduler's `t`, alpha_bar and
    lambda_t; `level`, as the scheduler keeps x_t, where the loop is another's."""

    position: int
    total: int
    t: Any
    alpha_bar: float
    threshold: float
    level: Level | None = None


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

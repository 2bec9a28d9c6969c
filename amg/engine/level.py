"""Where a step is: alpha and sigma of x_t = alpha·x0 + sigma·eps as the scheduler keeps it, and what the
network's output says there (ALGORITHM: one algebra for every parameterisation)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amg.engine.drive import Refused, in_double, input_scale, make_step, option, quietly, started, timed

KINDS = {"epsilon": "epsilon", "v_prediction": "v_prediction", "sample": "sample", "flow_prediction": "flow"}
SCALE_TOLERANCE = 1e-6
OWN_TOLERANCE = 1e-5
SMALL = 1e-6  # of a clip range: what no clipping touches


class Level(NamedTuple):
    """One step's place. `kind`: what the network predicts; `scale`: its input is scale·x_t."""

    kind: str
    scale: float
    alpha: float
    sigma: float

    @property
    def size(self) -> float:
        """sqrt(alpha² + sigma²): how large x_t is."""
        return math.hypot(self.alpha, self.sigma)

    @property
    def alpha_bar(self) -> float:
        """Of the variance-preserving x_t: alpha² / (alpha² + sigma²)."""
        return (self.alpha / self.size) ** 2

    @property
    def x0_hat(self) -> tuple[float, float]:
        """(a, b) of x0_hat = a·x_t + b·output."""
        if self.kind == "sample":
            return 0.0, 1.0
        if self.kind == "flow":
            return 1.0, -self.sigma
        if self.kind == "v_prediction":
            return self.alpha / self.size**2, -self.sigma / self.size
        if self.alpha == 0:
            return math.nan, math.nan
        return 1 / self.alpha, -self.sigma / self.alpha

    def exact(self, x0: Tensor, eps: Tensor) -> Tensor:
        """The output of a network that knows both."""
        if self.kind == "sample":
            return x0
        if self.kind == "flow":
            return eps - x0
        if self.kind == "v_prediction":
            return (self.alpha * eps - self.sigma * x0) / self.size
        return eps

    def sample(self, x0: Tensor, eps: Tensor) -> Tensor:
        """x_t = alpha·x0 + sigma·eps."""
        return self.alpha * x0 + self.sigma * eps


def level_at(scheduler: Any, step: int) -> Level:
    """The level of the step that a started scheduler makes next, out of its public attributes."""
    scale = input_scale(scheduler, step)
    kind = _kind(scheduler)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        alpha, sigma = _of_alpha_bar(scheduler, step)
    elif kind == "flow" or option(scheduler, "use_flow_sigmas"):
        sigma = float(sigmas[step])
        alpha = 1 - sigma
    elif scale == 1:
        spread = float(sigmas[step])
        alpha, sigma = 1 / math.hypot(1, spread), spread / math.hypot(1, spread)
    else:
        return Level(kind, scale, 1.0, _spread(scheduler, step, scale))
    if scale != 1:
        raise Refused(scheduler, f"it scales the network's input by {scale:.6g} at step {step}, and not by 1")
    return Level(kind, scale, alpha, sigma)


@quietly
def levels(scheduler: Any) -> tuple[Level, ...]:
    """The level of every step of a scheduler whose timesteps are set; `Refused` where it tells none."""
    ready = timed(scheduler, {})
    return in_double(lambda dtype: (*_walk(ready, dtype),))


def _walk(scheduler: Any, dtype: torch.dtype) -> Iterator[Level]:
    """One that scales its network's input knows its place by the steps it made."""
    running, counts = started(scheduler, 0), False
    small = SMALL * (clip_of(scheduler) or 1.0)
    sample, output = small * torch.eye(2, dtype=dtype, device="cpu").view(2, 1, 1, 1, 2)
    for step in range(len(running.timesteps)):
        yield (level := level_at(running, step))
        counts = counts or level.scale != 1
        if counts:
            own = make_step(running, step, sample, output, torch.zeros_like(sample), {}).x0_hat
            if own is not None:
                require_own(scheduler, step, level, own.double().flatten() / small)


def clip_of(scheduler: Any) -> float | None:
    """The range that a scheduler's config clips x0_hat to, None: it does not."""
    return float(option(scheduler, "clip_sample_range", 1.0)) if option(scheduler, "clip_sample") else None


def require_own(scheduler: Any, step: int, level: Level, own: Tensor) -> None:
    """Refuse a scheduler which says of its x0_hat, `own` (a, b), what the level does not."""
    expected = own.new_tensor(level.x0_hat)
    if not torch.allclose(own, expected, rtol=OWN_TOLERANCE, atol=OWN_TOLERANCE):
        a, b = expected.tolist()
        raise Refused(
            scheduler,
            f"its x0_hat at step {step} is {own[0]:.6g}·x + {own[1]:.6g}·output, where its sigma says "
            f"{a:.6g}·x + {b:.6g}·output",
        )


def _kind(scheduler: Any) -> str:
    asked = option(scheduler, "prediction_type")
    if asked is None:
        flow = hasattr(scheduler, "sigmas") and not hasattr(scheduler, "scale_model_input")
        asked = "flow_prediction" if flow else "epsilon"
    if asked not in KINDS:
        raise Refused(scheduler, f"its prediction_type is {asked!r}, which is none of {tuple(KINDS)}")
    return KINDS[asked]


def _of_alpha_bar(scheduler: Any, step: int) -> tuple[float, float]:
    t, table = float(scheduler.timesteps[step]), getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise Refused(
            scheduler, "it has neither `sigmas` nor `alphas_cumprod` to tell the noise of a step by"
        )
    if t != int(t):
        raise Refused(scheduler, f"its `alphas_cumprod` has no entry for the timestep {t}")
    alpha_bar = float(torch.as_tensor(table[int(t)], dtype=torch.float64))
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


def _spread(scheduler: Any, step: int, scale: float) -> float:
    """sigma of x = x0 + sigma·eps where the network's input is x / sqrt(sigma² + 1): of the scheduler's
    levels around this step (a two-call scheduler has some between the whole steps) the one that fits."""
    names = sorted(name for name in vars(scheduler) if name.startswith("sigmas"))
    for near in (step, step - 1, step + 1):
        for name in names:
            levels = getattr(scheduler, name)
            if isinstance(levels, Tensor) and levels.ndim == 1 and 0 <= near < len(levels):
                spread = float(levels[near])
                if abs(scale * math.hypot(1, spread) - 1) < SCALE_TOLERANCE:
                    return spread
    raise Refused(
        scheduler,
        f"it scales the network's input by {scale:.6g} at step {step}, where its sigma is "
        f"{float(scheduler.sigmas[step]):.6g}, and not by 1 / sqrt(sigma² + 1)",
    )


def require_plain(scheduler: Any) -> None:
    """Refuse the options that make a scheduler more than linear in the pixels of one sample."""
    if option(scheduler, "thresholding"):
        raise Refused(scheduler, "dynamic thresholding (`thresholding=True`) is not linear")
    variance = option(scheduler, "variance_type")
    if variance in ("learned", "learned_range"):
        raise Refused(scheduler, f"its variance is learned (`variance_type={variance!r}`)")

"""`AMGScheduler`: a thin wrapper with a diffusers signature, for people's own denoising loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.engine.level import Level
from amg.guidance.flight import Flight
from amg.guidance.predict import Conditions, Denoiser
from amg.guidance.schedule import levels_of
from amg.promise import check
from amg.protection.guide import Guide
from amg.similarity import similarity_for
from amg.verdict import Verdict


class AMGScheduler:
    """Guides inside `step`; everything else is the wrapped scheduler's.

    scheduler: a diffusers scheduler. index: an `amg.Index`. config: an `AMGConfig` (its `guidance_scale` is
    s0). decode: x0 -> images [B, 3, H, W] in [0, 1], for latent models; default: pixels in [-1, 1].
    neighbour_output: (sample [R, C, H, W], t, rows, captions) -> raw outputs [R, C, H, W] conditioned on each
    row's neighbour's caption; without it caption de-duplication is off. A wrapper cannot run the network
    again, so it neither rewinds nor re-runs: call `verdicts(images)` on the finished images and act on it.
    """

    def __init__(
        self,
        scheduler: Any,
        index: Any,
        config: AMGConfig | None = None,
        *,
        decode: Callable[[Tensor], Tensor] | None = None,
        neighbour_output: Callable[[Tensor, Any, list[int], Sequence[str]], Tensor] | None = None,
    ):
        if not hasattr(index, "closest"):
            raise TypeError(f"`index` must be an amg.Index, got {type(index).__name__}")
        index.seal.check()
        config = (config or AMGConfig.preset("main")).for_metric(index.metric)
        for name in ("calibration", "student"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"`{name}` must be None: a scheduler does not know the model it was made for; "
                    f"use `amg.Sampler` or `amg.protect`, got {getattr(config, name)}"
                )
        self.scheduler, self.index = scheduler, index
        self.amg_config = replace(config, rewind_at=(), c2=config.c2 if neighbour_output else 0.0)
        self._neighbour_output = neighbour_output
        kind = getattr(scheduler.config, "prediction_type", "epsilon")
        encode = (lambda captions: {"captions": captions}) if neighbour_output else None
        denoiser = Denoiser(
            self._network, decode or _pixels, kind, pixels=decode is None, encode_captions=encode
        )
        self._guide = Guide(
            self.amg_config,
            index,
            similarity_for(index, denoiser),
            denoiser,
            self.amg_config.guidance_scale,
        )
        self._flights: list[Flight] = []
        self._levels: tuple[Level, ...] = ()
        self._step = 0

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # a copy in the making has none yet
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """The wrapped scheduler's `set_timesteps`; starts a new batch."""
        steps = args[0] if args else kwargs.get("num_inference_steps")
        if steps is not None and steps < 1:
            raise ValueError(f"`num_inference_steps` must be >= 1, got {steps}")
        self.scheduler.set_timesteps(*args, **kwargs)
        self._flights, self._step = [], 0

    def step(
        self, model_output: Tensor | tuple[Tensor, Tensor], timestep: Any, sample: Tensor, **kwargs: Any
    ) -> Any:
        """Guide, then make the wrapped scheduler's step.

        model_output: (eps_uncond, eps_cond), or one unconditional output; [B, C, H, W] in the scheduler's
        prediction type. sample: x_t [B, C, H, W]. Call it once per timestep, in order. Returns the
        scheduler's own output.
        """
        output_uncond, output_cond = model_output if isinstance(model_output, tuple) else (None, model_output)
        if output_cond.shape != sample.shape:
            raise ValueError(
                f"`model_output` must be shaped like `sample` {list(sample.shape)}, "
                f"got {list(output_cond.shape)}"
            )
        if not self._flights:
            self.index.seal.check()
            self.amg_config.warn_without_guidance(
                None if output_uncond is None else self.amg_config.guidance_scale
            )
            self._levels = levels_of(self.scheduler)
            self._flights = [Flight.from_noise(row) for row in sample]
        where = self._guide.at(self.scheduler, self._levels, self._step)
        if float(where.t) != float(timestep):
            raise ValueError(
                f"`timestep` must be {float(where.t)}, the next of the schedule, got {float(timestep)}"
            )
        rows = torch.arange(len(sample), device=sample.device)
        model_input = self.scheduler.scale_model_input(sample, timestep)
        guided = self._guide(
            where,
            model_input,
            output_uncond,
            output_cond,
            Conditions({"rows": rows}, None, {}),
            self._flights,
        )
        self._step += 1
        return self.scheduler.step(guided.output, timestep, sample, **kwargs)

    def verdicts(self, images: Tensor) -> list[Verdict]:
        """The final check of the finished images, float [B, 3, H, W] in [0, 1]: one `Verdict` each."""
        return check(images, self.index, (), self.amg_config, self._flights)

    def _network(self, sample: Tensor, t: Any, **conditions: Any) -> Tensor:
        if self._neighbour_output is None:
            raise ValueError('`gradient="full"` needs the network: use `amg.Sampler` or `amg.protect`')
        known: Mapping[str, Any] = conditions
        return self._neighbour_output(sample, t, known["rows"].tolist(), known["captions"])


def _pixels(x0: Tensor) -> Tensor:
    return x0 / 2 + 0.5

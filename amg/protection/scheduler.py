"""`AMGScheduler`: a thin wrapper with a diffusers signature, for people's own denoising loops."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.engine.level import Level
from amg.guidance.flight import Flight
from amg.guidance.predict import Conditions, Denoiser
from amg.guidance.schedule import Step, levels_of
from amg.guidance.terms import require_finite
from amg.promise import check
from amg.protection.fused import Fused, as_its_own, first_step
from amg.protection.guide import Guide
from amg.similarity import similarity_for
from amg.verdict import Verdict

STEPPED = ("model_output", "timestep", "sample")


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
        if config.guidance_interval != (0.0, 1.0):
            raise ValueError(
                "`guidance_interval` must be (0, 1): another's loop computes both halves at every step; use "
                f"`amg.Sampler`, got {config.guidance_interval}"
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
        self._fused: Fused | None = None
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
        self._flights, self._fused, self._step = [], None, 0

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network's input, as the wrapped scheduler makes it."""
        if self._fused is not None:
            return self._fused.scaled(sample)
        if not hasattr(self.scheduler, "scale_model_input"):
            return sample
        scaled: Tensor = self.scheduler.scale_model_input(sample, timestep)
        return scaled

    @property
    def step(self) -> Callable[..., Any]:
        """step((output_uncond, output_cond), timestep, sample, ...): guide, and make the scheduler's step.

        The first argument may also be one unconditional output; outputs are [B, C, H, W] in the scheduler's
        prediction type, `sample` is x_t [B, C, H, W], and further arguments are those of the wrapped
        scheduler's `step`. Where its steps are linear (`amg.engine.table`), guidance and step are one call of
        `amg.kernels.guided_step_into`, within 1e-5 of its own; elsewhere its own step follows. Call it once a
        timestep, in order, from any timestep of the schedule on. Returns the scheduler's own output. Errors:
        ValueError naming the argument.
        """
        own = inspect.signature(self.scheduler.step)

        def run(*args: Any, **kwargs: Any) -> Any:
            bound = own.bind(*args, **kwargs).arguments
            given = {name: value for name, value in bound.items() if name not in STEPPED}
            return self._make(bound["model_output"], bound["timestep"], bound["sample"], given)

        run.__signature__ = own  # type: ignore[attr-defined]  # pipelines look for `generator`, `eta`
        return run

    def _make(self, model_output: Any, timestep: Any, sample: Tensor, given: dict[str, Any]) -> Any:
        outputs = model_output if isinstance(model_output, tuple) else (model_output,)
        if any(output.shape != sample.shape for output in outputs):
            raise ValueError(
                f"`model_output` must be shaped like `sample` {list(sample.shape)}, "
                f"got {[list(output.shape) for output in outputs]}"
            )
        if not self._flights:
            self._begin(outputs, timestep, sample, given)
        where = self._guide.at(self.scheduler, self._levels, min(self._step, len(self._levels) - 1))
        if self._step == len(self._levels) or float(where.t) != float(timestep):
            awaited = "none: all are made" if self._step == len(self._levels) else float(where.t)
            raise ValueError(f"`timestep` must be the next of the schedule, {awaited}, got {float(timestep)}")
        if self._fused is None:
            return self._guided_then_stepped(where, outputs, timestep, sample, given)
        require_finite("model_output", outputs[-1])
        rows = torch.arange(len(sample), device=sample.device)
        model_input = self._fused.scaled(sample)

        def ask_neighbours(chosen: Sequence[int], captions: Sequence[str]) -> Tensor:
            assert self._neighbour_output is not None
            at = [int(row) for row in chosen]
            return self._neighbour_output(model_input[rows[at]], timestep, at, captions)

        tools = self._guide.tools
        made = self._fused.step(outputs, sample, given, self._flights, tools, ask_neighbours)
        self._step += 1
        return as_its_own(self.scheduler, made, sample.dtype, given.get("return_dict", True))

    def _begin(self, outputs: Sequence[Tensor], timestep: Any, sample: Tensor, given: dict[str, Any]) -> None:
        """A batch at its first step, which may be a later one of the schedule (image-to-image)."""
        self.index.seal.check()
        scale = None if len(outputs) == 1 else self.amg_config.guidance_scale
        self.amg_config.warn_without_guidance(scale, stacklevel=5)
        self._levels = levels_of(self.scheduler)
        self._step = first_step(self.scheduler, timestep)
        self._fused = Fused.begun(self.scheduler, self._step, given, self.amg_config, sample)
        model_input = sample if self._fused is None else self._fused.scaled(sample)
        if self._fused is None and hasattr(self.scheduler, "scale_model_input"):
            model_input = self.scheduler.scale_model_input(sample, timestep)
        self._flights = [Flight.from_noise(row) for row in model_input]

    def _guided_then_stepped(
        self, where: Step, outputs: Sequence[Tensor], timestep: Any, sample: Tensor, given: dict[str, Any]
    ) -> Any:
        """Where the scheduler has no table: its own step, of the guided output."""
        rows = torch.arange(len(sample), device=sample.device)
        model_input = self.scale_model_input(sample, timestep)
        uncond, cond = (None, outputs[0]) if len(outputs) == 1 else outputs
        conditions = Conditions({"rows": rows}, None, {})
        guided = self._guide(where, model_input, uncond, cond, conditions, self._flights)
        self._step += 1
        return self.scheduler.step(guided.output, timestep, sample, **given)

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

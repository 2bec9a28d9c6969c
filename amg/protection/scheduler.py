"""`AMGScheduler`: a thin wrapper with a diffusers signature, for people's own denoising loops."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.engine.drive import Refused, name_of
from amg.engine.level import Level
from amg.engine.plan import noise_scale
from amg.engine.table import Tables
from amg.guidance.flight import Flight
from amg.guidance.lower import require_same
from amg.guidance.ordinary import Ordinary, bank_of
from amg.guidance.predict import Conditions, Denoiser
from amg.guidance.schedule import Step, levels_of
from amg.index.coverage import warn_of_gaps
from amg.pipelines import identity
from amg.promise import check
from amg.protection.fused import Call, Run, advance, begun, follow
from amg.protection.guide import Guide
from amg.protection.own import OwnLoop
from amg.similarity import similarity_for
from amg.verdict import Verdict

NOT_COEFFICIENTS = ("generator", "variance_noise", "return_dict")


class AMGScheduler:
    """Guides inside `step`; everything else is the wrapped scheduler's.

    scheduler: a diffusers scheduler. index: an `amg.Index`. config: an `AMGConfig` (its `guidance_scale` is
    s0). decode: x0 -> images [B, 3, H, W] in [0, 1], for latent models; default: pixels in [-1, 1].
    neighbour_output: (sample [R, C, H, W], t, rows, captions) -> raw outputs [R, C, H, W] conditioned on each
    row's neighbour's caption; without it caption de-duplication is off.

    A loop that asks has its samples start again (docs/own-loop.md): `begin`, then `timestep` and `step` until
    `finished`, and `restarted` after each step. Of a loop that does not, what a checkpoint finds too close
    goes on, and is only pushed under the metric's threshold: said once; ask `verdicts`.
    """

    _flights: list[Flight]
    _levels: tuple[Level, ...]
    _run: Run | None
    _own: OwnLoop | None
    _position: int

    def __init__(
        self,
        scheduler: Any,
        index: Any,
        config: AMGConfig | None = None,
        *,
        decode: Callable[[Tensor], Tensor] | None = None,
        neighbour_output: Callable[[Tensor, Any, list[int], Sequence[str]], Tensor] | None = None,
    ):
        config = usable(index, config)
        warn_of_gaps((index,))
        self.scheduler, self.index = scheduler, index
        self.amg_config = replace(config, c2=config.c2 if neighbour_output else 0.0)
        self._neighbour_output = neighbour_output
        kind = getattr(scheduler.config, "prediction_type", "epsilon")
        encode = (lambda captions: {"captions": captions}) if neighbour_output else None
        denoiser = Denoiser(
            self._network, decode or _pixels, kind, pixels=decode is None, encode_captions=encode
        )
        similarity, scale = similarity_for(index, denoiser), self.amg_config.guidance_scale
        bank = Ordinary(bank_of(self.amg_config, None))
        self._guide = Guide(self.amg_config, index, similarity, denoiser, scale, ordinary=bank)
        self._tables, self._told = Tables(), False
        self._restart()

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # a copy in the making has none yet
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> AMGScheduler:
        """A copy that goes its own way from here; it shares the index and the functions it was given."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.scheduler = copy.deepcopy(self.scheduler, memo)
        twin._flights = [replace(flight, trace=list(flight.trace)) for flight in self._flights]
        twin._run = None if self._run is None else self._run.copied()
        if self._own is not None:
            raise TypeError("a scheduler whose samples start again cannot be copied in the middle of a run")
        return twin

    @property
    def set_timesteps(self) -> Callable[..., None]:
        """The wrapped scheduler's `set_timesteps`; starts a new batch."""
        return signed(self._set_timesteps, self.scheduler.set_timesteps)

    @property
    def step(self) -> Callable[..., Any]:
        """Guide and make the wrapped scheduler's step: `step(model_output, timestep, sample, ...)`, with its
        own signature.

        model_output: (output_uncond, output_cond), or one unconditional output; [B, C, H, W] in the
        scheduler's prediction type. sample: x_t [B, C, H, W]. Call it once per timestep, in order, from any
        of them on. One kernel call where the scheduler's steps are linear, otherwise its own step on the
        guided output. Returns the scheduler's own output. Errors: ValueError naming the argument,
        FloatingPointError naming the rows that are not finite.
        """
        return signed(self._make_step, self.scheduler.step)

    @property
    def step_index(self) -> Any:
        """The wrapped scheduler's `step_index`: the step that is made next."""
        own = self.scheduler.step_index
        return own if self._run is None else self._position

    @property
    def scale_model_input(self) -> Callable[..., Tensor]:
        """The network's input of x_t, as the wrapped scheduler makes it before each step."""
        return signed(self._scale, self.scheduler.scale_model_input)

    def begin(self, noise: Tensor, prompts: Sequence[str | None] | None = None) -> Tensor:
        """Start a batch whose samples may start again: x_t [B, ...] of the first step, of standard normal
        `noise`. prompts: of each sample, which the captions of its later tries are near to. From here on
        `timestep` says where each sample is. Call `set_timesteps` first. Errors: ValueError."""
        if getattr(self.scheduler, "num_inference_steps", None) is None:
            raise ValueError("`set_timesteps` must be called before `begin`")
        self.index.seal.check()
        self._require_pictures(noise)
        self._restart()
        sample = noise * noise_scale(self.scheduler)
        self._own = OwnLoop(self.scheduler, self._tables, self.amg_config, self._guide.tools, sample)
        self._own.begin(prompts)
        self._flights = self._own.flights
        return sample

    @property
    def finished(self) -> bool:
        """Whether every sample of a batch that `begin` started is done."""
        return self._begun("finished").finished

    @property
    def timestep(self) -> Tensor:
        """Each sample's next timestep, [B], after `begin`."""
        return self._begun("timestep").timestep

    @property
    def restart(self) -> Tensor:
        """[B] bool, after a step: which samples should start again, found too close at a checkpoint."""
        flags = torch.tensor([flight.pending for flight in self._flights], dtype=torch.bool)
        return flags if self._own is None else flags.to(self._own.first.device)

    @property
    def captions(self) -> list[str | None]:
        """What each sample's next try should be conditioned on instead of its prompt; None: its prompt."""
        return [flight.caption for flight in self._flights]

    def restarted(self, sample: Tensor, verdicts: Sequence[Verdict] | None = None) -> Tensor:
        """x_t [B, ...] in which the samples of `restart` are fresh noise of their own, at the step they go
        back to; the others as they are. verdicts: of the images once all are `finished`, of which those
        memorised start again from the first step, as `on_memorized`, `max_retries` and `max_evaluations`
        allow; not looked at before."""
        return self._begun("restarted").restarted(sample, verdicts)

    def _begun(self, name: str) -> OwnLoop:
        if self._own is None:
            raise ValueError(f"`{name}` needs a batch that `begin` started: see docs/own-loop.md")
        return self._own

    def _ignored(self) -> None:
        """Say once what a loop's pictures are worth that goes on where samples should start again."""
        marked = [flight for flight in self._flights if flight.pending]
        for flight in marked:
            flight.pending, flight.rewinds = False, self.amg_config.max_rewinds or 0
        if marked and not self._told:
            self._told = True
            warnings.warn(
                f"{len(marked)} of {len(self._flights)} samples were found to copy training images and "
                "should start again, which this loop does not do: they will only be pushed under the "
                "metric's threshold, and may stay the same pictures to the eye. Follow `restart` and "
                "`restarted` (docs/own-loop.md), or withhold what `verdicts` and its guard call memorised",
                stacklevel=4,
            )

    def verdicts(self, images: Tensor) -> list[Verdict]:
        """The final check of the finished images, float [B, 3, H, W] in [0, 1]: one `Verdict` each."""
        if self._own is None:
            self._ignored()
        return check(images, self.index, (), self.amg_config, self._flights)

    def _restart(self) -> None:
        self._flights, self._levels, self._position = [], (), 0
        self._run, self._own = None, None

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        steps = args[0] if args else kwargs.get("num_inference_steps")
        if steps is not None and steps < 1:
            raise ValueError(f"`num_inference_steps` must be >= 1, got {steps}")
        self.scheduler.set_timesteps(*args, **kwargs)
        self._restart()

    def _scale(self, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The wrapped scheduler, which makes no steps of a run, would not know its place."""
        if self._own is not None:
            return sample * self._own.scale.view(-1, *[1] * (sample.ndim - 1)).to(sample)
        if self._run is not None:
            return sample * self._run.scale
        return self.scheduler.scale_model_input(sample, *args, **kwargs)

    def _make_step(self, *args: Any, **kwargs: Any) -> Any:
        output, timestep, sample, options = asked(self.scheduler, args, kwargs)
        call, arguments = call_of(output, sample, options)
        if self._own is not None:
            return self._own_loop_step(call, timestep, arguments, bool(options.get("return_dict", True)))
        self._ignored()
        if not self._flights:
            self._begin(call, timestep, arguments)
        require_next(self.scheduler.timesteps, self._position, timestep)
        require_rows(sample, len(self._flights))
        if self._run is None:
            result = self._own_step(call, timestep, options)
        else:
            follow(self._run, self._tables, arguments)
            tools, whole = self._guide.tools, options.get("return_dict", True)
            result = advance(self._run, call, self._flights, tools, self._ask_neighbours, bool(whole))
        self._position += 1
        return result

    def _own_loop_step(self, call: Call, timestep: Any, arguments: dict[str, Any], return_dict: bool) -> Any:
        own = self._begun("step")
        require_rows(call.sample, len(own.flights))
        given = torch.as_tensor(timestep, device=call.sample.device).expand(len(own.flights))
        if own.finished or bool((given.double() != own.timestep.double()).any()):
            raise ValueError(
                f"`timestep` must be {own.timestep.tolist()}, `scheduler.timestep`, until `finished`, "
                f"got {given.tolist()}"
            )
        self._ignored()
        return own.told(own.step(call, arguments), arguments, return_dict)

    def _begin(self, call: Call, timestep: Any, arguments: dict[str, Any]) -> None:
        """Find where the loop starts, and how its steps are made."""
        self.index.seal.check()
        scale = None if call.output_uncond is None else self.amg_config.guidance_scale
        self.amg_config.warn_without_guidance(scale, stacklevel=5)  # whoever called `step`
        self._require_pictures(call.sample)
        self._position = start_of(self.scheduler, timestep)
        parts = (self._tables, self.scheduler, self._position, arguments, self.amg_config)
        try:
            self._run = None if call.double else begun(*parts, call.sample)
        except Refused:  # no table, or an output that a kernel does not know: its own step makes both
            self._run = None
        self._levels = () if self._run else levels_of(self.scheduler)
        self._flights = [Flight.from_noise(row) for row in call.sample]

    def _require_pictures(self, sample: Tensor) -> None:
        """Without `decode` samples are pictures, which an index takes in three channels."""
        if self._guide.denoiser.pixels and (sample.ndim != 4 or sample.shape[1] != 3):
            raise ValueError(
                "`decode` must be given for samples that are no pictures [B, 3, H, W], got samples "
                f"{list(sample.shape)}"
            )

    def _own_step(self, call: Call, timestep: Any, options: dict[str, Any]) -> Any:
        where = self._guide.at(self.scheduler, self._levels, self._position)
        rows = Conditions({"rows": torch.arange(len(call.sample), device=call.sample.device)}, None, {})
        model_input = self.scheduler.scale_model_input(call.sample, timestep)
        halves = (call.output_uncond, call.output_cond)
        guided = self._guide(where, model_input, *halves, rows, self._flights)
        return self.scheduler.step(guided.output, timestep, call.sample, **options)

    def _ask_neighbours(
        self, step: Step, sample: Tensor, rows: Sequence[int], captions: Sequence[str]
    ) -> Tensor:
        t = self.scheduler.timesteps[step.position]
        return self._network(sample, t, rows=torch.tensor(rows), captions=captions)

    def _network(self, sample: Tensor, t: Any, **conditions: Any) -> Tensor:
        if self._neighbour_output is None or "captions" not in conditions:
            raise ValueError('`gradient="full"` needs the network: use `amg.Sampler` or `amg.protect`')
        known: Mapping[str, Any] = conditions
        return self._neighbour_output(sample, t, known["rows"].tolist(), known["captions"])


def usable(index: Any, config: AMGConfig | None) -> AMGConfig:
    """The config, for the index's metric. Errors: TypeError and ValueError, naming what cannot be."""
    identity.require_indexes(index, ())
    config = identity.asked(config).for_metric(index.metric)
    if tuple(config.guidance_interval) != (0.0, 1.0):
        raise ValueError(
            "`guidance_interval` must be (0.0, 1.0): the loop has run the network for both halves when it "
            f"calls `step`, got {config.guidance_interval}"
        )
    if config.prompt_memory:
        raise ValueError(
            f"`prompt_memory` must be 0 for a loop of your own, got {config.prompt_memory}: use `amg.Sampler`"
        )
    require_same(config, "a loop of your own, which runs the network: use `amg.Sampler` or `amg.protect`")
    for name in ("calibration", "student"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"`{name}` must be None: a scheduler does not know the model it was made for; "
                f"use `amg.Sampler` or `amg.protect`, got {getattr(config, name)}"
            )
    return config


def signed(function: Callable[..., Any], like: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the signature of another: pipelines look for `generator`, `eta`, `timesteps` in it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__signature__ = inspect.signature(like)  # type: ignore[attr-defined]
    return call


def asked(
    scheduler: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, Any, Tensor, dict[str, Any]]:
    """Output, timestep, sample and the other arguments of a scheduler's `step`, by name. Errors: its
    TypeError."""
    try:
        bound = inspect.signature(scheduler.step).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name_of(scheduler)}.step() {error}") from None
    output, timestep, sample, *_ = bound.arguments.values()
    return output, timestep, sample, dict([*bound.arguments.items()][3:])


def call_of(output: Any, sample: Tensor, options: Mapping[str, Any]) -> tuple[Call, dict[str, Any]]:
    """What the loop gave, and those of the arguments that a scheduler's coefficients depend on."""
    output_uncond, output_cond = output if isinstance(output, tuple) else (None, output)
    for half in (output_cond, output_uncond):
        if half is not None and half.shape != sample.shape:
            raise ValueError(
                f"`model_output` must be shaped like `sample` {list(sample.shape)}, got {list(half.shape)}"
            )
    drawn = (options.get("generator"), options.get("variance_noise"))
    others = {name: value for name, value in options.items() if name not in NOT_COEFFICIENTS}
    return Call(output_uncond, output_cond, sample, *drawn), others


def start_of(scheduler: Any, timestep: Any) -> int:
    """The step that a loop starts with: where it was told to, or the one of its first timestep, as the
    scheduler would find it."""
    begin: int | None = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return begin
    places = [place for place, t in enumerate(scheduler.timesteps.tolist()) if t == float(timestep)]
    if not places:
        raise ValueError(f"`timestep` must be one of the schedule's, got {float(timestep)}")
    if places[0] == 0 or not hasattr(scheduler, "index_for_timestep"):
        return places[0]
    return int(scheduler.index_for_timestep(timestep))


def require_next(timesteps: Tensor, position: int, timestep: Any) -> None:
    """Refuse a timestep that is not the one at `position`."""
    if position >= len(timesteps):
        raise ValueError(
            f"`timestep` must be of a new run (call `set_timesteps`): all {len(timesteps)} steps were made, "
            f"got {float(timestep)}"
        )
    if float(timesteps[position]) != float(timestep):
        raise ValueError(
            f"`timestep` must be {float(timesteps[position])}, the next of the schedule, "
            f"got {float(timestep)}"
        )


def require_rows(sample: Tensor, batch: int) -> None:
    """Refuse another batch than the one that was begun."""
    if len(sample) != batch:
        raise ValueError(f"`sample` must have {batch} rows as in the steps before, got {len(sample)}")


def _pixels(x0: Tensor) -> Tensor:
    return x0 / 2 + 0.5

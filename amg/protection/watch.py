"""A call of a pipeline whose loop is its own: what its scheduler steps with is read, measured and, where a
gate opens, changed. READ `Watch.guided` first.

With a family the halves of classifier-free guidance are recorded at the network, proved at the first step,
and every term acts (level "full"); without, x0_hat is known from the scheduler's level alone, and the
dissimilarity term acts (level "step"). Samples too close at a checkpoint go back inside the loop where it is
network and scheduler alone; elsewhere they are drawn again by the pipeline's own call, before this one is
finished where nothing of it is wanted any more.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.engine.drive import pristine
from amg.guidance.flight import Flight
from amg.guidance.ordinary import Ordinary
from amg.guidance.predict import Conditions
from amg.pipelines.families import Family
from amg.promise import past_first_checkpoint
from amg.protection.begin import acting, first_of, flights_of, guide_of, levels_of
from amg.protection.catch_up import Run
from amg.protection.halves import Call, Halves, Unknown, halves_of, require_proved, told
from amg.protection.hook import send_back
from amg.protection.install import CallHook, installed
from amg.protection.shown import decoder, require_alike
from amg.protection.tries import Stopped, Try

DECODES = "its latents decode to its pictures"


@dataclass(frozen=True)
class Watched:
    """What the calls of one protected pipeline have in common; guides: whether anything acts in them; said:
    what was said of it once."""

    pipe: Any
    family: Family | None
    index: Any
    config: AMGConfig
    also: Sequence[Any]
    ordinary: Ordinary
    said: set[str] = field(default_factory=set)
    guides: bool = True

    @property
    def network(self) -> Any:
        return None if self.family is None else getattr(self.pipe, self.family.network, None)


class Watch:
    """One call, from its first step to its pictures. `level`: what could be done; `flights`: of its samples,
    none until the first step."""

    def __init__(self, watched: Watched, one: Try, config: AMGConfig):
        self.watched, self.one, self.config = watched, one, config
        self.family = watched.family
        self.level = "step" if self.family is None else "full"
        if not (config.active and watched.guides):
            self.level = "final"
        self.reason: str | None = None  # why the level is not the one hoped for
        self.calls: list[Call] = []
        self.flights: list[Flight] = []
        self.run: Run | None = None
        self.conditions: Conditions | None = None  # of the first step
        self.start = self.index = 0  # the first step of the loop, and the next
        self.last = torch.empty(0)
        self.step_arguments: dict[str, Any] = {}
        self.forward: Any = None

    def guided(self, output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        """What the scheduler is to step with: the loop's own `output`, but in the rows that guidance
        changes."""
        calls, self.calls = self.calls, []
        if self.level == "final":
            return output
        try:
            halves = self._halves(calls, output, sample)
            if self.run is None:
                self._begin(output, timestep, sample, halves)
            self._require_turn(timestep)
        except Unknown as reason:
            self._give_up(str(reason))
            return output
        assert self.run is not None
        run = self.run = self._scaled(self.run)
        step = run.guide.at(run.scheduler, run.levels, self.index)
        scale = run.levels[self.index].scale
        model_input = sample if scale == 1 else sample * scale
        if halves is None:
            halves = Halves(None, output, Conditions({}, None, {}))
        found = run.guide(step, model_input, *halves, self.flights)
        changed = found.changed.view(-1, *[1] * (output.ndim - 1)).to(output.device)
        return torch.empty_like(output).copy_(torch.where(changed, found.output.to(output), output))

    def stepped(self, after: Tensor) -> Tensor:
        """What the loop goes on with once its scheduler made the step. Raises `Stopped`."""
        if self.level == "final" or self.run is None:
            return after
        index, self.index = self.index, self.index + 1
        if self.rewinds and self.conditions is not None:
            scheduler = self.watched.pipe.scheduler
            after = send_back(self.run, scheduler, index, after, self.conditions, self.flights)
        for flight in self.flights:
            flight.exhausted = flight.exhausted or flight.pending  # to be drawn again, whatever it ends as
            flight.pending = False
        self.last = after
        if (
            self.one.may_stop
            and len(self.flights) == self.one.count
            and all(flight.exhausted for flight in self.flights)
        ):
            raise Stopped(self.flights, self.plain)
        return after

    def told(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The network's arguments with the captions of later tries in place of their prompts."""
        later = any(flight.caption is not None or flight.lowered is not None for flight in self.flights)
        if self.family is None or self.run is None or not later or not self.rewinds:
            return arguments
        if self.family.separate and self.calls:
            return arguments  # the second call is the unconditional half
        return told(self.family, self.pipe, self.run.guide.denoiser, arguments, self.flights)

    def pictures(self, images: Any) -> Any:
        """What is checked of a call's output: its latents, where it was asked for these, decoded."""
        if self.one.arguments.get("output_type") != "latent":
            return images
        unknown = self.watched.family is None and DECODES not in self.watched.said
        if unknown or (self.level == "final" and self.reason is not None):
            why = self.reason or "what they decode to is not known before a call that gave pictures"
            raise ValueError(f"`output_type` must give pictures to be checked here, got 'latent': {why}")
        with torch.no_grad():
            return decoder(self.pipe, self.one.arguments)(images).clamp(0, 1)

    def confirm(self, images: Any) -> None:
        """Once for a pipeline of no known family: hold what its latents decode to to its pictures."""
        known = self.watched.family is not None or DECODES in self.watched.said
        if known or self.level == "final" or self.one.arguments.get("output_type") == "latent":
            return
        try:
            require_alike(decoder(self.pipe, self.one.arguments), self.last, images)
        except Unknown as reason:
            self._give_up(str(reason))
        else:
            self.watched.said.add(DECODES)

    def tell(self) -> None:
        """Say once what this pipeline's calls are protected by, where that is less than was hoped for."""
        if self.reason is not None and self.reason not in self.watched.said:
            self.watched.said.add(self.reason)
            name = type(self.pipe).__name__
            warnings.warn(f'{name} is protected at level "{self.level}" here: {self.reason}', stacklevel=6)

    @property
    def plain(self) -> int:
        """Network evaluations of one whole sample."""
        halves = self.conditions is not None and self.conditions.uncond is not None
        steps = 0 if self.run is None else self.run.count - self.start
        return steps * (2 if halves else 1)

    @property
    def rewinds(self) -> bool:
        """Whether a sample may go back inside this loop."""
        return self.family is not None and self.conditions is not None and self.family.is_bare(self.pipe)

    @property
    def pipe(self) -> Any:
        return self.watched.pipe

    def _halves(self, calls: Sequence[Call], output: Tensor, sample: Tensor) -> Halves | None:
        """The halves of this step, proved in the first one; None where they are not known."""
        if self.family is None:
            return None
        try:
            halves = halves_of(self.family, self.pipe, calls, sample)
            if self.run is None:
                require_proved(halves, output, self.scale, self.rescale)
        except Unknown as reason:
            self._lose_halves(str(reason))
            return None
        return halves

    @property
    def scale(self) -> float:
        """s0 at this moment."""
        return 1.0 if self.family is None else self.family.scale_of(self.pipe, self.one.arguments)

    @property
    def rescale(self) -> float:
        return float(getattr(self.pipe, "_guidance_rescale", None) or 0.0)

    def _begin(self, output: Tensor, timestep: Any, sample: Tensor, halves: Halves | None) -> None:
        """At the first step: a flight per sample, the scheduler's levels, and an unstepped copy of it."""
        scheduler = self.pipe.scheduler
        self.index = self.start = first_of(scheduler, timestep)
        found = levels_of(scheduler, output, sample)
        if halves is None or (halves.uncond is None and self.family is not None):
            self.level = "step"
        self.conditions = None if halves is None else halves.conditions
        guide = guide_of(self, found[0].kind, sample)
        config = acting(self.config, self.rewinds, self.one.may_leave)
        guide, first = replace(guide, config=config), self.start
        self.run = Run(
            guide, pristine(scheduler), self.step_arguments, found, first, float(found[first].scale)
        )
        self.flights = flights_of(self.one, sample, past_first_checkpoint(self.config, self.run.count))

    def _require_turn(self, timestep: Any) -> None:
        assert self.run is not None
        known, t = self.run.scheduler.timesteps, float(torch.as_tensor(timestep).flatten()[0])
        if self.index >= len(known) or t != float(known[self.index]):
            raise Unknown(f"it makes a step at {t:g} where step {self.index} of {len(known)} was due")

    def _scaled(self, run: Run) -> Run:
        """`run` at this moment's guidance scale."""
        scale = self.scale
        if scale == run.guide.guidance_scale:
            return run
        return replace(run, guide=replace(run.guide, guidance_scale=scale))

    def _lose_halves(self, reason: str) -> None:
        self.family, self.conditions = None, None
        self.level, self.reason = "step", self.reason or reason
        if self.run is not None:
            config = acting(self.config, self.rewinds, self.one.may_leave)
            self.run = replace(self.run, guide=replace(self.run.guide, config=config))

    def _give_up(self, reason: str) -> None:
        self.level, self.reason, self.flights = "final", reason, []


class RecordingHook(CallHook):
    """Records each call of a pipeline's network, and gives later tries their captions."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    @functools.partial(torch.compiler.disable, recursive=False)  # what it wraps may be compiled, it is not
    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        watch, original = self.watch, cast(Any, self.fn_ref).original_forward
        if self.elsewhere:
            return original(*args, **kwargs)
        watch.forward = original
        if watch.family is None or watch.level == "final":
            return original(*args, **kwargs)
        kind: Any = type(getattr(module, "_orig_mod", module))
        named = {**dict(zip(_names(kind), args, strict=False)), **kwargs}
        named = torch.compiler.disable(watch.told)(named)
        result = original(**named)
        output = result[0] if isinstance(result, tuple) else result.sample
        watch.calls.append(Call(named, output.clone()))  # a loop may combine the halves in place
        return result


@functools.cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Install hook and wrapper for one call of the pipeline, and take both away again whatever happens."""
    scheduler, network = watch.pipe.scheduler, watch.watched.network
    with installed(network, RecordingHook(watch), scheduler, functools.partial(_wrapped, watch)):
        yield


def _wrapped(watch: Watch, original: Any) -> Any:
    @functools.wraps(original)
    def step(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        known = {name: value for name, value in kwargs.items() if name not in ("generator", "return_dict")}
        watch.step_arguments.update(known)
        result = original(watch.guided(model_output, timestep, sample), timestep, sample, *args, **kwargs)
        if isinstance(result, tuple):
            return (watch.stepped(result[0]), *result[1:])
        result.prev_sample = watch.stepped(result.prev_sample)
        return result

    return step

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor
from torch.nn import functional

from amg.config import AMGConfig
from amg.engine.drive import Refused, pristine
from amg.engine.level import Level, levels
from amg.guidance.flight import Flight
from amg.guidance.ordinary import Ordinary
from amg.guidance.predict import Conditions, Denoiser, joined, plain, replace_captions
from amg.guidance.terms import classifier_free, rescale
from amg.pipelines.denoiser import captions_of, decoder_of, split_call
from amg.pipelines.families import Family
from amg.pipelines.pictures import to_tensor
from amg.protection.catch_up import Run
from amg.protection.guide import Guide
from amg.protection.hook import NAME, send_back
from amg.similarity import judges_for, similarity_for
from amg.verdict import Neighbour, Verdict

CHANNELS = "amg_channels"  # what an inpainting network is given beside x_t, kept as a condition
PROVED = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the output's deviation; halves of 16 bits: COARSE
COARSE = 0.1
DECODES = "its latents decode to its pictures"
ALIKE = 0.02  # mean difference of such pictures, of 1


class Stopped(Exception):
    """Every sample of a call is to be drawn again: it is not finished."""

    def __init__(self, flights: Sequence[Flight], plain: int):
        super().__init__("no sample of this call is wanted any more")
        self.flights, self.plain = flights, plain

    def verdicts(self, index: Any, config: AMGConfig) -> list[Verdict]:
        """What is known of pictures that were never finished: what the last look found."""
        assert config.threshold is not None
        found = []
        for flight in self.flights:
            look = next(step for step in reversed(flight.trace) if step.neighbour is not None)
            assert look.similarity is not None and look.neighbour is not None
            near = Neighbour(look.neighbour, index.ids[look.neighbour], index.captions[look.neighbour])
            verdict = Verdict(
                index.metric,
                look.similarity,
                config.threshold,
                near,
                memorized=True,
                rewinds=flight.total_rewinds,
                evaluations=flight.evaluations,
                trace=tuple(flight.trace),
                exhausted=True,
                caption=flight.caption,
            )
            found.append(verdict)
        return found


class Unknown(Exception):
    """What prevents a level of protection, in one line."""


class Call(NamedTuple):
    """One call of the network: its arguments by name, and its output."""

    arguments: Mapping[str, Any]
    output: Tensor


class Halves(NamedTuple):
    """Raw outputs [B, ...], `uncond` None where there is no such half, and what they were conditioned on."""

    uncond: Tensor | None
    cond: Tensor
    conditions: Conditions


@dataclass(frozen=True)
class Try:
    """One call among those that draw a picture: its `arguments` by name, the texts of its prompts by the
    pictures' places, how many tries went before, the ordinary captions that took prompts' places, and the
    evaluations that each sample has cost. may_stop: it may end before its pictures are finished, of which it
    gives `count`; may_leave: samples may be left to another call."""

    arguments: Mapping[str, Any]
    texts: Mapping[int, str] = field(default_factory=dict)
    attempt: int = 0
    captions: Mapping[int, str] = field(default_factory=dict)
    spent: Mapping[int, int] = field(default_factory=dict)
    may_stop: bool = False
    may_leave: bool = False
    count: int | None = None


@dataclass(frozen=True)
class Watched:
    """What the calls of one protected pipeline have in common; `said`: what was said of it once."""

    pipe: Any
    family: Family | None
    index: Any
    config: AMGConfig
    also: Sequence[Any]
    ordinary: Ordinary
    said: set[str] = field(default_factory=set)

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
        if not config.active:
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

    @property
    def decode(self) -> Callable[[Tensor], Tensor]:
        """Latents -> pictures [B, 3, H, W]."""
        pipe, size = self.watched.pipe, []
        factor, own = getattr(pipe, "vae_scale_factor", 8), getattr(pipe, "default_sample_size", None)
        for name in ("height", "width"):
            default = own * factor if isinstance(own, int) else 0
            size.append(int(self.one.arguments.get(name) or default))
        return decoder_of(pipe, (size[0], size[1]))

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
        guide = run.guide if self.level == "full" else _without_halves(run.guide)
        found = guide(step, model_input, *halves, self.flights)
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

    def pictures(self, images: Any) -> Any:
        """What is checked of a call's output: its latents, where it was asked for these, decoded."""
        if self.one.arguments.get("output_type") != "latent":
            return images
        unknown = self.watched.family is None and DECODES not in self.watched.said
        if unknown or (self.level == "final" and self.reason is not None):
            why = self.reason or "what they decode to is not known before a call that gave pictures"
            raise ValueError(f"`output_type` must give pictures to be checked here, got 'latent': {why}")
        with torch.no_grad():
            return self.decode(images).clamp(0, 1)

    def confirm(self, images: Any) -> None:
        """Once for a pipeline of no known family: hold what its last step left, decoded here, to its
        pictures."""
        known = self.watched.family is not None or DECODES in self.watched.said
        if known or self.level == "final" or self.one.arguments.get("output_type") == "latent":
            return
        shown = to_tensor(images).float()
        with torch.no_grad():
            own = self.decode(self.last)[: len(shown)].clamp(0, 1).to(shown)
        if own.shape != shown.shape:  # a size that was rounded for the network
            own = functional.interpolate(own, shown.shape[2:], mode="bilinear", antialias=True)
        if float((own - shown).abs().mean()) > ALIKE:
            self._give_up("its pictures are not what its last step's latents decode to here")
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

    @torch.compiler.disable
    def told(self, arguments: dict[str, Any], rows: int) -> dict[str, Any]:
        """The network's arguments with the captions of later tries in place of their prompts."""
        captions, batch = [flight.caption for flight in self.flights], len(self.flights)
        if self.family is None or self.run is None or not any(captions) or not self.rewinds:
            return arguments
        guided = not self.family.separate and rows == 2 * batch
        if self.family.separate and self.calls:
            return arguments  # the second call is the unconditional half
        given = self._given(arguments, batch, guided)
        told = replace_captions(self.run.guide.denoiser, given, captions)
        own = {name: value for name, value in told.cond.items() if value is not given.cond[name]}
        if told.uncond is not None:
            own = {name: joined([told.uncond[name], value]) for name, value in own.items()}
        return {**arguments, **plain(own)}

    def _halves(self, calls: Sequence[Call], output: Tensor, sample: Tensor) -> Halves | None:
        """The halves of this step, None where they are not known."""
        if self.family is None:
            return None
        batch, rows = len(sample), [len(call.output) for call in calls]
        separate = self.family.separate and rows in ([batch], [batch] * 2)
        if not separate and (self.family.separate or rows not in ([batch], [2 * batch])):
            self._lose_halves(f"its network gave {rows} rows before a step of {batch} samples")
            return None
        guided = rows == [2 * batch]
        parts = [self._given(call.arguments, batch, guided) for call in calls]
        outputs = [_cut(call.output, sample) for call in calls]
        if len(calls) == 2:
            conditions = Conditions(parts[0].cond, parts[1].cond, parts[0].shared)
            return Halves(outputs[1], outputs[0], conditions)
        uncond, cond = outputs[0].chunk(2) if guided else (None, outputs[0])
        halves = Halves(uncond, cond, parts[0])
        if self.run is None and not self._proved(halves, output):
            self._lose_halves("its guided output is not that of the two halves of its network")
            return None
        return halves

    def _given(self, arguments: Mapping[str, Any], batch: int, guided: bool) -> Conditions:
        """The conditions in the network's arguments, without x_t and t; an inpainting network's further
        channels among them."""
        assert self.family is not None
        kept = {k: v for k, v in arguments.items() if k not in (self.family.sample, "timestep")}
        model_input, channels = arguments[self.family.sample], self.pipe.vae.config.latent_channels
        if model_input.ndim == 4 and model_input.shape[1] > channels:
            kept[CHANNELS] = model_input[:, channels:]
        return split_call(kept, batch, guided, self.family.shared)

    def _proved(self, halves: Halves, output: Tensor) -> bool:
        """Whether the pipeline's own guided output is what the halves give."""
        assert self.family is not None
        cond, uncond = halves.cond.float(), halves.uncond
        expected = cond
        if uncond is not None:
            scale = self.family.scale_of(self.pipe, self.one.arguments)
            expected = classifier_free(uncond.float(), cond, scale)
            if self._rescale > 0:
                expected = rescale(expected, cond, self._rescale)
        error = (expected - output.float()).abs().amax() / output.float().std().clamp_min(1e-12)
        return bool(error <= PROVED.get(halves.cond.dtype, COARSE))

    @property
    def _rescale(self) -> float:
        return float(getattr(self.pipe, "_guidance_rescale", None) or 0.0)

    def _begin(self, output: Tensor, timestep: Any, sample: Tensor, halves: Halves | None) -> None:
        """At the first step: a flight per sample, the scheduler's levels, and an unstepped copy of it."""
        if output.shape != sample.shape:
            shapes = f"{list(output.shape)} for {list(sample.shape)}"
            raise Unknown(f"its scheduler is given outputs of another shape than its samples, {shapes}")
        scheduler = self.pipe.scheduler
        self.index = self.start = _first_of(scheduler, timestep)
        try:
            found = levels(scheduler)
        except Refused as refused:
            raise Unknown(str(refused)) from refused
        if halves is None or (halves.uncond is None and self.family is not None):
            self.level = "step"
        self.conditions = None if halves is None else halves.conditions
        one = self.one
        self.flights = [Flight.from_noise(row.float(), one.texts.get(at)) for at, row in enumerate(sample)]
        for place, flight in enumerate(self.flights):
            flight.retries = one.attempt
            flight.caption = one.captions.get(place)
            flight.evaluations = one.spent.get(place, 0)
        guide = self._guide(found, sample)
        self.run = Run(guide, pristine(scheduler), self.step_arguments, found)
        self.run = replace(self.run, guide=replace(guide, config=self._acting()))
        for flight in self.flights if one.attempt else ():
            flight.despecified_until = _first_checkpoint(self.config, self.run.count)

    def _acting(self) -> AMGConfig:
        """The config of this call: samples are only sent back where they can be."""
        config = self.config
        if not self.rewinds and not self.one.may_leave:
            config = replace(config, max_rewinds=0)
        if not self.rewinds and config.gradient == "full":
            config = replace(config, gradient="frozen")
        return config

    def _guide(self, found: tuple[Level, ...], sample: Tensor) -> Guide:
        watched = self.watched
        captions = None if self.family is None else captions_of(self.pipe, self.one.arguments)
        denoiser = Denoiser(self._network, self._proved_decoder(sample), found[0].kind, False, captions)
        similarity = similarity_for(watched.index, denoiser)
        judges = judges_for(watched.also, denoiser)
        scale = 1.0 if self.family is None else self.family.scale_of(self.pipe, self.one.arguments)
        parts = (watched.index, similarity, denoiser, scale, self._rescale, judges, None, None)
        return Guide(self.config, *parts, watched.ordinary)

    @torch.no_grad()
    def _proved_decoder(self, sample: Tensor) -> Callable[[Tensor], Tensor]:
        """The decoder, after it was asked once."""
        try:
            picture = self.decode(sample[:1])
        except Exception as error:
            raise Unknown(f"its latents {list(sample.shape)} cannot be decoded here: {error}") from error
        if picture.ndim != 4 or picture.shape[:2] != (1, 3):
            raise Unknown(f"its latents decode to {list(picture.shape)}, which is no picture")
        return self.decode

    def _network(self, sample: Tensor, t: Any, **conditions: Any) -> Tensor:
        """The raw output of the network for other rows of this call."""
        if self.family is None:
            raise RuntimeError("the network of an unknown pipeline cannot be asked")
        more = conditions.pop(CHANNELS, None)
        full = sample if more is None else torch.cat([sample, more.to(sample)], 1)
        times = torch.as_tensor(t, device=sample.device).expand(len(sample)) / self.family.divisor
        times = times.to(sample.dtype) if self.family.divisor != 1 else times
        named = {self.family.sample: full, "timestep": times, **conditions, "return_dict": False}
        return _cut(self.forward(**named)[0], sample)

    def _require_turn(self, timestep: Any) -> None:
        assert self.run is not None
        known, t = self.run.scheduler.timesteps, float(torch.as_tensor(timestep).flatten()[0])
        if self.index >= len(known) or t != float(known[self.index]):
            raise Unknown(f"it makes a step at {t:g} where step {self.index} of {len(known)} was due")

    def _scaled(self, run: Run) -> Run:
        """`run` at this moment's guidance scale."""
        scale = 1.0 if self.family is None else self.family.scale_of(self.pipe, self.one.arguments)
        if scale == run.guide.guidance_scale:
            return run
        return replace(run, guide=replace(run.guide, guidance_scale=scale))

    def _lose_halves(self, reason: str) -> None:
        self.family, self.conditions = None, None
        self.level, self.reason = "step", self.reason or reason
        if self.run is not None:
            self.run = replace(self.run, guide=replace(self.run.guide, config=self._acting()))

    def _give_up(self, reason: str) -> None:
        self.level, self.reason, self.flights = "final", reason, []


def _first_of(scheduler: Any, timestep: Any) -> int:
    """The step that a loop starts with, out of the scheduler's timesteps: not 0 where it starts late."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return int(begin)
    known, t = torch.as_tensor(scheduler.timesteps).double(), float(torch.as_tensor(timestep).flatten()[0])
    found = (known == t).nonzero().flatten().tolist()
    if not found:
        raise Unknown(f"it begins at {t:g}, which is none of its scheduler's timesteps")
    return int(found[0])


def _without_halves(guide: Guide) -> Guide:
    """Guidance that asks nothing of the network."""
    return replace(guide, config=replace(guide.config, gradient="frozen"))


def _cut(output: Tensor, sample: Tensor) -> Tensor:
    """The network's output without a learned variance."""
    return output[:, : sample.shape[1]] if output.ndim == 4 else output


def _first_checkpoint(config: AMGConfig, total: int) -> int:
    return round(min(config.rewind_at or (0.5,)) * (total - 1)) + 1


class RecordingHook(ModelHook):  # type: ignore[misc]
    """Records each call of a pipeline's network, and gives later tries their captions."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    @functools.partial(torch.compiler.disable, recursive=False)  # what it wraps may be compiled, it is not
    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        watch, original = self.watch, cast(Any, self.fn_ref).original_forward
        watch.forward = original
        if watch.family is None or watch.level == "final":
            return original(*args, **kwargs)
        kind: Any = type(getattr(module, "_orig_mod", module))
        named = {**dict(zip(_names(kind), args, strict=False)), **kwargs}
        named = watch.told(named, len(named[watch.family.sample]))
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
    with ExitStack() as undo:
        if network is not None:
            registry = HookRegistry.check_if_exists_or_initialize(network)
            registry.register_hook(RecordingHook(watch), NAME)
            undo.callback(registry.remove_hook, NAME, recurse=False)
        own = vars(scheduler).get("step")
        scheduler.step = _wrapped(watch, scheduler.step)
        undo.callback(_restore, scheduler, own)
        yield


def _restore(scheduler: Any, own: Any) -> None:
    del scheduler.step
    if own is not None:
        scheduler.step = own


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

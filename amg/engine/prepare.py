"""A request -> a job: everything that can be refused is refused here, before any work."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.embed.precision import Modes
from amg.engine.arguments import require_generator, require_request
from amg.engine.drive import started
from amg.engine.graphs import Graphs, require_capturable, weights_held
from amg.engine.job import Job
from amg.engine.look import Tools
from amg.engine.memory import PromptMemory
from amg.engine.noise import standard_normal
from amg.engine.plan import Course
from amg.engine.table import Tables, setting
from amg.guidance.flight import Flight, texts_of
from amg.guidance.lower import require_same
from amg.guidance.ordinary import Ordinary, bank_of
from amg.guidance.predict import Conditions, Same
from amg.pipelines.check import rows_of
from amg.pipelines.conditions import asked_of, count_of, of_request, scale_of, shift_of, size_of
from amg.pipelines.denoiser import (
    CaptionCache,
    decoder_of,
    denoiser_for,
    is_latent,
    is_packed,
    weights_of,
)
from amg.pipelines.families import Size, family_of
from amg.pipelines.given import (
    Begun,
    begin,
    begin_again,
    beside,
    first_step,
    keeps,
    kind_of,
    require_shared_out,
)
from amg.pipelines.identity import asked, gate_of, key_for, refit, require_indexes, screen_of, state_of
from amg.pipelines.safety import safety_of
from amg.pipelines.supported import network_of, require_no_caches, require_sampled
from amg.promise import past_first_checkpoint
from amg.similarity import judges_for, similarity_for

if TYPE_CHECKING:
    from amg.engine.sampler import Request

COURSES = 64  # settings of scheduler and guidance whose plans are kept
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class Source:
    """A pipeline with what its samples are held to. What is made of its components is made anew where one was
    replaced since the last request."""

    def __init__(
        self, pipe: Any, index: Any, config: AMGConfig | None, also: Sequence[Any], cuda_graphs: bool = False
    ):
        require_sampled(pipe)
        require_no_caches(network_of(pipe))
        if cuda_graphs:
            require_capturable(pipe)
        self.cuda_graphs = cuda_graphs
        self.pipe, self.index, self.also = pipe, index, require_indexes(index, also)
        self.config = asked(config).for_metric(index.metric)
        if not is_latent(pipe):
            require_same(self.config, f"{type(pipe).__name__}, which takes no text")
        self.gate, self.screen = gate_of(self.config), screen_of(self.config, pipe, index)
        self.memory = PromptMemory(self.config.prompt_memory)
        self.tables, self.ordinary = Tables(), Ordinary(bank_of(self.config, self.gate))
        self._courses: dict[Any, Course] = {}
        self._made_of: tuple[Any, ...] = ()
        self._texts = threading.Lock()
        self.renew()

    def renew(self) -> None:
        """Read the pipeline's components anew: what was replaced since the last request serves the next one,
        and what does not fit it any more is refused as at first."""
        pipe = self.pipe
        require_sampled(pipe)
        refit(self.screen, pipe)
        made_of = state_of(pipe)
        if self.cuda_graphs:
            made_of = (*made_of, weights_held(network_of(pipe)))
        if made_of == self._made_of:
            return
        self.denoiser = denoiser_for(pipe)
        if self.cuda_graphs:
            self.denoiser = replace(self.denoiser, network=Graphs(self.denoiser.network))
        self.similarity = similarity_for(self.index, self.denoiser)
        self.judges = judges_for(self.also, self.denoiser)
        self._courses.clear()
        self._made_of = made_of

    @property
    def owner(self) -> tuple[Any, ...]:
        """What the requests that are prepared now were made of."""
        return self._made_of

    def tools(self, request: Request, shown: Size | None) -> Tools:
        """What a request's samples are held to, with a cache of captions of its own, so that none outlives
        the text encoder that encoded it. shown: see `decoder_of`."""
        own = replace(self.denoiser, encode_captions=self._captions(request))
        similarity, judges = self.similarity, self.judges
        if shown is not None or is_packed(self.pipe):  # its pictures are of its own size
            sides = size_of(self.pipe, request.height, request.width)
            height, width = (self.pipe.vae_scale_factor * side for side in sides)
            own = replace(own, decode=decoder_of(self.pipe, (height, width), shown))
            similarity, judges = similarity_for(self.index, own), judges_for(self.also, own)
        return Tools(self.index, similarity, own, judges, self.gate, self.screen, self.ordinary)

    def _captions(self, request: Request) -> Any:
        if self.denoiser.encode_captions is None:
            return None
        encode = CaptionCache(self.pipe, {"max_sequence_length": request.max_sequence_length})

        def encode_captions(captions: Sequence[str]) -> Any:
            with self._texts:  # one thread at a time, as tokenizers want it
                return encode(captions)

        return encode_captions

    def conditions(self, request: Request, scale: float, device: Any) -> Conditions:
        """What a request is conditioned on."""
        with self._texts:
            return of_request(self.pipe, request, self.config.null_class, scale, device)

    def course(self, request: Request, scale: float, device: torch.device) -> Course:
        """How a request is run; `Refused` for a scheduler that cannot be, ValueError for a `strength` that
        leaves no step."""
        given: dict[str, Any] = {"timesteps": request.timesteps, "sigmas": request.sigmas}
        family = family_of(self.pipe)
        steps = request.num_inference_steps
        if all(value is None for value in given.values()) and family is not None and steps is not None:
            given["sigmas"] = family.sigmas(self.pipe, steps)
        if all(value is None for value in given.values()):
            given = {"num_inference_steps": steps}
        given["mu"] = shift_of(self.pipe, request.height, request.width)
        known = step_arguments(self.pipe.scheduler, {"eta": request.eta})
        ready = setting(self.pipe.scheduler, given, known)
        first = first_step(request, ready.scheduler) if kind_of(self.pipe) is not None else None
        key = (ready, scale, device, first, keeps(self.pipe))
        if key not in self._courses:
            while len(self._courses) >= COURSES:
                self._courses.pop(next(iter(self._courses)))
            self._courses[key] = Course(ready, self.tables, scale, self.gate, *key[2:])
        return self._courses[key]

    def generator(self, seed: int | Sequence[int] | None) -> torch.Generator | list[torch.Generator]:
        """A request's own generator, on the pipeline's device."""
        device = self.pipe._execution_device
        if isinstance(seed, Sequence):
            return [torch.Generator(device).manual_seed(one) for one in seed]
        generator = torch.Generator(device)
        if seed is None:
            generator.seed()
            return generator
        return generator.manual_seed(seed)

    @property
    def scale_name(self) -> str:
        """The argument of a call that is s0."""
        family = family_of(self.pipe)
        return "guidance_scale" if family is None else family.scale

    @property
    def unwarned(self) -> bool:
        """Whether a text model's later tries can only go back to the memorised prompt."""
        return is_latent(self.pipe) and self.config.active


def step_arguments(scheduler: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Those of `given` that this scheduler's `step` takes."""
    known = inspect.signature(type(scheduler).step).parameters
    return {name: value for name, value in given.items() if name in known}


@torch.no_grad()
def prepare(source: Source, request: Request, generator: Any, late_at: float) -> Job:
    """Find a request to be in order, and draw its first noise. Errors: ValueError naming the argument,
    `Refused` for the scheduler."""
    _require(request, generator)
    source.renew()
    for index in (source.index, *source.also):
        index.seal.check()  # before any work, and before a truncated map is touched
    pipe, config = source.pipe, source.config
    put_in = request.image
    request, shown = asked_of(pipe, request)
    batch = count_of(request)
    require_generator(generator, batch)
    require_shared_out(request, batch)
    shape = _shape(pipe, request, batch)
    own = rows_of(put_in, source.index, config, source.also)
    if own and not config.block_input_copies:  # what the user put in is nothing to push away from
        config = replace(config, preset_name="off")
    scale = scale_of(pipe, request, config.guidance_scale)
    device = pipe._execution_device  # once: the pipeline walks through all its modules for it
    conditions = source.conditions(request, scale, device)
    course = source.course(request, scale, device)
    scheduler = course.setting.scheduler
    if source.gate is not None:
        source.gate.require(key_for(pipe, source.index, scheduler, scale, config))
    begun = _begun(pipe, request, course, shape, generator)
    flights = _flights(source, request, course, config, begun.sample)
    modes, tools = Modes.here(), source.tools(request, shown)
    return Job(
        course=course,
        config=config,
        tools=tools,
        also=source.also,
        conditions=beside(conditions, begun.channels),
        sample=begun.sample,
        kept=begun.kept,
        begin=None if course.first is None else functools.partial(_begun_again, pipe, request, course),
        own=own,
        flights=flights,
        memory=source.memory,
        generator=generator,
        rescale=request.guidance_rescale,
        output_type=request.output_type,
        safety=_safety(pipe, request, batch, conditions),
        dtype=weights_of(network_of(pipe))[0],
        key=(id(tools.index), modes, shown, form_of(begun.sample[:1]), _alike(conditions)),
        owner=source.owner,
        modes=modes,
        late_at=late_at,
    )


def _require(request: Request, generator: Any) -> None:
    """TypeError or ValueError for what no pipeline takes."""
    require_request(request)
    require_generator(generator)
    steps, output_type = request.num_inference_steps, request.output_type
    if steps is not None and steps < 1:
        raise ValueError(f"`num_inference_steps` must be >= 1, got {steps}")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f'`output_type` must be "pil", "np", "pt" or "latent", got {output_type!r}')


def _flights(
    source: Source, request: Request, course: Course, config: AMGConfig, sample: Tensor
) -> list[Flight]:
    """A flight for each first sample, those whose prompt is remembered as later tries."""
    plan, scheduler, initial = course.plan(config), course.setting.scheduler, sample
    if plan.scaled:  # in the scheduler's own operations: equal noise is to have equal bits on every way
        t = scheduler.timesteps[plan.start].to(sample.device)
        initial = started(scheduler, plan.start).scale_model_input(sample, t)
    texts = texts_of(request.prompt, request.num_images_per_prompt, len(sample))
    flights = [Flight.from_noise(row, text) for row, text in zip(initial, texts, strict=True)]
    if config.active:
        source.memory.recall(flights, course, past_first_checkpoint(config, plan.total))
    return flights


def _safety(pipe: Any, request: Request, batch: int, conditions: Conditions) -> Any:
    """What the pipeline does with its finished pictures; of latents nothing."""
    if request.output_type == "latent" or not is_latent(pipe):
        return None
    return safety_of(pipe, [False] * batch, conditions.cond["encoder_hidden_states"].dtype)


def form_of(value: Any) -> Hashable:
    """What conditions have in common that can be joined: names, shapes of rows, dtypes, devices, and values
    that are the same for all rows."""
    if isinstance(value, Mapping):
        return tuple((name, form_of(inner)) for name, inner in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(form_of(inner) for inner in value))
    if isinstance(value, Tensor):
        return (value.shape[1:], value.dtype, value.device)
    held = value.value if isinstance(value, Same) else value
    return held if isinstance(held, Hashable) and not isinstance(held, Tensor) else id(held)


def _alike(conditions: Conditions) -> Hashable:
    """What conditions of samples that share calls have in common."""
    shared = tuple((name, id(value)) for name, value in sorted(conditions.shared.items()))
    return form_of(conditions.cond), shared


def _shape(pipe: Any, request: Request, batch: int) -> tuple[int, ...]:
    """Of a request's first noise, [batch, C, H, W], or [batch, N, C] where the network takes tokens.
    ValueError where its `latents` are of another."""
    size = size_of(pipe, request.height, request.width)
    channels = (
        network_of(pipe).config.in_channels if kind_of(pipe) is None else pipe.vae.config.latent_channels
    )
    shape: tuple[int, ...] = (batch, channels, *size)
    if is_packed(pipe):
        shape = (batch, size[0] * size[1] // 4, shape[1])
    if request.latents is not None and tuple(request.latents.shape) != shape:
        raise ValueError(f"`latents` must be {list(shape)}, got {list(request.latents.shape)}")
    return shape


def _begun(pipe: Any, request: Request, course: Course, shape: tuple[int, ...], generator: Any) -> Begun:
    """What a request's samples start from."""
    if course.first is None:
        return Begun(_noise(pipe, request, shape, generator, course.device) * course.noise_scale)
    scheduler = started(course.setting.scheduler, course.first)
    return begin(pipe, request, scheduler, course.first, generator, shape[0])


def _begun_again(
    pipe: Any, request: Request, course: Course, place: int, generator: torch.Generator
) -> Begun:
    assert course.first is not None
    scheduler = started(course.setting.scheduler, course.first)
    return begin_again(pipe, request, scheduler, course.first, generator, place)


def _noise(
    pipe: Any, request: Request, shape: tuple[int, ...], generator: Any, device: torch.device
) -> Tensor:
    """The first noise of a request, as its pipeline would draw it, or the caller's."""
    dtype = weights_of(network_of(pipe))[0]
    if request.latents is not None:
        return request.latents.to(device, dtype)
    if not is_packed(pipe):
        return standard_normal(shape, generator, device, dtype)
    drawn = (shape[0], shape[2] // 4, *size_of(pipe, request.height, request.width))
    packed: Tensor = pipe._pack_latents(standard_normal(drawn, generator, device, dtype), *drawn)
    return packed

"""A request -> a job: everything that can be refused is refused here, before any work."""

from __future__ import annotations

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
from amg.engine.job import Job
from amg.engine.look import Tools
from amg.engine.memory import PromptMemory
from amg.engine.noise import standard_normal
from amg.engine.plan import Course
from amg.engine.table import Tables, setting
from amg.guidance.flight import Flight, texts_of
from amg.guidance.ordinary import Ordinary, bank_of
from amg.guidance.predict import Conditions, Same
from amg.pipelines.conditions import of_request, shift_of, size_of
from amg.pipelines.denoiser import CaptionCache, denoiser_for, is_latent, weights_of
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

    def __init__(self, pipe: Any, index: Any, config: AMGConfig | None, also: Sequence[Any]):
        require_sampled(pipe)
        require_no_caches(network_of(pipe))
        self.pipe, self.index, self.also = pipe, index, require_indexes(index, also)
        self.config = asked(config).for_metric(index.metric)
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
        if (made_of := state_of(pipe)) == self._made_of:
            return
        self.denoiser = denoiser_for(pipe)
        self.similarity = similarity_for(self.index, self.denoiser)
        self.judges = judges_for(self.also, self.denoiser)
        self._courses.clear()
        self._made_of = made_of

    @property
    def owner(self) -> tuple[Any, ...]:
        """What the requests that are prepared now were made of."""
        return self._made_of

    def tools(self, request: Request) -> Tools:
        """What a request's samples are held to, with a cache of captions of its own, so that none outlives
        the text encoder that encoded it."""
        own = replace(self.denoiser, encode_captions=self._captions(request))
        rest = (self.judges, self.gate, self.screen, self.ordinary)
        return Tools(self.index, self.similarity, own, *rest)

    def _captions(self, request: Request) -> Any:
        if self.denoiser.encode_captions is None:
            return None
        encode = CaptionCache(self.pipe, {"max_sequence_length": request.max_sequence_length})

        def encode_captions(captions: Sequence[str]) -> Any:
            with self._texts:  # one thread at a time, as tokenizers want it
                return encode(captions)

        return encode_captions

    def conditions(self, request: Request, scale: float, device: Any) -> tuple[Conditions, int]:
        """What a request is conditioned on, and how many images it has."""
        with self._texts:
            return of_request(self.pipe, request, self.config.null_class, scale, device)

    def course(self, request: Request, scale: float, device: torch.device) -> Course:
        """How a request is run; `Refused` for a scheduler that cannot be."""
        given: dict[str, Any] = {"timesteps": request.timesteps, "sigmas": request.sigmas}
        if all(value is None for value in given.values()):
            given = {"num_inference_steps": request.num_inference_steps}
        given["mu"] = shift_of(self.pipe, request.height, request.width)
        known = step_arguments(self.pipe.scheduler, {"eta": request.eta})
        ready = setting(self.pipe.scheduler, given, known)
        key = (ready, scale, device)
        if key not in self._courses:
            while len(self._courses) >= COURSES:
                self._courses.pop(next(iter(self._courses)))
            self._courses[key] = Course(ready, self.tables, scale, self.gate, device)
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
    require_request(request)
    require_generator(generator)
    steps, output_type = request.num_inference_steps, request.output_type
    if steps is not None and steps < 1:
        raise ValueError(f"`num_inference_steps` must be >= 1, got {steps}")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f'`output_type` must be "pil", "np", "pt" or "latent", got {output_type!r}')
    source.renew()
    for index in (source.index, *source.also):
        index.seal.check()  # before any work, and before a truncated map is touched
    pipe, config = source.pipe, source.config
    scale = config.guidance_scale if request.guidance_scale is None else float(request.guidance_scale)
    device = pipe._execution_device  # once: the pipeline walks through all its modules for it
    conditions, batch = source.conditions(request, scale, device)
    course = source.course(request, scale, device)
    scheduler = course.setting.scheduler
    if source.gate is not None:
        source.gate.require(key_for(pipe, source.index, scheduler, scale, config))
    plan = course.plan(config)
    noise = _noise(pipe, request, batch, generator, device)
    sample = noise * course.noise_scale
    initial = sample
    if plan.scaled:  # in the scheduler's own operations: equal noise is to have equal bits on every way
        initial = started(scheduler, 0).scale_model_input(sample, scheduler.timesteps[0].to(device))
    texts = texts_of(request.prompt, request.num_images_per_prompt, batch)
    flights = [Flight.from_noise(row, text) for row, text in zip(initial, texts, strict=True)]
    if source.config.active:
        source.memory.recall(flights, course, past_first_checkpoint(config, plan.total))
    modes, tools = Modes.here(), source.tools(request)
    safety = None
    if output_type != "latent" and is_latent(pipe):
        safety = safety_of(pipe, [False] * batch, conditions.cond["encoder_hidden_states"].dtype)
    return Job(
        course=course,
        config=config,
        tools=tools,
        also=source.also,
        conditions=conditions,
        sample=sample,
        flights=flights,
        memory=source.memory,
        generator=generator,
        rescale=request.guidance_rescale,
        output_type=output_type,
        safety=safety,
        dtype=weights_of(network_of(pipe))[0],
        key=(id(tools.index), modes, form_of(sample[:1]), form_of(conditions.cond), _shared(conditions)),
        owner=source.owner,
        modes=modes,
        late_at=late_at,
    )


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


def _shared(conditions: Conditions) -> Any:
    return tuple((name, id(value)) for name, value in sorted(conditions.shared.items()))


def _noise(pipe: Any, request: Request, batch: int, generator: Any, device: torch.device) -> Tensor:
    """The first noise [batch, ...] of a request, as its pipeline would draw it, or the caller's."""
    network = network_of(pipe)
    shape = (batch, network.config.in_channels, *size_of(pipe, request.height, request.width))
    require_generator(generator, batch)
    dtype = weights_of(network)[0]
    if request.latents is None:
        return standard_normal(shape, generator, device, dtype)
    if tuple(request.latents.shape) != shape:
        raise ValueError(f"`latents` must be {list(shape)}, got {list(request.latents.shape)}")
    return request.latents.to(device, dtype)

"""How guidance reaches into a pipeline's own loop: a hook on its U-Net and a wrapper around its scheduler's
step.

The hook turns the two halves of the noise prediction of every open row into the guided one, so the pipeline's
own classifier-free guidance is an identity there; closed rows pass through untouched, bit for bit. The
wrapped step is where rewound rows are replaced. Both exist only during one call of the pipeline.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from amg.config import AMGConfig
from amg.engine.drive import pristine
from amg.guidance.flight import Flight, texts_of
from amg.guidance.gate import Gate
from amg.guidance.predict import Conditions, predict, replace_captions
from amg.pipelines.denoiser import class_conditions, denoiser_for, is_latent, split_call
from amg.pipelines.identity import key_for
from amg.protection.catch_up import Run, advance
from amg.protection.group import Group
from amg.protection.guide import Guide
from amg.protection.rewind import merge_history, rewound
from amg.similarity import judges_for, similarity_for
from amg.similarity.student import Screen

NAME = "anti-memorization guidance"


class Session:
    """One call of a protected pipeline: what the hook and the step wrapper share."""

    def __init__(
        self,
        pipe: Any,
        index: Any,
        config: AMGConfig,
        also: Sequence[Any] = (),
        gate: Gate | None = None,
        screen: Screen | None = None,
    ):
        self.pipe, self.index, self.config, self.also = pipe, index, config, also
        self.gate, self.screen = gate, screen
        self.run: Run | None = None
        self.flights: list[Flight] = []
        self.conditions: Conditions | None = None
        self.step_arguments: dict[str, Any] = {}
        self.index_of_step = 0
        self.forward: Any = None
        self.class_labels: Tensor | None = None
        self.class_scale: float | None = None
        self.prompt: Any = None  # the call's own, and how many images of each
        self.images_per_prompt = 1
        self.blank = torch.empty(0)  # one row per sample, in the shape of what the scheduler steps

    def begin(self, model_input: Tensor, guided: bool, arguments: dict[str, Any]) -> Run:
        """At the first step: the conditions, a flight per sample, and an unstepped copy of the scheduler."""
        batch = len(model_input) // 2 if guided else len(model_input)
        self.conditions = split_call(arguments, batch, guided)
        if self.class_conditional:
            self.conditions = class_conditions(
                self.pipe.unet, self.class_labels, batch, self.config.null_class, self.scale
            )
        self.blank = torch.zeros_like(model_input[:batch])
        texts = texts_of(self.prompt, self.images_per_prompt, batch)
        self.flights = [
            Flight.from_noise(row, text) for row, text in zip(model_input[:batch], texts, strict=True)
        ]
        denoiser = denoiser_for(self.pipe, self.forward)
        rescale = float(getattr(self.pipe, "_guidance_rescale", None) or 0.0)
        similarity = similarity_for(self.index, denoiser)
        judges = judges_for(self.also, denoiser)
        if self.gate is not None:
            scheduler = self.pipe.scheduler
            self.gate.require(key_for(self.pipe, self.index, scheduler, self.scale, self.config))
        parts = (self.index, similarity, denoiser, self.scale, rescale, judges, self.gate, self.screen)
        guide = Guide(self.config, *parts)
        self.run = Run(guide, pristine(self.pipe.scheduler), self.step_arguments)
        return self.run

    def with_captions(self, arguments: dict[str, Any], guided: bool) -> dict[str, Any]:
        """The U-Net's arguments with the captions that later tries were given in place of their prompts."""
        assert self.run is not None and self.conditions is not None
        captions = [flight.caption for flight in self.flights]
        if all(caption is None for caption in captions):
            return arguments
        self.conditions = replace_captions(self.run.guide.denoiser, self.conditions, captions)
        cond, uncond = self.conditions.cond, self.conditions.uncond
        own = {
            name: torch.cat([uncond[name], value]) if guided and uncond else value
            for name, value in cond.items()
            if isinstance(value, Tensor)
        }
        return {**arguments, **own}

    @property
    def class_conditional(self) -> bool:
        """Whether classes are this package's business: a pixel pipeline passes none to its U-Net."""
        return (
            not is_latent(self.pipe) and getattr(self.pipe.unet.config, "num_class_embeds", None) is not None
        )

    @property
    def scale(self) -> float:
        """s0 of this call."""
        if is_latent(self.pipe):
            return float(self.pipe.guidance_scale)
        return self.config.guidance_scale if self.class_scale is None else float(self.class_scale)


class GuidanceHook(ModelHook):  # type: ignore[misc]
    """Guides the output of each U-Net call of a pipeline's loop."""

    def __init__(self, session: Session):
        super().__init__()
        self.session = session

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        session, original = self.session, cast(Any, self.fn_ref).original_forward
        sample, t, kwargs = _arguments(args, kwargs)
        guided = bool(getattr(session.pipe, "do_classifier_free_guidance", False))
        if session.run is None:
            session.forward = original
            session.begin(sample, guided, kwargs)
        run = session.run
        assert run is not None and session.conditions is not None
        step = run.guide.at(run.scheduler, run.levels, session.index_of_step)
        if session.class_conditional:
            uncond, cond = predict(run.guide.denoiser, sample, t, session.conditions)
            found = run.guide(step, sample, uncond, cond, session.conditions, session.flights)
            return UNet2DOutput(found.output)
        kwargs = session.with_captions(kwargs, guided)
        result = original(sample, t, **kwargs)
        output = result[0] if isinstance(result, tuple) else result.sample
        uncond, cond = output.chunk(2) if guided else (None, output)
        model_input = sample.chunk(2)[0] if guided else sample
        found = run.guide(step, model_input, uncond, cond, session.conditions, session.flights)
        if not bool(found.changed.any()):
            return result
        replaced = torch.where(found.changed.view(-1, 1, 1, 1), found.output, cond)
        if uncond is not None:
            replaced = torch.cat(
                [torch.where(found.changed.view(-1, 1, 1, 1), found.output, uncond), replaced]
            )
        if isinstance(result, tuple):
            return (replaced, *result[1:])
        result.sample = replaced
        return result


def send_back(
    run: Run, scheduler: Any, index: int, sample: Tensor, conditions: Conditions, flights: Sequence[Flight]
) -> Tensor:
    """After the loop's `scheduler` made step `index`: run the rows that a checkpoint marked up to and
    including that step again, and merge them into `sample` [B, C, H, W].

    The scheduler's multistep history is merged row by row. Rows whose history cannot be merged exactly are
    left as they were, for the re-run at the end.
    """
    here = Group(scheduler, sample, [*range(len(flights))], index + 1)
    back = rewound([here], run, flights)
    if back is None:
        return sample
    for done in advance(run, back, index + 1, conditions, flights):
        if merge_history(scheduler, done.scheduler, done.rows, len(flights)):
            sample = sample.clone()
            sample[done.rows] = done.sample[done.rows]
    return sample


@contextmanager
def guided_call(session: Session) -> Iterator[Session]:
    """Install hook and wrapper for one call of the pipeline, and take both away again whatever happens."""
    pipe, registry = session.pipe, HookRegistry.check_if_exists_or_initialize(session.pipe.unet)
    registry.register_hook(GuidanceHook(session), NAME)
    scheduler, original = pipe.scheduler, pipe.scheduler.step
    scheduler.step = _wrapped_step(session, scheduler, original)
    try:
        yield session
    finally:
        del scheduler.step
        registry.remove_hook(NAME, recurse=False)


def _wrapped_step(session: Session, scheduler: Any, original: Any) -> Any:
    @functools.wraps(original)
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        known = {name: value for name, value in kwargs.items() if name not in ("generator", "return_dict")}
        session.step_arguments.update(known)
        result = original(model_output, timestep, sample, *args, **kwargs)
        index, session.index_of_step = session.index_of_step, session.index_of_step + 1
        if session.run is None or session.conditions is None:
            return result
        previous = result[0] if isinstance(result, tuple) else result.prev_sample
        replaced = send_back(session.run, scheduler, index, previous, session.conditions, session.flights)
        if isinstance(result, tuple):
            return (replaced, *result[1:])
        result.prev_sample = replaced
        return result

    return step


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    """(sample, timestep, the rest by name) of a U-Net call, however it was written."""
    kwargs = dict(kwargs)
    sample = args[0] if args else kwargs.pop("sample")
    t = args[1] if len(args) > 1 else kwargs.pop("timestep")
    if len(args) > 2:
        kwargs["encoder_hidden_states"] = args[2]
    return sample, t, kwargs
